"""One profile for the property tests: no time limit on an example, and the same examples every time. Fewer held-out
synthetic products than a run has, which it would draw and measure anew in every test."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # in models as small as these, threads would only wait for each other

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
    """Short runs neither measure the truth nor draw pictures, but in tests marked as `whole`, which are about them."""
    if request.node.get_closest_marker("whole"):
        return
    monkeypatch.setattr(data, "VAL_PRODUCTS", 12)
    monkeypatch.setattr("train.ground_truth_metrics", lambda *_: {})
    for picture in ("draw_curves", "draw_masks"):
        monkeypatch.setattr(f"train.{picture}", lambda *_: None)


@pytest.fixture(scope="module")
def wardrobe():
    return Synthetic("train", 150, 64, seed=0, progress=False)
