"""Exercises: solutions pass, stubs fail, mistakes get a message; the command lines."""

import importlib
import inspect
import json
import re
import sys
from pathlib import Path

import pytest

from tutorial.exercises import catalogue, compare, start
from tutorial.exercises.catalogue import EXERCISES, Mistake, load_functions, run_project_tests
from tutorial.exercises.checks import check

HERE = Path(catalogue.__file__).parent
# exercise ¦ code of the solution ¦ the mistake instead of it ¦ part of the message
TABLE = """
1 ¦ mask_words(scores, maskable, ratio) ¦ (scores < ratio).gather(1, (maskable - 1).clamp(min=0)) & (maskable > 0) ¦ count words, not tokens, and toss no coin
1 ¦ mask_words(scores, maskable, ratio) ¦ mask_words(scores, maskable.clamp(min=1), ratio) ¦ leave tokens where `maskable` is 0: [CLS]
1 ¦ mask_words(scores, maskable, ratio) ¦ topk_mask(scores, maskable > 0, word_counts(maskable, ratio)) ¦ one piece of a word is masked
1 ¦ mask_words(scores, maskable, ratio) ¦ mask_words(scores[:1].expand(maskable.shape), maskable, ratio) ¦ the same random numbers
1 ¦ , generator=generator ¦  ¦ the same seed gives other masks; pass `generator` to every draw
2 ¦ token_ids.masked_fill(~mask, -100) ¦ token_ids ¦ words that are not masked have labels
2 ¦ dice < 0.8 ¦ dice < 1 ¦ become [MASK] and 0% stay
2 ¦ token_ids.masked_fill(mask ¦ token_ids.masked_fill_(mask ¦ token_ids is changed in place
2 ¦ , generator=generator ¦  ¦ the same seed gives other words
3 ¦ mask & candidates ¦ mask ¦ only masked candidates count
3 ¦ (masked & shared).sum(), masked.sum() ¦ (masked & shared).sum() / masked.sum() ¦ two counts
3 ¦ by_chance[words].sum() ¦ words.sum() / regions.shape[2] ¦ its region's share of the patches
4 ¦ same_product | same_caption ¦ same_product ¦ same caption is no positive
4 ¦ product_ids[:, None] == key_product_ids ¦ torch.eye(2, 4) > 0 ¦ second image of a product is no positive
4 ¦ positives / positives.sum(dim=1, keepdim=True) ¦ positives ¦ sum to 2.0 instead of 1
4 ¦ positives / positives.sum(dim=1, keepdim=True) ¦ torch.eye(*positives.shape) ¦ all positives share
4 ¦ hard = positives ¦ alpha, hard = 1 - alpha, positives ¦ alpha weighs softmax
5 ¦ logits.masked_fill(positives & possible[:, None], -torch.inf) ¦ (logits.softmax(dim=1) * ~positives).log() ¦ Mask the logits before the softmax
5 ¦ logits = sim if ¦ logits = -sim if ¦ the draw is not ∝ exp(sim)
5 ¦ sim if mode == "similar" else torch.zeros_like(sim) ¦ sim ¦ random: the pick is always the same
5 ¦ , generator=generator ¦  ¦ one seed gives two results
5 ¦ masked_fill(positives ¦ masked_fill(False & positives ¦ hard: the own pair or another positive is picked; give positives −∞
5 ¦ sim.masked_fill(positives, - ¦ sim.masked_fill_(positives, - ¦ sim is changed in place
5 ¦ torch.where(possible, chosen, -1) ¦ chosen ¦ must give −1
5 ¦ positives & possible[:, None] ¦ positives ¦ Keep the logits finite
6 ¦ [:, None] - margin ¦ [:, None] + margin ¦ subtract the margin
6 ¦ sim < sim.diag ¦ sim > sim.diag ¦ the pick is the own pair or more similar
6 ¦ torch.inf).argmin ¦ -torch.inf).argmax ¦ the pick must be the least similar negative
6 ¦ ~below, -torch.inf).argmax ¦ ~below, torch.inf).argmin ¦ take the most similar one
7 ¦ mask_words(scores, maskable, ¦ mask_words(-scores, maskable, ¦ the word with the lowest score is masked
7 ¦ mask_words(scores, maskable, ¦ mask_words(scores, maskable.clamp(min=1), ¦ leave tokens where `maskable` is 0: [CLS]
7 ¦ mask_words(scores, maskable, word_ratio) ¦ topk_mask(scores, maskable > 0, word_counts(maskable, word_ratio)) ¦ one piece of a word is masked
7 ¦ maskable, word_ratio ¦ maskable, patch_ratio ¦ mask exactly word_counts(maskable, 0.67) words
7 ¦ maskable, word_ratio ¦ maskable, 0.9 * word_ratio ¦ mask exactly word_counts(maskable, 0.2) words
7 ¦ mask_words(scores, maskable, ¦ mask_words(scores.round(), maskable, ¦ rank words by `scores`
7 ¦ masked_fill(~word_mask, lowest) ¦ masked_fill(maskable == 0, lowest) ¦ the wrong patches are masked
7 ¦ scores.masked_fill(~word_mask, lowest) ¦ scores ¦ without other words, [CLS] and [SEP]
7 ¦ masked_fill(~word_mask, lowest) ¦ masked_fill(~(word_mask & first_pieces(maskable)), lowest) ¦ each piece of a word
7 ¦ scores.masked_fill(~word_mask, lowest).softmax(dim=1) ¦ word_mask.float() ¦ by the softmax of their scores
7 ¦ mask_patches(patch_scores, patch_ratio) ¦ mask_patches(patch_scores, 1.1 * patch_ratio) ¦ mask exactly patch_count(9, 0.8) patches
8 ¦ gradient.clamp(min=0) ¦ gradient ¦ the ReLU of Grad-CAM
8 ¦ (attention * gradient ¦ (gradient ¦ multiply by the attention itself
8 ¦ , retain_graph=True ¦  ¦ the graph of the score is freed
8 ¦ .detach() ¦  ¦ the maps have a gradient
8 ¦ word_index, 1:] ¦ word_index] ¦ leave out column 0
8 ¦ word_index, 1:] ¦ 0, 1:] ¦ from the row of word_index
8 ¦ heat.amax(dim=1, keepdim=True) ¦ heat.amax() ¦ must reach 1 in each image
"""
MISTAKES = [line.split(" ¦ ") for line in TABLE.strip().splitlines()]


