"""Waits for a state that other processes or threads bring about."""

import subprocess
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(
    reached: Callable[[], T | None],
    what: object = "the state was not reached",
    driver: "subprocess.Popen[str] | None" = None,
    *,
    within_s: float = 60,
    pause_s: float = 0.02,
) -> T:
    """Return the first true value of `reached`; fail with `what`, or what it returns, after `within_s`.

    Fail as well once `driver`, a process that brings the state about, has ended without it.
    """
    end = time.monotonic() + within_s
    while not (found := reached()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {within_s:g} s: {what() if callable(what) else what}")
        if driver is not None and driver.poll() is not None and not reached():
            raise AssertionError(f"{what}: the driver ended with {driver.returncode}: {driver.communicate()[0]}")
        time.sleep(pause_s)
    return found
