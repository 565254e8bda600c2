"""docs/walkthrough.md has the tables that tutorial/walkthrough.py prints; errors are one line."""

import re
import runpy
import sys

import pytest
import torch

from tests.small import ROOT, run, run_files, write_jsonl

PAGE = (ROOT / "docs/walkthrough.md").read_text()
NUMBER, SHAPE = r"-?\d+\.\d+", r"\(\d+(?:, \d+)+\)"


@pytest.fixture
def walk(monkeypatch, capsys):
    """A function that runs the script. It returns the title and the printed table of each stop, by number."""

    def run_script(*flags):
        monkeypatch.setattr(sys, "argv", ["walkthrough.py", *flags])
        capsys.readouterr()
        runpy.run_path(str(ROOT / "tutorial/walkthrough.py"))
        return stops(r"(?m)^(\d+) (.+)\n", capsys.readouterr().out)

    return run_script


def stops(heading, text):
    """Split a text at its headings, each with a number and a title. Returns title and text by number."""
    _, *parts = re.split(heading, text)
    return {int(parts[i]): (parts[i + 1], parts[i + 2]) for i in range(0, len(parts), 3)}


def test_the_page_has_the_tables_that_the_script_prints(walk):
    printed, sections = walk(), stops(r"(?m)^## (\d+)\. (.+)\n", PAGE)
    assert list(printed) == list(sections) == list(range(1, 14))
    for number, (title, text) in sections.items():
        printed_title, printed_table = printed[number]
        (table,) = re.findall(r"(?s)```text\n(.*?)\n```", text)
        assert title.strip("`").lower() == printed_title.lower()
        assert re.findall(SHAPE, table) == re.findall(SHAPE, printed_table)
        # numbers up to rounding, which depends on the processor; all other words exactly
        assert re.sub(NUMBER, "#", table).split() == re.sub(NUMBER, "#", printed_table).split()
        numbers = torch.tensor([float(x) for x in re.findall(NUMBER, table)])
        printed_numbers = torch.tensor([float(x) for x in re.findall(NUMBER, printed_table)])
        torch.testing.assert_close(numbers, printed_numbers, atol=0.005, rtol=0.01)
        assert "\n> " in text and "`:" not in text and text.count("<details>") == text.count("</details>") == 1


def test_a_trained_run_has_the_same_stops(tmp_path, walk):
    run(tmp_path, "--fusion-layers", "2", "--steps", "1")
    printed = walk("--checkpoint", f"{tmp_path}/last.pt")
    assert len(printed) == 13 and not re.search(r"\bnan\b", str(printed))
    assert "(16, 3, 32, 32)" in printed[1][1] and "(16, 2, " in printed[2][1]


def test_a_checkpoint_that_cannot_be_used_is_one_line(walk, quick, tmp_path):
    with pytest.raises(SystemExit, match="walkthrough.py: /nowhere.pt: no such checkpoint"):
        walk("--checkpoint", "/nowhere.pt")
    records = [{"image": f"{n}.png", "caption": "red shirt", "product_id": n} for n in range(8)]
    write_jsonl(tmp_path / "files", train=records, val=records)
    run_files(tmp_path / "out", tmp_path / "files", "--steps", "1")
    with pytest.raises(SystemExit, match="last.pt was trained on jsonl, whose ground truth is not known"):
        walk("--checkpoint", f"{tmp_path}/out/last.pt")
