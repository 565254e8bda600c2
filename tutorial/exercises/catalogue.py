"""The eight exercises: the functions to write, the functions to read, and the tests that must pass."""

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
MINE = Path(__file__).parent / "mine"  # the stubs of a student; git ignores them
Functions = dict[str, Callable]


@dataclass(frozen=True)
class Exercise:
    """An exercise, whose solution is in the project.

    module: the project's module that holds the solution
    write: names of the functions to write
    tests: regular expression for names of tests in tests/test_{module}.py, without the leading `test_`
    read: names of functions of the module that the stub imports and shows
    """

    module: str
    write: tuple[str, ...]
    tests: str
    read: tuple[str, ...] = ()

    def solution(self) -> Functions:
        """Return the project's own functions by name."""
        module = importlib.import_module(self.module)
        return {name: getattr(module, name) for name in self.write}


COUNTING = ("first_pieces", "word_counts")
RANKING = ("first_pieces", "word_counts", "patch_count", "topk_mask", "mask_words", "mask_patches")
EXERCISES = {
    1: Exercise("masking", ("random_word_mask",), tests="random_word_mask|all_pieces", read=COUNTING),
    2: Exercise("masking", ("corrupt_words",), tests="corruption|replaced_words"),
    3: Exercise("masking", ("mask_precision", "pointing_game"), tests="cooccurrence_by_hand|pointing_by_hand"),
    4: Exercise("losses", ("positive_pairs", "itc_targets"), tests="itc_targets|what_is_right"),
    5: Exercise("losses", ("pick_negatives",), tests="negatives_are|hard_takes", read=("positive_pairs",)),
    6: Exercise("losses", ("pick_negatives",), tests="semihard"),
    7: Exercise("masking", ("sync_mask",), tests="sync_mask|only_scored|all_pieces", read=RANKING),
    8: Exercise("masking", ("grad_cam", "soft_mask"), tests="soft_mask_equals"),
}


class Mistake(Exception):
    """A mistake of the student; the message says what is wrong and what to do."""


def stub_path(number: int) -> Path:
    """Return the path of the file that the student writes."""
    return MINE / f"ex{number}.py"


def load_functions(number: int) -> Functions:
    """Load the student's functions of an exercise, by name. Raises Mistake where one is missing."""
    path = stub_path(number)
    definitions = runpy.run_path(str(path))
    functions = {}
    for name in EXERCISES[number].write:
        if name not in definitions:
            raise Mistake(f"{path} defines no {name}; define it, or delete the file and run start.py {number}")
        functions[name] = definitions[name]
    return functions


def run_project_tests(number: int, functions: Functions) -> None:
    """Run the project's tests of an exercise on these functions instead of the project's. Raises what a test raises."""
    exercise = EXERCISES[number]
    with mock.patch.multiple(exercise.module, **functions):
        # a fresh copy of the tests, which imports these functions
        definitions = runpy.run_path(str(ROOT / "tests" / f"test_{exercise.module}.py"))
        for name, test in definitions.items():
            if re.match(f"test_.*({exercise.tests})", name):
                test()
