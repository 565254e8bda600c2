"""docs/extending.md adds a recipe; this test does what the page says."""

import re

import pytest
from small import ROOT, lines, run

import train
from engine.config import RECIPE_DEFAULTS

pytestmark = pytest.mark.usefixtures("quick")


def test_the_recipe_of_the_page_trains(tmp_path, monkeypatch):
    page = (ROOT / "docs/extending.md").read_text()
    function, row = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    namespace = dict(vars(train))
    exec(function, namespace)
    monkeypatch.setitem(train.RECIPES, "contrastive", namespace["contrastive"])
    for name, defaults in eval("{" + row + "}").items():
        monkeypatch.setitem(RECIPE_DEFAULTS, name, defaults)
    final = run(tmp_path, "--recipe", "contrastive", "--steps", "8", "--log-every", "1")
    training = [line for line in lines(tmp_path) if "loss" in line]
    assert final["step"] == 8 and all(line["loss"] == line["itc"] for line in training)
    assert training[-1]["itc"] < training[0]["itc"]
