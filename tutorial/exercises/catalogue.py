"""The eight exercises that check themselves: what to write, what to read, which of the project's tests must pass."""

import importlib
import importlib.util
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
    tests/test_{module}.py · read: functions of the module that the stub imports and shows
    modes: the modes of `pick_negatives` to write"""

    module: str
    write: tuple[str, ...]
    tests: str
    read: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()

    def solution(self) -> Functions:
        """The project's own functions."""
        module = importlib.import_module(self.module)
        return {name: getattr(module, name) for name in self.write}


EXERCISES = {
    1: Exercise(
        "masking",
        write=("random_word_mask",),
        read=("which_words", "first_pieces", "word_counts"),
        tests="random_word_mask|all_pieces",
    ),
    2: Exercise("masking", write=("corrupt_words",), tests="corruption|replaced_words"),
    3: Exercise("masking", write=("cooccurrence", "pointing"), tests="cooccurrence_by_hand|pointing_by_hand"),
    4: Exercise("losses", write=("same_pairs", "itc_targets"), tests="itc_targets|what_is_right"),
    5: Exercise(
        "losses",
        write=("pick_negatives",),
        modes=("random", "similar", "hard"),
        read=("same_pairs",),
        tests="negatives_are|hard_takes",
    ),
    6: Exercise("losses", write=("pick_negatives",), modes=("semihard",), tests="negatives_are|semihard"),
    7: Exercise(
        "masking",
        write=("sync_mask",),
        read=("average_attention", "mask_words", "mask_patches", "break_ties"),
        tests="sync_mask|masked_words_are|exact_ties|all_pieces",
    ),
    8: Exercise("masking", write=("grad_cam", "soft_mask"), tests="soft_mask_equals"),
}


class Mistake(Exception):
    """A sentence for the student."""


def file_of(number: int) -> Path:
    """Where the student writes."""
    return MINE / f"ex{number}.py"


def written(number: int) -> Functions:
    """The student's functions. Raises Mistake where one is missing."""
    found = runpy.run_path(str(file_of(number)))
    names = EXERCISES[number].write
    for name in names:
        if name not in found:
            raise Mistake(f"{file_of(number)} defines no {name}; start.py {number} --again writes the stub anew")
    return {name: found[name] for name in names}


def run_own_tests(number: int, functions: Functions) -> list[str]:
    """Run the project's tests of an exercise with these functions in place of the project's own. -> their names"""
    exercise = EXERCISES[number]
    if exercise.modes:
        functions = {"pick_negatives": with_other_modes(exercise, functions["pick_negatives"])}
    with mock.patch.multiple(exercise.module, **functions):
        # a fresh copy of the tests, which imports these functions
        spec = importlib.util.find_spec(f"test_{exercise.module}")
        copy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copy)
        names = [name for name in vars(copy) if re.match(f"test_.*({exercise.tests})", name)]
        for name in names:
            getattr(copy, name)()
    return names


def with_other_modes(exercise: Exercise, mine: Callable) -> Callable:
    """The student's `pick_negatives`, with the project's own in the modes that the exercise does not ask for."""
    own = exercise.solution()["pick_negatives"]

    def pick_negatives(sim, forbidden, mode="similar", generator=None, margin=0.0):
        function = mine if mode in exercise.modes else own
        return function(sim, forbidden, mode, generator, margin)

    return pick_negatives
