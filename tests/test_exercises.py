"""Exercises: solutions pass, stubs fail, mistakes fail with what is wrong; the command lines."""

import inspect
import json
import sys
from pathlib import Path

import pytest

from tutorial.exercises import catalogue, compare, start
from tutorial.exercises.catalogue import EXERCISES, Mistake, run_own_tests, written
from tutorial.exercises.checks import check

HERE = Path(catalogue.__file__).parent
OWN_TESTS = {1: 2, 2: 2, 3: 2, 4: 2, 5: 2, 6: 1, 7: 3, 8: 1}  # of the project's tests, how many
RANKED = "return mask_words(scores, words, ratio)"
MASKED_LOGITS = """logits = logits.masked_fill(forbidden & possible[:, None], -torch.inf)
        chosen = torch.multinomial(logits.softmax(dim=1), 1"""
PLACES = "torch.arange(1, words.shape[1] + 1).expand_as(words)"
ONE_ARGSORT = """scores = scores.masked_fill(~first_pieces(words), -1)
    first = (scores.argsort(dim=1, descending=True) < word_counts(words, ratio)) & first_pieces(words)
    return first.gather(1, (words - 1).clamp(min=0)) & (words > 0)"""
IN_TOKENS = """topk_mask(
        break_ties(scores, generator), words > 0,
        ((words > 0).sum(1, keepdim=True) * max(pool, word_ratio)).round().minimum((words > 0).sum(1, keepdim=True)))"""
