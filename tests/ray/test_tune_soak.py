"""Many small trials on two processes: nothing idles, nothing is left."""

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from ray._private.state import actors

from graftwork.cluster.session import Session
from graftwork.tuning.run import tune
from graftwork.tuning.trials import TrialRecord, TuneProgress
from tests.ray.test_tune import GOOD, inputs, rates, sweep
from tests.ray.test_tune_resources import cpus_are_free, groups, trial_processes
from tests.waiting import until

__all__ = ["inputs"]

MIB = 2**20
PROCESSES = 2
IDLE_S = 10.0
"""Longest time that a process may have nothing to do while trials are left."""
DRIVER_MIB = 0.5
"""A trial's record, and what Tune keeps of it in the driver."""


@dataclass
class Watched:
    """What the driver's process takes, as trials end."""

    rss: dict[int, int] = field(default_factory=dict)
    """By the number of trials that have ended."""

    def see(self, progress: TuneProgress) -> None:
        self.rss[progress.done] = psutil.Process().memory_info().rss


def many(count: int) -> list[float]:
    """The first rate, of the grid's middle, teaches, the others hardly."""
    rest = [1e-7 * (1 + number / 1000) for number in range(count - 1)]
    middle = (count - 1) // 2
    return [*rest[:middle], GOOD, *rest[middle:]]


def longest_wait_s(trials: Sequence[TrialRecord]) -> float:
    """Of a process for its next trial, between the end of one and the start of another, while trials were left."""
    ends = sorted(trial.started_s + trial.wall_s for trial in trials)
    starts = sorted(trial.started_s for trial in trials)[PROCESSES:]
    return max(start - end for start, end in zip(starts, ends, strict=False))


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("count", [50, 200])
def test_many_trials_neither_stall_nor_leak(ray_cluster: Session, inputs: Path, tmp_path: Path, count: int) -> None:
    """Of 50 all but the first are stopped at their first rung; 200 run to their end, one step long."""
    early = {"steps": 4, "report_every": 2, "scheduler": {"grace_steps": 2, "reduction": 64}}
    short = {"steps": 1, "report_every": 1, "scheduler": None}
    spec = sweep(
        inputs,
        tmp_path,
        rates(*many(count)),
        num_trials=count,
        max_concurrent=PROCESSES,
        **(early if count == 50 else short),
    )
    watched, before, shm = Watched(), threading.active_count(), len(os.listdir("/dev/shm"))
    began = time.monotonic()
    report = tune(spec, on_progress=watched.see)
    took = time.monotonic() - began
    states = [trial.state for trial in report.trials]
    assert len(states) == count
    assert states.count("stopped") >= count - PROCESSES if count == 50 else states.count("finished") == count
    until(lambda: not trial_processes(), "processes are gone", within_s=15.0)
    until(cpus_are_free, "CPUs are free", within_s=15.0)
    until(lambda: not groups(), "placement groups are gone", within_s=15.0)
    until(
        lambda: not [actor for actor in actors().values() if actor["State"] == "ALIVE"],
        "actors are gone",
        within_s=15.0,
    )
    per_trial = (watched.rss[count] - watched.rss[count // 5]) / MIB / (count - count // 5)
    print(
        f"\n{count} trials in {took:.0f} s, {took * PROCESSES / count:.2f} s each; a process waited at most "
        f"{longest_wait_s(report.trials):.1f} s; driver {watched.rss[count] / MIB:.0f} MiB, {per_trial:.2f} a trial; "
        f"threads {before} to {threading.active_count()}, /dev/shm {shm} to {len(os.listdir('/dev/shm'))}"
    )
    assert longest_wait_s(report.trials) < IDLE_S
    assert per_trial < DRIVER_MIB
    assert threading.active_count() <= before + 2
    assert len(os.listdir("/dev/shm")) <= shm
