"""A student's functions against the checks for typical mistakes, then against the project's own tests."""

import pytest

from study.exercises.catalogue import Mistake, in_place, own_tests, usable
from study.exercises.checks import check


def pytest_generate_tests(metafunc):
    """One item for each test of an exercise that is asked for (see conftest.py)."""
    cases = {}
    for number, functions in metafunc.config.exercises.items():
        functions = usable(number, functions)
        tests = {"typical_mistakes": lambda number=number, functions=functions: check(number, functions)}
        for name, test in (tests | own_tests(number, functions)).items():
            cases[f"ex{number}-{name.removeprefix('test_')}"] = number, functions, test
    metafunc.parametrize("number, functions, test", cases.values(), ids=cases.keys())


def test_mine(number, functions, test):
    said = None
    with in_place(number, functions):
        try:
            test()
        except Mistake as mistake:
            said = str(mistake)
    if said:
        pytest.fail(said, pytrace=False)
