"""Exercises: solutions pass, stubs fail, mistakes fail with what is wrong; the command lines."""

import inspect
import json
import re
import sys
from pathlib import Path

import pytest

from tutorial.exercises import catalogue, compare, start
from tutorial.exercises.catalogue import EXERCISES, Mistake, run_own_tests, written
from tutorial.exercises.checks import check

HERE = Path(catalogue.__file__).parent
# exercise ¦ what of its solution ¦ becomes what ¦ what the student reads
TABLE = """
1 ¦ mask_words(scores, maskable, ratio) ¦ (scores < ratio).gather(1, (maskable - 1).clamp(min=0)) & (maskable > 0) ¦ no coin for each word
1 ¦ mask_words(scores, maskable, ratio) ¦ mask_words(scores, maskable.clamp(min=1), ratio) ¦ no words, where `maskable` is 0: [CLS]
1 ¦ mask_words(scores, maskable, ratio) ¦ topk_mask(scores, maskable > 0, word_counts(maskable, ratio)) ¦ one piece of a word is masked
1 ¦ mask_words(scores, maskable, ratio) ¦ mask_words(scores[:1].expand(maskable.shape), maskable, ratio) ¦ the same random numbers
2 ¦ token_ids.masked_fill(~mask, -100) ¦ token_ids ¦ words that are not masked have labels
2 ¦ dice < 0.8 ¦ dice < 1 ¦ become [MASK] and 0% stay
2 ¦ token_ids.masked_fill(mask ¦ token_ids.masked_fill_(mask ¦ token_ids itself is written into
3 ¦ mask & candidates ¦ mask ¦ only masked candidates count
3 ¦ (masked & shared).sum(), masked.sum() ¦ (masked & shared).sum() / masked.sum() ¦ two counts
3 ¦ by_chance[words].sum() ¦ words.sum() / regions.shape[2] ¦ as often as the region is large
4 ¦ same_product | same_caption ¦ same_product ¦ same caption to the letter counts as a negative
4 ¦ product_ids[:, None] == key_product_ids ¦ torch.eye(2, 4) > 0 ¦ second image of a product counts as a negative
4 ¦ positives / positives.sum(dim=1, keepdim=True) ¦ positives ¦ sum to 2.0, not to 1
4 ¦ positives / positives.sum(dim=1, keepdim=True) ¦ torch.eye(*positives.shape) ¦ positives share
4 ¦ hard = positives ¦ alpha, hard = 1 - alpha, positives ¦ alpha is the share of softmax
5 ¦ logits.masked_fill(positives & possible[:, None], -torch.inf) ¦ (logits.softmax(dim=1) * ~positives).log() ¦ Mask the logits before the softmax
5 ¦ logits = sim if ¦ logits = -sim if ¦ not drawn ∝ exp(sim)
5 ¦ sim if mode == "similar" else torch.zeros_like(sim) ¦ sim ¦ random always draws the same
5 ¦ , generator=generator ¦  ¦ one generator, two draws
5 ¦ masked_fill(positives ¦ masked_fill(False & positives ¦ hard: a pair itself, or another positive, is drawn: −∞
5 ¦ sim.masked_fill(positives, - ¦ sim.masked_fill_(positives, - ¦ sim itself is written into
5 ¦ torch.where(possible, chosen, -1) ¦ chosen ¦ the answer is −1
5 ¦ positives & possible[:, None] ¦ positives ¦ Keep the logits finite
6 ¦ [:, None] - margin ¦ [:, None] + margin ¦ margin is on the wrong side
6 ¦ sim < sim.diag ¦ sim > sim.diag ¦ more similar than the own pair
6 ¦ torch.inf).argmin ¦ -torch.inf).argmax ¦ then the least similar one
6 ¦ ~below, -torch.inf).argmax ¦ ~below, torch.inf).argmin ¦ is the easiest
7 ¦ break_ties(scores, generator) ¦ break_ties(-scores, generator) ¦ the lowest scores are masked
7 ¦ mask_words(best + draws, maskable, ¦ mask_words(best + draws, maskable.clamp(min=1), ¦ no words, where `maskable` is 0: [CLS]
7 ¦ mask_words(best + draws, maskable, ¦ topk_mask(best + draws, maskable > 0, 2 * ¦ one piece of a word is masked
7 ¦ attention * word_mask[..., None] ¦ attention * (maskable > 0)[..., None] ¦ other patches are masked than those with the highest
7 ¦ .clamp(min=1) ¦  ¦ a caption without a word has always the same patches
7 ¦ break_ties(patch_scores, generator) ¦ patch_scores ¦ always the same patches: `break_ties`
7 ¦ break_ties(scores, generator) ¦ scores ¦ always the same word: `break_ties`
7 ¦ mask_words(best + draws ¦ mask_words(draws ¦ not of all words
7 ¦ max(pool, word_ratio) ¦ word_ratio ¦ the pool is ignored
7 ¦ max(pool, word_ratio) ¦ pool ¦ the best max(pool, word_ratio)
8 ¦ gradient.clamp(min=0) ¦ gradient ¦ the ReLU of Grad-CAM
8 ¦ (attention * gradient ¦ (gradient ¦ the attention itself is a factor
8 ¦ , retain_graph=True ¦  ¦ still need the graph
8 ¦ .detach() ¦  ¦ nothing is learnt through a soft mask
8 ¦ word_index, 1:] ¦ word_index] ¦ without the image CLS
8 ¦ word_index, 1:] ¦ 0, 1:] ¦ the row of the word counts
8 ¦ heat.amax(dim=1, keepdim=True) ¦ heat.amax() ¦ a most of its own
"""
MISTAKES = [line.split(" ¦ ") for line in TABLE.strip().splitlines()]


