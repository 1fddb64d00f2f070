"""Supervisor: a parent of the driver that ends all processes of the job when the driver has ended in any way.

kill -9 of a driver would leave its command running, which would write next to the following attempt. The supervisor
only waits, so that little can end it; if it is killed, the kernel signals the driver to end.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

import psutil

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
GONE_S = 5.0


def run_supervised(drive: Callable[[], int]) -> int:
    """Run the driver in a fork, then end everything below it. Its exit code, or 128 and the signal that ended it.

    Call it before there is a thread. SIGTERM and SIGINT are passed on. Orphans become children of the supervisor
    (Linux), so that it finds those that left their session or their parents too.
    """
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    supervisor = os.getpid()
    driver = os.fork()
    if driver == 0:
        _prctl(PR_SET_CHILD_SUBREAPER, 0)
        _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != supervisor:  # it ended before the kernel had the signal
            os._exit(1)
        sys.exit(drive())

    def pass_on(number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(driver, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    pid = 0
    while pid != driver:  # orphans that end meanwhile are taken off the process table
        pid, status = os.wait()
    end_all(lambda: psutil.Process().children(recursive=True))
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def end_all(find: Callable[[], list[psutil.Process]], within_s: float = GONE_S) -> list[psutil.Process]:
    """Kill what `find` finds until it finds nothing more; what is left after the time."""
    end = time.monotonic() + within_s
    while (left := [process for process in find() if _is_alive(process)]) and time.monotonic() < end:
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=0.2)
    return left


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _prctl(option: int, value: int) -> None:
    """No-op where the kernel is not Linux: there the command outlives a driver that is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
