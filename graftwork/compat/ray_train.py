"""Hooks into Ray Train: its controller's helpers, Ctrl-C, the start of a worker and a node's drain notice.

Checked with Ray 2.60. Imports ray.train: only the module that starts Ray Train and its workers import this one.
"""

from collections.abc import Callable
from typing import Any

from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import WorkerCallback
from ray.train.v2._internal.execution.context import get_train_context

from graftwork.compat.ray import has_dashboard


class AtWorkerStart(WorkerCallback):  # type: ignore[misc]  # Ray's internals have no types
    """Calls a function of a module in each worker before its process group is made, on the main thread.

    For what the process group reads (the network interface) and for signal handlers, which the main thread alone may
    set; `train_loop_per_worker` runs later and in another thread. `RunConfig.callbacks` takes it. Upstream:
    `ray.train.v2._internal.execution.callback.WorkerCallback.after_init_train_context`.
    """

    def __init__(self, start: Callable[[], None]) -> None:
        self.start = start

    def after_init_train_context(self) -> None:
        """Call the function."""
        self.start()


def node_is_draining() -> bool:
    """Return whether Ray has announced to this worker that its node goes away. Asked in a worker, each step.

    `ray.train.get_preemption_info`, the public function, costs a round trip of all workers per call. Upstream:
    `get_train_context().preemption_context.preemption_info`, None until the notice.
    """
    return get_train_context().preemption_context.preemption_info is not None


def workers_did_not_start(error: Exception) -> bool:
    """Return whether Ray Train gave up starting workers: a machine is gone, or went while they started.

    `error` is what `fit` raised; a ControllerError has the cause as `controller_failure`. Upstream:
    `WorkerGroupStartupFailedError` and `WorkerGroupStartupTimeoutError` of `ray.train.v2._internal.exceptions`.
    """
    cause = getattr(error, "controller_failure", None)
    return isinstance(cause, WorkerGroupStartupFailedError | WorkerGroupStartupTimeoutError)


def on_controller(trainer: Any, use: Callable[[Any], None]) -> None:
    """Give the controller's handle to `use` when `fit` has started it, in place of Ray Train's Ctrl-C handler.

    That handler ends the process with exit code 0. Without it Ctrl-C raises KeyboardInterrupt, and `abort` of the
    handle gives the workers up. `fit` calls it in the main thread only. Upstream:
    `DataParallelTrainer._register_sigint_handler(controller)`.
    """
    trainer._register_sigint_handler = use


def without_idle_helpers(trainer: Any) -> None:
    """Leave out the helper processes of Ray Train that have nothing to do; each takes about 2 CPU s.

    The dataset manager: rows come with the job, not through Ray Data. The placement group's cleaner, where this Ray
    has no dashboard: the cleaner asks the dashboard for the controller's state, and delays the run's end. Upstream:
    `DataParallelTrainer._create_default_callbacks()` and the two callback classes.
    """
    idle: tuple[type, ...] = (DatasetsCallback,)
    if not has_dashboard():
        idle += (PlacementGroupCleanerCallback,)
    made = trainer._create_default_callbacks
    trainer._create_default_callbacks = lambda: [one for one in made() if not isinstance(one, idle)]
