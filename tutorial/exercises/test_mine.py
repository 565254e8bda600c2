"""A student's functions against the checks for typical mistakes, then against the project's own tests."""

import pytest
from hypothesis import settings

from tutorial.exercises.catalogue import EXERCISES, Mistake, file_of, run_own_tests, written
from tutorial.exercises.checks import check

settings.register_profile("exercises", deadline=None, derandomize=True, report_multiple_bugs=False)
settings.load_profile("exercises")


@pytest.mark.parametrize("number", [pytest.param(number, id=f"ex{number}") for number in EXERCISES])
def test_mine(number):
    if not file_of(number).exists():
        pytest.skip(f"not begun: python tutorial/exercises/start.py {number} writes the stub")
    try:
        functions = written(number)
        check(number, functions)
    except Mistake as mistake:
        pytest.fail(str(mistake), pytrace=False)
    run_own_tests(number, functions)
