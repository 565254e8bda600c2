"""The eight exercises that check themselves: what to write, what to read, which of the project's tests must pass."""

import importlib
import re
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
MINE = Path(__file__).parent / "mine"  # what a student writes; git ignores it
Functions = dict[str, Callable]


@dataclass(frozen=True)
class Exercise:
    """module: where the solution stands · write: the functions to write · tests: a pattern of names in
    tests/test_{module}.py · read: functions of the module that the stub imports and shows"""

    module: str
    write: tuple[str, ...]
    tests: str
    read: tuple[str, ...] = ()

    def solution(self) -> Functions:
        """The project's own functions."""
        module = importlib.import_module(self.module)
        return {name: getattr(module, name) for name in self.write}


COUNTING = ("maskable_words", "first_pieces", "word_counts")
RANKING = ("average_attention", "mask_words", "mask_patches", "break_ties")
EXERCISES = {
    1: Exercise("masking", ("random_word_mask",), tests="random_word_mask|all_pieces", read=COUNTING),
    2: Exercise("masking", ("corrupt_words",), tests="corruption|replaced_words"),
    3: Exercise("masking", ("mask_precision", "pointing_game"), tests="cooccurrence_by_hand|pointing_by_hand"),
    4: Exercise("losses", ("positive_pairs", "itc_targets"), tests="itc_targets|what_is_right"),
    5: Exercise("losses", ("pick_negatives",), tests="negatives_are|hard_takes", read=("positive_pairs",)),
    6: Exercise("losses", ("pick_negatives",), tests="semihard"),
    7: Exercise("masking", ("sync_mask",), tests="sync_mask|masked_words_are|all_pieces", read=RANKING),
    8: Exercise("masking", ("grad_cam", "soft_mask"), tests="soft_mask_equals"),
}


class Mistake(Exception):
    """A sentence for the student."""


def file_of(number: int) -> Path:
    """Where the student writes."""
    return MINE / f"ex{number}.py"


def written(number: int) -> Functions:
    """The student's functions. Raises Mistake where one is missing."""
    found = runpy.run_path(str(file_of(number)))
    functions = {}
    for name in EXERCISES[number].write:
        if name not in found:
            raise Mistake(f"{file_of(number)} defines no {name}")
        functions[name] = found[name]
    return functions


def run_own_tests(number: int, functions: Functions) -> None:
    """Run the project's tests of an exercise with these functions in place of the project's own."""
    exercise = EXERCISES[number]
    with mock.patch.multiple(exercise.module, **functions):
        # a fresh copy of the tests, which imports these functions
        copy = runpy.run_path(str(ROOT / "tests" / f"test_{exercise.module}.py"))
        for name, test in copy.items():
            if re.match(f"test_.*({exercise.tests})", name):
                test()
