"""The house: imports point one way, and links in pages lead somewhere."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the ground up: a module imports only what stands before it.
FLOORS = """
. model masking losses sampler
readers prompts dataset files wardrobe camera synthetic fashiongen jsonl karpathy triplets statements
readers convert
engine flags
. data
engine sizes weights config distributed run checkpoints log batches finetune_config
evaluation scores validation choice ground_truth pictures search
. train finetune
"""
ORDER = []
for floor in FLOORS.strip().split("\n"):
    room, *modules = floor.split()
    ORDER += [f"{room}.{module}".removeprefix("..") for module in modules]
FILES = {module: ROOT / (module.replace(".", "/") + ".py") for module in ORDER}


def test_every_module_has_its_place():
    found = [path for room in (".", "readers", "engine", "evaluation") for path in (ROOT / room).glob("*.py")]
    assert set(found) == set(FILES.values())


@pytest.mark.parametrize("module", ORDER)
def test_imports_point_down(module):
    imported = []
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.ImportFrom):
            imported.append(node.module)
        elif isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
    above = {*ORDER[ORDER.index(module) :], "tutorial", "experiments", "tests"}
    assert not [name for name in imported if name in above or name.split(".")[0] in above]


def test_the_ground_floor_knows_of_no_recipe():
    for module in ORDER[: ORDER.index("engine.flags")]:
        assert "recipe" not in FILES[module].read_text(), module


def test_links_lead_somewhere():
    pages = [ROOT / "README.md"]
    for folder in ("docs", "tutorial", "experiments"):
        pages += (ROOT / folder).rglob("*.md")
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text())]
    assert len(links) > 20 and not [link for page, link in links if not (page.parent / link).exists()]