def mistaken(number, right, wrong):
    """The solution of an exercise with something of it changed."""
    functions = EXERCISES[number].solution()
    for name, function in functions.items():
        source = inspect.getsource(function)
        if right in source:
            module = dict(vars(inspect.getmodule(function)))
            exec(source.replace(right, wrong), module)
            return functions | {name: module[name]}
    raise AssertionError(f"{right}: not in the solution")


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A student's folder."""
    monkeypatch.setattr(catalogue, "MINE", tmp_path / "mine")
    return tmp_path / "mine"


@pytest.mark.parametrize("number", EXERCISES)
def test_solutions_pass_and_stubs_fail(number, mine, capsys):
    solution = EXERCISES[number].solution()
    check(number, solution)
    run_own_tests(number, solution)
    start.main([str(number)])
    assert f"ex{number}.py: write {', '.join(solution)}; then python -m pytest" in capsys.readouterr().out
    stub = written(number)
    assert all(inspect.getdoc(stub[name]) == inspect.getdoc(solution[name]) for name in stub)
    with pytest.raises(Mistake, match=f"exercise {number} is not written yet"):
        check(number, stub)


@pytest.mark.parametrize("number, right, wrong, message", MISTAKES)
def test_mistakes_are_told_in_words(number, right, wrong, message):
    with pytest.raises(Mistake, match=re.escape(message)):
        check(int(number), mistaken(int(number), right, wrong))


@pytest.mark.parametrize("number", EXERCISES)
def test_the_projects_own_tests_are_run_against_the_students_function(number):
    right, wrong = next(row[1:3] for row in MISTAKES if row[0] == str(number))
    before = EXERCISES[number].solution()
    with pytest.raises((AssertionError, RuntimeError)):
        run_own_tests(number, mistaken(number, right, wrong))
    assert EXERCISES[number].solution() == before


def test_stubs_are_not_overwritten_and_hints_go_from_the_idea_to_the_place(mine, capsys):
    start.main(["5"])
    (mine / "ex5.py").write_text("mine = 1")
    with pytest.raises(SystemExit, match="is there already; delete it to begin anew"):
        start.main(["5"])
    assert (mine / "ex5.py").read_text() == "mine = 1"
    with pytest.raises(Mistake, match="defines no pick_negatives"):
        written(5)
    for number, exercise in EXERCISES.items():
        for level in (1, 2, 3):
            capsys.readouterr()
            start.main([str(number), "--hint", str(level)])
            said = capsys.readouterr().out
            assert said.startswith(f"{number}.{level} ") and len(said) > 70
        assert all(name in said for name in exercise.write)


def checked(capsys, number):
    """What `python -m pytest tutorial/exercises -k exN` says. -> exit code, output."""
    sys.modules.pop("test_mine", None)
    code = pytest.main([str(HERE), "-p", "no:cacheprovider", "-k", f"ex{number}"])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_one_command_checks_what_is_begun(mine, capsys):
    code, said = checked(capsys, 1)
    assert code == 0 and "1 skipped" in said
    start.main(["1"])
    assert "# def word_counts" in (mine / "ex1.py").read_text() and "Leave masking.py closed" in capsys.readouterr().out
    code, said = checked(capsys, 1)
    assert code == 1 and "exercise 1 is not written yet: random_word_mask" in said and "Traceback" not in said
    mine.joinpath("ex4.py").write_text("from losses import itc_targets, positive_pairs")
    code, said = checked(capsys, 4)
    assert code == 0 and "1 passed" in said
    mine.joinpath("ex4.py").write_text("from losses import itc_targets\ndef positive_pairs(*ids): return ids[9]")
    code, said = checked(capsys, 4)
    assert code == 1 and "ex4.py:2: IndexError" in said


def test_two_runs_are_compared(tmp_path, capsys):
    for name, gain in (("a", 0.25), ("b", 0.5)):
        (tmp_path / name).mkdir()
        final = {"step": 2, "final": True, "image_gain": gain, "pointing_game": 1.0}
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1}\n' + json.dumps(final))
    runs = [str(tmp_path / "a"), str(tmp_path / "b")]
    compare.main([*runs, "image_gain"])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "| metric | a | b | difference |" and said[2:] == ["| image_gain | 0.25 | 0.5 | +0.25 |"]
    with pytest.raises(SystemExit, match="speed: not among the metrics of both runs"):
        compare.main([*runs, "speed"])
    (tmp_path / "b" / "metrics.jsonl").write_text('{"step": 1}')
    with pytest.raises(SystemExit, match="the run is not finished"):
        compare.main(runs)
    with pytest.raises(SystemExit, match="no such file"):
        compare.main([runs[0], "/nowhere"])
