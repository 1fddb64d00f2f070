"""Word that a worker's machine is about to be taken away: its node is drained, or the worker gets SIGTERM.

Imported by `fit` on workers and in the driver when a run starts, since it imports ray.train.
"""

import signal
import threading
from types import FrameType

from graftwork.compat.ray_train import node_is_draining

_told = threading.Event()


def take_notice() -> None:
    """Make this worker's first SIGTERM a notice; the second one ends the worker, as without this.

    Called on the worker's main thread, the only one that may set handlers; the training runs in another.
    """
    before = signal.getsignal(signal.SIGTERM)

    def note(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, before)
        _told.set()

    signal.signal(signal.SIGTERM, note)


def preemption_requested() -> bool:
    """Whether this worker has been told. Called in the training thread."""
    return _told.is_set() or node_is_draining()
