"""The house: imports point one way, and links in pages lead somewhere."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the ground up: a file imports from its own row only what stands before it, and from the rows before as it likes.
FLOORS = [
    ["model", "masking", "losses", "sampler"],
    [
        "readers.prompts",
        "readers.dataset",
        "readers.files",
        "readers.wardrobe",
        "readers.camera",
        "readers.synthetic",
        "readers.fashiongen",
        "readers.jsonl",
        "readers.karpathy",
        "readers.triplets",
        "readers.statements",
    ],
    ["data"],
    [
        "engine.flags",
        "engine.config",
        "engine.distributed",
        "engine.run",
        "engine.checkpoints",
        "engine.log",
        "engine.batches",
        "engine.weights",
        "engine.finetune_config",
    ],
    [
        "evaluation.scores",
        "evaluation.validation",
        "evaluation.choice",
        "evaluation.truth",
        "evaluation.pictures",
        "evaluation.search",
    ],
    ["train"],
    ["finetune"],
]
ORDER = [module for floor in FLOORS for module in floor]
FILES = {
    path: ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in (".", "readers", "engine", "evaluation")
    for path in sorted((ROOT / folder).glob("*.py"))
}


def test_every_module_has_its_place():
    house = set(FILES.values())
    assert house == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_point_down(module):
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
    found = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    found += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    above = [
        name
        for name in found
        if name in ORDER[ORDER.index(module) :] or name.split(".")[0] in ("tutorial", "experiments", "tests")
    ]
    assert not above, f"{module} imports {above}"


def test_the_ground_floor_knows_of_no_recipe():
    for module in FLOORS[0] + FLOORS[1]:
        assert "recipe" not in (ROOT / (module.replace(".", "/") + ".py")).read_text(), module


def test_links_lead_somewhere():
    pages = [
        ROOT / "README.md",
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("tutorial/**/*.md"),
        *ROOT.glob("experiments/*.md"),
    ]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text())]
    assert len(links) > 20 and not [link for page, link in links if not (page.parent / link).exists()]
