"""A student's functions against the checks for typical mistakes, then against the project's own tests."""

import traceback
from pathlib import Path

import pytest

from tutorial.exercises import catalogue
from tutorial.exercises.catalogue import ROOT, Mistake, in_place, own_tests, usable
from tutorial.exercises.checks import check


def pytest_generate_tests(metafunc):
    """The exercises that are asked for (see conftest.py)."""
    numbers = metafunc.config.exercises
    metafunc.parametrize("number", numbers, ids=[f"ex{number}" for number in numbers])


def test_mine(number, request):
    """An exercise's typical mistakes first, then the project's tests; the first failure is told."""
    functions = usable(number, request.config.exercises[number])
    tests = {"typical_mistakes": lambda: check(number, functions)} | own_tests(number, functions)
    with in_place(number, functions):
        for name, test in tests.items():
            try:
                test()
                continue
            except Mistake as mistake:
                said = mistake
            except Exception as error:
                if request.config.option.verbose > 0:
                    raise
                said = shortly(name, error)
            pytest.fail(f"ex{number}: {said}", pytrace=False)


def shortly(name: str, error: Exception) -> str:
    """The line of the student, or of the project's test, at which a test ended, and the first line of what was said."""
    frames = traceback.extract_tb(error.__traceback__)
    at = [frame for frame in frames if Path(frame.filename).parent in (catalogue.MINE, ROOT / "tests")] or frames
    place, said = at[-1], (str(error).strip() or "false").splitlines()[0]
    lines = [f"{name}: {Path(place.filename).parent.name}/{Path(place.filename).name}, line {place.lineno}:",
             f"    {place.line}", f"{type(error).__name__}: {said}"]  # fmt: skip
    return "\n".join([*lines, *getattr(error, "__notes__", []), "(-v: the whole traceback)"])
