"""Where a running trial reads whether it is to go on, and says what it holds: an actor that goes with the driver."""

from collections.abc import Iterable
from typing import Any

import ray
from ray import PlacementGroupID
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class TrialControlActor:
    """The trials that are to stop. The driver writes it before a trial's report returns, the trial reads it after."""

    def __init__(self) -> None:
        self._stopped: set[str] = set()
        self._held: dict[str, str] = {}

    def stop(self, trial_ids: Iterable[str]) -> None:
        """These trials leave their loop at the report they are in."""
        self._stopped.update(trial_ids)

    def goes_on(self, trial_ids: Iterable[str]) -> list[bool]:
        """For each of the trials, in their order."""
        return [trial_id not in self._stopped for trial_id in trial_ids]

    def hold(self, trial_id: str, group: str) -> None:
        """The workers of a gang say in which placement group they are: Ray (2.60) keeps it when the process that
        started them is killed, and Ray Train's own cleaner needs a dashboard to see that."""
        self._held[trial_id] = group

    def release(self, trial_id: str) -> str | None:
        """The group that a trial held, told once; the driver frees it when the trial's process was lost."""
        return self._held.pop(trial_id, None)


def free(board: Any, trial_id: str) -> None:
    """Give back what a gang held whose process is gone, its workers with it. Nothing happens for any other trial."""
    group = ray.get(board.release.remote(trial_id))
    if group is not None:
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))


def start_trial_control() -> Any:
    """A handle of a new board, on the driver's machine: any other may be lost. Needs an initialised Ray; `ray.kill`
    ends it."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(TrialControlActor).remote()
