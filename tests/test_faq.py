"""What the pages name is in the code; the example of docs/faq.md runs as it stands there."""

import re
import urllib.parse

import pytest
import torch

from data import normalise
from engine.batches import text_features
from experiments.figures import open_run
from tests.small import ROOT, run, unresolved

PAGE = (ROOT / "docs/faq.md").read_text()
ANSWERS = re.split(r"(?m)^\*\*(?=\S)", PAGE)[1:]


PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "experiments").glob("*.md")]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_name_is_in_the_code(path):
    page = re.sub(r"(`[\w/]+\.py)`: `", r"\1:", path.read_text())  # `file.py`: `name` as in the README's table
    assert not unresolved(page)[0]
    if path.parent.name != "experiments":
        assert all((ROOT / name).exists() for name in re.findall(r"`(\w+/[\w/]+\.py)`", page))


def test_every_answer_has_a_thread_and_something_that_shows_it():
    assert len(ANSWERS) > 12
    for answer in ANSWERS:
        links = re.findall(r"\]\((https://[^)]+)\)", answer)
        assert links, answer
        for link in links:
            assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+/issues/\d+", link), link
            number, repository = link.rsplit("/", 1)[1], urllib.parse.urlparse(link).path.split("/")[2]
            assert re.search(rf"\[(\S*{re.escape(repository)})?#{number}\]", answer, re.I), link
        assert re.search(r"`--|\.py:|\.md\)|\.py`", answer), answer


def test_flags_are_flags(capsys):
    known = {"--nproc-per-node", "--shutdown-timeout"}  # torchrun's
    for script in ("train", "finetune", "data"):
        with pytest.raises(SystemExit):
            __import__(script).main(["--help"])
        known |= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    for folder in ("experiments", "tutorial"):
        for script in (ROOT / folder).rglob("*.py"):
            known |= set(re.findall(r'add_argument\("(--[\w-]+)"', re.sub(r"\(\s+", "(", script.read_text())))
    for page in PAGES:
        text = re.sub(r"\(.*?#.*?\)", "", page.read_text())  # anchors of links
        unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text)) - known
        assert not unknown, f"{page.name}: {unknown}"


def test_the_example_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"(?s)```python\n(.*?)```", PAGE)
    assert len(code.split("\n\n", 3)[-1].strip().splitlines()) <= 13
    folder = tmp_path / "runs/synthetic-syncmask-tiny"
    run(folder, "--steps", "1")
    state, dataset = open_run(folder / "last.pt", None, "cpu")
    dataset.images[3].save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(compile(code, "faq.md", "exec"), {})
    said = float(re.fullmatch(r"cosine (-?\d\.\d{3})\n", capsys.readouterr().out)[1])
    with torch.no_grad():
        photo = state.model.eval().vision(normalise(dataset[3]["image"][None]))
        cosine = state.model.image_feature(photo) @ text_features(state, [("", "green straight trousers")]).T
    assert said == pytest.approx(cosine.item(), abs=0.001)
