"""The eight exercises that check themselves.

For each: the functions to write, the project's own tests that they have to pass; and how one is put in the place of the
other.
"""

import contextlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
MINE = Path(__file__).parent / "mine"  # what a student writes; git ignores it
Functions = dict[str, Callable]


@dataclass(frozen=True)
class Exercise:
    """solves: the functions to write, as module.name, which is where their solution stands · tests: the project's own,
    as file:pattern of names · modes: of pick_negatives, those that are asked for · reads: what is to be read first and
    stands near the solution, as module.name; the stub shows it"""

    solves: tuple[str, ...]
    tests: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()

    @property
    def solution(self) -> Functions:
        """The project's own functions."""
        return named(self.solves)


def named(paths: tuple[str, ...]) -> Functions:
    """The project's functions at module.name, by name."""
    parts = (path.rsplit(".", 1) for path in paths)
    return {name: getattr(importlib.import_module(module), name) for module, name in parts}


HELPERS = {
    1: "from masking import first_pieces, word_counts",
    5: "from losses import NegativeMode",
    6: "from losses import NegativeMode",
    7: "from masking import break_ties, mask_patches, mask_words",
}
EXERCISES = {
    1: Exercise(("masking.random_word_mask",), ("test_masking:random_word_mask|all_pieces",),
                reads=("masking.which_words", "masking.first_pieces", "masking.word_counts")),
    2: Exercise(("masking.corrupt_words",), ("test_masking:corruption|replaced_words",)),
    3: Exercise(("masking.cooccurrence", "masking.pointing"), ("test_masking:(cooccurrence|pointing)_by_hand",)),
    4: Exercise(("losses.same_pairs", "losses.itc_targets"), ("test_losses:itc_targets|what_is_right",)),
    5: Exercise(("losses.pick_negatives",), ("test_losses:negatives_are|hard_takes",), ("random", "similar", "hard"),
                reads=("losses.same_pairs",)),
    6: Exercise(("losses.pick_negatives",), ("test_losses:negatives_are|semihard",), ("semihard",)),
    7: Exercise(("masking.sync_mask",), ("test_masking:sync_mask|masked_words_are|exact_ties|all_pieces",),
                reads=("masking.average_attention", "masking.mask_words", "masking.mask_patches",
                       "masking.break_ties")),
    8: Exercise(("masking.grad_cam", "masking.soft_mask"), ("test_masking:soft_mask_equals",)),
}  # fmt: skip


class Mistake(Exception):
    """A sentence for the student, which the run ends with."""


def file_of(number: int) -> Path:
    """Where the student writes."""
    return MINE / f"ex{number}.py"


def written(number: int) -> Functions:
    """The student's functions. Raises Mistake, in one line, where there are none that Python can read."""
    path = file_of(number)
    if not path.exists():
        raise Mistake(f"exercise {number} is not begun: python tutorial/exercises/start.py {number} writes its stub")
    spec = importlib.util.spec_from_file_location(f"mine_ex{number}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise Mistake(f"{path}, line {error.lineno}: {error.msg}") from None
    except Exception as error:
        raise Mistake(f"{path}: {type(error).__name__}: {error}") from None
    names = [name.rsplit(".", 1)[1] for name in EXERCISES[number].solves]
    if missing := [name for name in names if not hasattr(module, name)]:
        raise Mistake(f"{path} defines no {missing[0]}; start.py {number} --again writes the stub anew")
    if number == 1 and hasattr(module, "mask_words"):
        raise Mistake(f"{path}: mask_words is the whole solution; write what it does yourself")
    return {name: getattr(module, name) for name in names}


@contextlib.contextmanager
def in_place(number: int, functions: Functions) -> Iterator[None]:
    """With these functions in place of the project's own."""
    exercise, before = EXERCISES[number], {}
    try:
        for path in exercise.solves:
            module, name = path.rsplit(".", 1)
            module = importlib.import_module(module)
            before[module, name] = getattr(module, name)
            setattr(module, name, functions[name])
        yield
    finally:
        for (module, name), function in before.items():
            setattr(module, name, function)


def usable(number: int, functions: Functions) -> Functions:
    """The functions, with the modes of `pick_negatives` that this exercise does not ask for as they are."""
    if not (modes := EXERCISES[number].modes):
        return functions
    mine, real = functions["pick_negatives"], EXERCISES[number].solution["pick_negatives"]

    @wraps(real)
    def pick_negatives(sim, forbidden, positive_sim=None, mode="similar", generator=None, margin=0.0):
        chosen = mine if mode in modes else real
        return chosen(sim, forbidden, positive_sim, mode, generator, margin)

    return {"pick_negatives": pick_negatives}


def own_tests(number: int, functions: Functions) -> dict[str, Callable[[], None]]:
    """The project's tests of an exercise, from fresh copies of their files that have imported these functions."""
    found = {}
    with in_place(number, functions):
        for file, pattern in (tests.split(":") for tests in EXERCISES[number].tests):
            kept = sys.modules.pop(file, None)
            copy = importlib.import_module(file)
            sys.modules.pop(file)
            sys.modules.update({file: kept} if kept else {})
            names = [name for name in vars(copy) if name.startswith("test_") and re.search(pattern, name)]
            found |= {name: getattr(copy, name) for name in names}
    return found
