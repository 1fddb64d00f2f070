"""Word that a worker's machine is about to be taken away: its node is drained, or the worker gets SIGTERM.

Imported by `fit` on workers and in the driver when a run starts, since it imports ray.train (Ray 2.60: the hook is
internal, and `get_preemption_info`, which is public, costs a round trip of all workers a call).
"""

import signal
import threading
from types import FrameType

from ray.train.v2._internal.execution.callback import WorkerCallback
from ray.train.v2._internal.execution.context import get_train_context

_told = threading.Event()


class TakesNotice(WorkerCallback):  # type: ignore[misc]  # Ray's internals have no types
    """Makes a worker's first SIGTERM a notice; the second one ends it, as without this."""

    def after_init_train_context(self) -> None:
        """On the worker's main thread, the only one that may set handlers; the training runs in another."""
        before = signal.getsignal(signal.SIGTERM)

        def note(_number: int, _frame: FrameType | None) -> None:
            signal.signal(signal.SIGTERM, before)
            _told.set()

        signal.signal(signal.SIGTERM, note)


def leaving() -> bool:
    """Whether this worker has been told. Called in the training thread."""
    return _told.is_set() or get_train_context().preemption_context.preemption_info is not None