DRAWN = "chosen = torch.multinomial(logits.softmax(dim=1) * ~forbidden, 1"
# exercise, function, what of it becomes what, the message
MISTAKES = [
    (1, "random_word_mask", {RANKED: "return (scores < ratio).gather(1, (words - 1).clamp(min=0)) & (words > 0)"}, "no coin for each word"),
    (1, "random_word_mask", {RANKED: f"return mask_words(scores, {PLACES}, ratio)"}, r"no words, where `words` is 0: \[CLS\]"),
    (1, "random_word_mask", {RANKED: f"return mask_words(scores, {PLACES} * (words > 0), ratio)"}, r"count words \(`word_counts`\), not tokens|one piece"),
    (1, "random_word_mask", {RANKED: "return mask_words(scores[:1].expand(words.shape), words, ratio)"}, "the same random numbers"),
    (1, "random_word_mask", {RANKED: ONE_ARGSORT}, "or one argsort"),
    (2, "corrupt_words", {"token_ids.masked_fill(~mask, -100)": "token_ids"}, "words that are not masked have labels"),
    (2, "corrupt_words", {"dice < 0.8": "dice < 1"}, r"become \[MASK\] and 0% stay"),
    (2, "corrupt_words", {"token_ids.masked_fill(mask": "token_ids.masked_fill_(mask"}, "token_ids itself is written into"),
    (3, "cooccurrence", {"mask & candidates": "mask"}, "only masked candidates count"),
    (3, "cooccurrence", {"(masked & shared).sum(), masked.sum()": "(masked & shared).sum() / masked.sum()"}, "two counts"),
    (3, "pointing", {"by_chance[words].sum()": "words.sum() / regions.shape[2]"}, "as often as the region is large"),
    (4, "same_pairs", {"same_product | same_caption": "same_product"}, "same caption to the letter counts as wrong"),
    (4, "same_pairs", {"product_ids[:, None] == key_product_ids": "torch.eye(len(product_ids), len(key_product_ids)) > 0"}, "second image of a product counts as wrong"),
    (4, "itc_targets", {"right / right.sum(dim=1, keepdim=True)": "right"}, "sum to 2.0, not to 1"),
    (4, "itc_targets", {"right / right.sum(dim=1, keepdim=True)": "torch.eye(*right.shape)"}, "right answers share"),
    (4, "itc_targets", {"return alpha * ": "return (1 - alpha) * ", "+ (1 - alpha) *": "+ alpha *"}, "alpha is the share of softmax"),
    (5, "pick_negatives", {MASKED_LOGITS: DRAWN}, "Mask the logits before the softmax"),
    (5, "pick_negatives", {"logits = sim if": "logits = -sim if"}, r"not drawn ∝ exp\(sim\)"),
    (5, "pick_negatives", {", generator=generator": ""}, "one generator, two draws"),
    (5, "pick_negatives", {"masked_fill(forbidden, -torch.inf)": "masked_fill(forbidden, 0)"}, "hard: a pair itself, .* −∞ where forbidden"),
    (5, "pick_negatives", {' if mode == "similar" else torch.zeros_like(sim)': ""}, "random always draws the same"),
    (5, "pick_negatives", {'sim if mode == "similar" else ': ""}, r"not drawn ∝ exp\(sim\)"),
    (5, "pick_negatives", {"sim.masked_fill(forbidden, -": "sim.masked_fill_(forbidden, -"}, "sim itself is written into"),
    (5, "pick_negatives", {MASKED_LOGITS: DRAWN.replace("forbidden", "forbidden + 1e-9")}, "pair itself, or another forbidden one, is drawn"),
    (5, "pick_negatives", {"forbidden & possible[:, None]": "forbidden & False", "masked_fill(forbidden, ": "masked_fill(forbidden & False, "}, "a pair itself, or another"),
    (5, "pick_negatives", {"torch.where(possible, chosen, -1)": "chosen"}, "the answer is −1"),
    (5, "pick_negatives", {"forbidden & possible[:, None]": "forbidden"}, "Keep the logits finite"),
    (6, "pick_negatives", {"[:, None] - margin": "[:, None] + margin"}, "margin is on the wrong side"),
    (6, "pick_negatives", {"sim < sim.diag": "sim > sim.diag"}, "more similar than the own pair"),
    (6, "pick_negatives", {"torch.inf).argmin": "-torch.inf).argmax"}, "then the least similar one"),
    (6, "pick_negatives", {"~below, -torch.inf).argmax": "~below, torch.inf).argmin"}, "is the easiest"),
    (7, "sync_mask", {"break_ties(scores, generator)": "break_ties(-scores, generator)"}, "the lowest scores are masked"),
    (7, "sync_mask", {"word_mask = mask_words(best + draws, words, word_ratio)": f"word_mask = mask_words(best + draws, {PLACES}, word_ratio)"}, r"no words, where `words` is 0: \[CLS\]"),
    (7, "sync_mask", {"attention * word_mask[..., None]": "attention * (words > 0)[..., None]"}, "rows of other words"),
    (7, "sync_mask", {"attention * word_mask[..., None]": "attention"}, "highest mean attention of the words just masked"),
    (7, "sync_mask", {".clamp(min=1)": ""}, "a caption without a word has always the same patches"),
    (7, "sync_mask", {"break_ties(patch_scores, generator)": "-patch_scores"}, "other patches are masked than"),
    (7, "sync_mask", {"break_ties(patch_scores, generator)": "patch_scores"}, "always the same patches: `break_ties`"),
    (7, "sync_mask", {"break_ties(scores, generator)": "scores"}, "always the same word: `break_ties`"),
    (7, "sync_mask", {"mask_words(best + draws": "mask_words(draws"}, "not of all words"),
    (7, "sync_mask", {"max(pool, word_ratio)": "word_ratio"}, "the pool is ignored"),
    (7, "sync_mask", {"max(pool, word_ratio)": "pool"}, r"the best max\(pool, word_ratio\)"),
    (7, "sync_mask", {"mask_words(break_ties(scores, generator), words, max(pool, word_ratio))": IN_TOKENS}, "not of the tokens"),
    (7, "sync_mask", {"mask_words(best + draws, words, word_ratio)": "topk_mask(best + draws, words > 0, word_counts(words, word_ratio))"}, "one piece of a word"),
    (8, "grad_cam", {"gradient.clamp(min=0)": "gradient"}, "the ReLU of Grad-CAM"),
    (8, "grad_cam", {"attention * ": ""}, "the attention itself is a factor"),
    (8, "grad_cam", {", retain_graph=True": ""}, "still need the graph"),
    (8, "grad_cam", {".detach()": ""}, "nothing is learnt through a soft mask"),
    (8, "soft_mask", {"word_index, 1:]": "word_index]"}, "without the image CLS"),
    (8, "soft_mask", {"word_index, 1:]": "0, 1:]"}, "the row of the word counts"),
    (8, "soft_mask", {"heat.amax(dim=1, keepdim=True)": "heat.amax()"}, "a most of its own"),
]  # fmt: skip