def functions_with_mistake(number, code, mistake):
    """The solution of an exercise with `mistake` instead of `code`."""
    functions = EXERCISES[number].solution()
    for name, function in functions.items():
        source = inspect.getsource(function)
        if code in source:
            module = dict(vars(inspect.getmodule(function)))
            exec(source.replace(code, mistake), module)
            return functions | {name: module[name]}
    raise AssertionError(f"{code}: not in the solution")


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """An empty folder for the stubs."""
    monkeypatch.setattr(catalogue, "MINE", tmp_path / "mine")
    return tmp_path / "mine"


@pytest.mark.parametrize("number", EXERCISES)
def test_solutions_pass_and_stubs_fail(number, mine, capsys):
    solution = EXERCISES[number].solution()
    check(number, solution)
    run_project_tests(number, solution)
    start.main([str(number)])
    assert f"ex{number}.py: write {', '.join(solution)}; then python -m pytest" in capsys.readouterr().out
    stub = load_functions(number)
    assert all(inspect.getdoc(stub[name]) == inspect.getdoc(solution[name]) for name in stub)
    with pytest.raises(Mistake, match=f"exercise {number} is not written yet"):
        check(number, stub)


@pytest.mark.parametrize("number, code, mistake, message", MISTAKES)
def test_each_mistake_has_its_message(number, code, mistake, message):
    with pytest.raises(Mistake, match=re.escape(message)):
        check(int(number), functions_with_mistake(int(number), code, mistake))


