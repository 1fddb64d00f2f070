"""Where a running trial reads whether it is to go on: an actor of the driver's, gone with the driver."""

from collections.abc import Iterable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class Board:
    """The trials that are to stop. The driver writes it before a trial's report returns, the trial reads it after."""

    def __init__(self) -> None:
        self._stopped: set[str] = set()

    def stop(self, trial_ids: Iterable[str]) -> None:
        """These trials leave their loop at the report they are in."""
        self._stopped.update(trial_ids)

    def goes_on(self, trial_ids: Iterable[str]) -> list[bool]:
        """For each of the trials, in their order."""
        return [trial_id not in self._stopped for trial_id in trial_ids]


def start_board() -> Any:
    """A handle of a new board, on the driver's machine: any other may be lost. Needs an initialised Ray; `ray.kill`
    ends it."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
