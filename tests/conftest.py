"""Settings that all tests share."""

import signal

from hypothesis import settings

# The same examples at every run: a failure seen once is seen again. No deadline: a shared machine may pause a test.
settings.register_profile("papercore", derandomize=True, deadline=None)
settings.load_profile("papercore")

# A shell starts background jobs with Ctrl-C ignored, and their children inherit that: the programs that tests interrupt too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
