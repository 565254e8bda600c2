"""Check the functions of a student: first for typical mistakes, then by the project's own tests."""

import pytest
from hypothesis import settings

from tutorial.exercises.catalogue import EXERCISES, Mistake, load_functions, run_project_tests, stub_path
from tutorial.exercises.checks import check

settings.register_profile("exercises", deadline=None, derandomize=True, report_multiple_bugs=False)
settings.load_profile("exercises")


@pytest.mark.parametrize("number", [pytest.param(number, id=f"ex{number}") for number in EXERCISES])
def test_mine(number):
    """Check the functions of one exercise, where its stub has been begun."""
    if not stub_path(number).exists():
        pytest.skip(f"not begun; python tutorial/exercises/start.py {number} writes the stub")
    message = None
    try:
        functions = load_functions(number)
        check(number, functions)
    except Mistake as mistake:
        message = str(mistake)
    if message:  # here, since pytest would print it twice from inside `except`
        pytest.fail(message, pytrace=False)
    run_project_tests(number, functions)
