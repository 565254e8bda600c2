"""docs/walkthrough.md says what tutorial/walkthrough.py prints, and names what the code has."""

import re
from types import SimpleNamespace

import pytest
import torch

from tests.small import ROOT, run, unresolved
from tutorial import walkthrough

PAGE = (ROOT / "docs/walkthrough.md").read_text()
NUMBER, SHAPE = r"-?\d+\.\d+", r"\(\d+(?:, \d+)+\)"
QUICK = ["--fusion-layers", "2", "--steps", "1"]


def printed(capsys, *flags):
    """What stands under each heading."""
    walkthrough.main([*flags])
    parts = re.split(r"(?m)^(\d+) (.+)\n", capsys.readouterr().out)[1:]
    return {int(n): (name, re.sub(r"(?m)^    ", "", text).strip("\n")) for n, name, text in zip(*[iter(parts)] * 3)}


def test_every_name_is_in_the_code():
    missing, asked = unresolved(PAGE)
    assert not missing and asked > 25


def test_the_page_has_what_the_program_prints(capsys):
    stops = printed(capsys)
    sections = re.split(r"(?m)^## (\d+)\. (.+)\n", PAGE)[1:]
    assert len(stops) == 13 and len(sections) == 39
    for number, title, text in zip(*[iter(sections)] * 3):
        name, ours = stops[int(number)]
        (there,) = re.findall(r"(?s)```text\n(.*?)\n```", text)
        assert title.strip("`").lower() == name.lower()
        assert re.findall(SHAPE, there) == re.findall(SHAPE, ours)
        # the numbers to what another processor may round otherwise; all other words as they are
        assert re.sub(NUMBER, "#", there).split() == re.sub(NUMBER, "#", ours).split()
        theirs, mine = (torch.tensor([float(x) for x in re.findall(NUMBER, part)]) for part in (there, ours))
        torch.testing.assert_close(theirs, mine, atol=0.005, rtol=0.01)
        assert "\n> " in text and "`:" not in text and text.count("<details>") == text.count("</details>") == 1


def test_a_trained_run_takes_the_same_way(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(walkthrough, "PRODUCTS", 18)
    run(tmp_path, *QUICK)
    capsys.readouterr()
    stops = printed(capsys, "--checkpoint", str(tmp_path / "last.pt"))
    assert len(stops) == 13 and not re.search(r"\bnan\b", str(stops))
    assert "(16, 3, 32, 32)" in stops[1][1] and "(16, 2, " in stops[2][1]


def test_what_cannot_be_walked_through_is_one_line(monkeypatch):
    with pytest.raises(SystemExit, match="walkthrough.py: /nowhere.pt: no such checkpoint"):
        walkthrough.main(["--checkpoint", "/nowhere.pt"])
    files = SimpleNamespace(config=SimpleNamespace(data="jsonl"))
    monkeypatch.setattr(walkthrough, "open_run", lambda *where: (files, None))
    with pytest.raises(SystemExit, match="x.pt was trained on jsonl, whose truth is not known"):
        walkthrough.main(["--checkpoint", "x.pt"])
