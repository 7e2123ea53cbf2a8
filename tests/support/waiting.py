"""Waiting for a condition with a deadline, instead of sleeping and hoping."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
DEADLINE_S = 15.0


def wait_until(condition: Callable[[], T], what: str, deadline_s: float = DEADLINE_S, every_s: float = 0.005) -> T:
    """The first true value of ``condition``. Fails the test when there is none within the deadline. ``every_s``: longer, where to ask is
    dear."""
    end = time.monotonic() + deadline_s
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"waited {deadline_s:g} s in vain until {what}; last: {value!r}")
        time.sleep(every_s)
    return value