def mistaken(number, name, edits):
    """The solution of an exercise with something of one function changed."""
    functions = EXERCISES[number].solution()
    source = inspect.getsource(functions[name])
    for right, wrong in edits.items():
        assert right in source, right
        source = source.replace(right, wrong)
    module = dict(vars(inspect.getmodule(functions[name])))
    exec(source, module)
    return functions | {name: module[name]}


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A student's folder."""
    monkeypatch.setattr(catalogue, "MINE", tmp_path / "mine")
    return tmp_path / "mine"


@pytest.mark.parametrize("number", EXERCISES)
def test_solutions_pass_and_stubs_fail(number, mine, capsys):
    solution = EXERCISES[number].solution()
    check(number, solution)
    assert len(run_own_tests(number, solution)) == OWN_TESTS[number]
    start.main([str(number)])
    assert f"ex{number}.py: write {', '.join(solution)}; then python -m pytest" in capsys.readouterr().out
    stub = written(number)
    assert all(inspect.getdoc(stub[name]) == inspect.getdoc(solution[name]) for name in stub)
    with pytest.raises(Mistake, match=f"exercise {number} is not written yet"):
        check(number, stub)


@pytest.mark.parametrize("number, name, edits, message", MISTAKES, ids=[f"{m[0]}-{m[3][:30]}" for m in MISTAKES])
def test_mistakes_are_told_in_words(number, name, edits, message):
    with pytest.raises(Mistake, match=message):
        check(number, mistaken(number, name, edits))


@pytest.mark.parametrize("number", [number for number in EXERCISES if number != 8])  # whose test is of soft_mask alone
def test_the_projects_own_tests_are_run_against_the_students_function(number):
    name, edits = next(mistake[1:3] for mistake in MISTAKES if mistake[0] == number)
    before = EXERCISES[number].solution()
    with pytest.raises((AssertionError, RuntimeError)):
        run_own_tests(number, mistaken(number, name, edits))
    assert EXERCISES[number].solution() == before


def test_stubs_are_not_overwritten_and_hints_go_from_the_idea_to_the_place(mine, capsys):
    start.main(["5"])
    (mine / "ex5.py").write_text("mine = 1")
    with pytest.raises(SystemExit, match="is there already; --again writes the stub over it"):
        start.main(["5"])
    assert (mine / "ex5.py").read_text() == "mine = 1"
    with pytest.raises(Mistake, match="defines no pick_negatives"):
        written(5)
    start.main(["5", "--again"])
    assert "raise NotImplementedError" in (mine / "ex5.py").read_text()
    hints = set()
    for number, exercise in EXERCISES.items():
        for level in (1, 2, 3):
            capsys.readouterr()
            start.main([str(number), "--hint", str(level)])
            said = capsys.readouterr().out
            hints.add(said)
            assert said.startswith(f"## {number}.{level} ") and len(said) > 80
        assert all(name in said for name in exercise.write)
    assert len(hints) == 3 * len(EXERCISES)


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
    mine.joinpath("ex4.py").write_text("from losses import itc_targets, same_pairs")
    code, said = checked(capsys, 4)
    assert code == 0 and "1 passed" in said
    mine.joinpath("ex4.py").write_text("from losses import itc_targets\nsame_pairs = lambda *ids: ids[9]")
    code, said = checked(capsys, 4)
    assert code == 1 and "ex4.py:2: IndexError" in said


def test_two_runs_are_compared(tmp_path, capsys):
    for name, gain in (("a", 0.25), ("b", 0.5)):
        (tmp_path / name).mkdir()
        lines = {"step": 1}, {"step": 2, "final": True, "photo_gain": gain, "pointing": 1.0}
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    runs = [str(tmp_path / "a"), str(tmp_path / "b")]
    compare.main([*runs, "photo_gain"])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "| metric | a | b | difference |" and said[2:] == ["| photo_gain | 0.25 | 0.5 | +0.25 |"]
    with pytest.raises(SystemExit, match="speed: not among the metrics of both runs"):
        compare.main([*runs, "speed"])
    (tmp_path / "b" / "metrics.jsonl").write_text('{"step": 1}')
    with pytest.raises(SystemExit, match="the run is not finished"):
        compare.main(runs)
    with pytest.raises(SystemExit, match="No such file"):
        compare.main([runs[0], "/nowhere"])
