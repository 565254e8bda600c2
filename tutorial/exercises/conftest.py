"""python -m pytest tutorial/exercises -k exN: of each exercise that is begun its first failure, in words."""

import re

import pytest
from hypothesis import settings

from tutorial.exercises.catalogue import EXERCISES, Mistake, file_of, written

settings.register_profile("project", deadline=None, derandomize=True, report_multiple_bugs=False)
settings.load_profile("project")


def pytest_configure(config):
    """Say in one line what to do where there is nothing to check."""
    asked = re.fullmatch(r"ex(\d+)", config.option.keyword)
    numbers = [int(asked[1])] if asked else [number for number in EXERCISES if file_of(number).exists()] or [1]
    if numbers[0] not in EXERCISES:
        raise pytest.UsageError(f"-k ex{numbers[0]}: the exercises are 1 to {len(EXERCISES)}")
    try:
        config.exercises = {number: written(number) for number in numbers}
    except Mistake as mistake:
        raise pytest.UsageError(str(mistake)) from None
    if config.option.verbose < 1:  # with -v pytest says all that it has to say
        config.option.verbose, config.option.tbstyle, config.option.reportchars = -1, "no", ""


def pytest_terminal_summary(terminalreporter):
    if terminalreporter.config.option.tbstyle == "no":
        for report in terminalreporter.stats.get("failed", []):
            terminalreporter.write_line(report.longrepr.reprcrash.message.removeprefix("Failed: "))
