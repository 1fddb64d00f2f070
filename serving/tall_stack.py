"""Calls that recurse deeply in foreign code, which ends the whole process where its stack does."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")
STACK_BYTES = 512 * 2**20
"""Address space; only what is touched becomes memory."""
_starting = threading.Lock()


def on_tall_stack(call: Callable[[], T]) -> T:
    """What `call` returns or raises, run in a thread of its own. Blocks. About 0.1 ms."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # top of the thread: the caller gets whatever it was
            future.set_exception(error)

    thread = threading.Thread(target=run, name="tall-stack", daemon=True)
    with _starting:  # the size is a setting of the process that threads take at their start
        usual = threading.stack_size(STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(usual)
    return future.result()
