"""Settings that all tests share."""

from hypothesis import settings

# The same examples at every run: a failure seen once is seen again. No deadline: a shared machine may pause a test.
settings.register_profile("papercore", derandomize=True, deadline=None)
settings.load_profile("papercore")