@pytest.mark.parametrize("number", EXERCISES)
def test_the_projects_own_tests_are_run_on_the_students_function(number):
    code, mistake = next(row[1:3] for row in MISTAKES if row[0] == str(number))
    solution = EXERCISES[number].solution()
    with pytest.raises((AssertionError, RuntimeError)):
        run_project_tests(number, functions_with_mistake(number, code, mistake))
    assert EXERCISES[number].solution() == solution


def test_stubs_are_not_overwritten_and_hints_have_three_levels(mine, capsys):
    start.main(["5"])
    (mine / "ex5.py").write_text("mine = 1")
    with pytest.raises(SystemExit, match="exists already; delete it to begin anew"):
        start.main(["5"])
    assert (mine / "ex5.py").read_text() == "mine = 1"
    with pytest.raises(Mistake, match="defines no pick_negatives"):
        load_functions(5)
    for number, exercise in EXERCISES.items():
        for level in (1, 2, 3):
            capsys.readouterr()
            start.main([str(number), "--hint", str(level)])
            hint = capsys.readouterr().out
            assert hint.startswith(f"{number}.{level} ") and len(hint) > 70
        assert all(name in hint for name in exercise.write)


def test_linked_names_are_in_the_code():
    links = re.findall(r"\[`(\w+)`\]\(\.\./\.\./([\w/]+)\.py\)", (HERE / "README.md").read_text())
    assert len(links) > 8
    for name, file in links:
        assert hasattr(importlib.import_module(file.replace("/", ".")), name), f"{file}.py:{name}"


def run_check(capsys, number):
    """Run `python -m pytest tutorial/exercises -k exN`. Returns the exit code and the output."""
    sys.modules.pop("test_mine", None)
    code = pytest.main([str(HERE), "-p", "no:cacheprovider", "-rN", "-k", f"ex{number}"])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_one_command_checks_every_stub(mine, capsys):
    code, output = run_check(capsys, 1)
    assert code == 0 and "1 skipped" in output
    start.main(["1"])
    assert "# def word_counts" in (mine / "ex1.py").read_text() and "Do not open masking.py" in capsys.readouterr().out
    code, output = run_check(capsys, 1)
    assert code == 1 and output.count("exercise 1 is not written yet: random_word_mask;") == 1
    assert "Traceback" not in output and "During handling" not in output
    mine.joinpath("ex4.py").write_text("from losses import itc_targets, positive_pairs")
    code, output = run_check(capsys, 4)
    assert code == 0 and "1 passed" in output
    mine.joinpath("ex4.py").write_text("from losses import itc_targets\ndef positive_pairs(*ids): return ids[9]")
    code, output = run_check(capsys, 4)
    assert code == 1 and "ex4.py:2: IndexError" in output


def test_two_runs_are_compared(tmp_path, capsys):
    for name, gain in (("a", 0.25), ("b", 0.5)):
        (tmp_path / name).mkdir()
        final = {"step": 2, "final": True, "image_gain": gain, "pointing_game": 1.0}
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1}\n' + json.dumps(final))
    runs = [str(tmp_path / "a"), str(tmp_path / "b")]
    compare.main([*runs, "image_gain"])
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| metric | a | b | difference |" and table[2:] == ["| image_gain | 0.25 | 0.5 | +0.25 |"]
    with pytest.raises(SystemExit, match="speed: not among the metrics of both runs"):
        compare.main([*runs, "speed"])
    (tmp_path / "b" / "metrics.jsonl").write_text('{"step": 1}')
    with pytest.raises(SystemExit, match="the run is not finished"):
        compare.main(runs)
    with pytest.raises(SystemExit, match="no such file"):
        compare.main([runs[0], "/nowhere"])
