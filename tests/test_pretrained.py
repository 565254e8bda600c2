"""The trained models and the page that come with the code are what their cards say, and what the commands write."""

import json
import re

import pytest
from test_explorer import read_page_data
from test_layout import ROOT

import data
import finetune
from engine.checkpoints import TRAINED_MODEL
from tutorial import explore

FOLDERS = [path for path in TRAINED_MODEL.parent.iterdir() if path.is_dir()]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_trained_model_has_the_metrics_of_its_card(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "VAL_PRODUCTS", 300)  # other tests have fewer
    card = dict(re.findall(r"\| `(\w+)` \| ([\d.]+) \|", (folder / "README.md").read_text()))
    flags = ["--task", "retrieval", "--eval-only", "--data", "synthetic", "--checkpoint", str(folder)]
    finetune.main([*flags, "--out", str(tmp_path / "out")])
    metrics = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    for key in ("i2t_r1", "i2t_r5", "t2i_r1", "t2i_r5"):
        assert metrics[f"full_{key}"] == pytest.approx(float(card[f"val_{key}"]), abs=0.02)
    assert float(card["val_i2t_r1"]) > 0.5
    assert sum(file.stat().st_size for file in folder.iterdir()) < 6e6


def leaves(value):
    """List the numbers, booleans and texts in nested lists and dictionaries."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return [value]
    return [leaf for member in value for leaf in leaves(member)]


def test_the_page_is_of_the_trained_model(monkeypatch):
    monkeypatch.setattr(explore, "IMAGES", 24)
    run, dataset = explore.open_run(TRAINED_MODEL, None, "cpu")
    computed = leaves(json.loads(json.dumps(explore.compute_page_data(run, dataset))))
    page = leaves(read_page_data(ROOT / "docs" / "explorer.html"))
    assert len(page) == len(computed) > 10_000
    differences = 0
    for ours, theirs in zip(page, computed, strict=True):
        if isinstance(ours, str):
            assert ours[:20] == theirs[:20]  # images begin alike, whatever library compresses them
        elif theirs != pytest.approx(ours, abs=0.01, rel=0.01):
            differences += 1
    assert differences < 0.01 * len(page)  # processors differ in the last digits
