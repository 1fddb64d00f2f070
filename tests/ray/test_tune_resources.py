"""Trials share one machine on a private Ray: gangs on Ray Train, what they give back, and what they never keep."""

import time
from pathlib import Path

import psutil
import pytest
import ray
from ray.util import placement_group_table

from graftwork.cluster.session import Session
from graftwork.errors import RunError
from graftwork.tuning.run import Sweep, tune
from graftwork.tuning.trial_store import Ledger
from graftwork.tuning.trials import TrialRecord, TuneProgress
from tests.ray.test_tune import FREED_WITHIN_S, GOOD, inputs, rates, sweep
from tests.waiting import until

__all__ = ["inputs"]

GANG = {"train.num_workers": 2, "train.strategy.kind": "fsdp2", "train.quant.dtype": "float32", "distributed": "always"}


def groups() -> list[str]:
    """Placement groups that hold something."""
    return [group["state"] for group in placement_group_table().values() if group["state"] != "REMOVED"]


def cpus_are_free() -> bool:
    return bool(ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"])


@pytest.mark.long
def test_a_gang_that_is_stopped_leaves_loop_and_places(ray_cluster: Session, inputs: Path, tmp_path: Path) -> None:
    """The first trial is one of an earlier attempt, and far better: the second is stopped at its first rung."""
    space = rates(GOOD, 1e-5)
    spec = sweep(inputs, tmp_path, space, scheduler={"grace_steps": 2, "reduction": 2}).with_(GANG)
    prepared = Sweep.resolve(spec)
    ledger = Ledger(prepared.paths)
    earlier = ledger.next(prepared.search)
    assert isinstance(earlier, TrialRecord)
    ledger.update(earlier.trial_id, state="finished", steps=4, losses=((2, 0.1), (4, 0.1)))
    report = tune(spec)
    gang = report.trials[1]
    assert (gang.state, gang.steps, len(gang.losses)) == ("stopped", 2, 1)
    assert gang.notes[0] == "distributed over 2 workers (fsdp2): distributed=always"
    assert gang.notes[1].startswith("stopped at step 2: loss ")
    assert gang.peak_rss_bytes > 400 * 2**20, "of a worker, not of the process that started it"
    until(cpus_are_free, "CPUs are free", within_s=FREED_WITHIN_S)
    assert not groups()


@pytest.mark.soak
def test_a_gang_whose_first_process_is_killed_leaves_nothing(
    ray_cluster: Session, inputs: Path, tmp_path: Path
) -> None:
    spec = sweep(inputs, tmp_path, rates(GOOD), steps=40, report_every=2, retries=0).with_(GANG)
    killed: list[float] = []

    def kill(progress: TuneProgress) -> None:
        if progress.trials and progress.trials[0].losses and not killed:
            killed.append(time.monotonic())
            for process in trial_processes():
                process.kill()

    with pytest.raises(RunError, match="none ran to step 40"):
        tune(spec, on_progress=kill)
    until(cpus_are_free, "CPUs are free", within_s=FREED_WITHIN_S)
    until(lambda: not groups(), "placement groups are gone", within_s=FREED_WITHIN_S)
    print(f"free {time.monotonic() - killed[0]:.1f} s after the kill")


def trial_processes() -> list[psutil.Process]:
    """Those that Tune started, on this process' Ray."""
    return [process for process in psutil.Process().children(recursive=True) if "ImplicitFunc" in _title(process)]


def _title(process: psutil.Process) -> str:
    """Empty of one that has ended in the meantime."""
    try:
        return "".join(process.cmdline())
    except psutil.NoSuchProcess:  # a zombie as well
        return ""
