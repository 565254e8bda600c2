"""One profile for the property tests: no time limit on an example, and the same examples every time."""

from hypothesis import settings

settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")
