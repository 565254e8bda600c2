"""Settings of all tests: property tests without time limit and with the same examples every time, and fewer held-out
synthetic products than a run has, since every test would draw and measure them anew."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads slow such small models down

import pytest
from hypothesis import settings

import data
from evaluation import ground_truth
from readers.synthetic import Synthetic

settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")


@pytest.fixture(autouse=True)
def few_held_out_products(monkeypatch):
    monkeypatch.setattr(data, "VAL_PRODUCTS", 60)
    monkeypatch.setattr(ground_truth, "CHOICE_PRODUCTS", 6)


@pytest.fixture
def quick(request, monkeypatch):
    """Let runs neither measure against the ground truth nor draw pictures, except in tests marked as `whole`."""
    if request.node.get_closest_marker("whole"):
        return
    monkeypatch.setattr(data, "VAL_PRODUCTS", 12)
    monkeypatch.setattr("train.ground_truth_metrics", lambda *_: {})
    for picture in ("draw_curves", "draw_masks"):
        monkeypatch.setattr(f"train.{picture}", lambda *_: None)


@pytest.fixture(scope="module")
def wardrobe():
    return Synthetic("train", 150, 64, seed=0, progress=False)
