"""Trials share one machine on a private Ray: gangs on Ray Train, what they give back, and what they never keep."""

from pathlib import Path

import ray
from ray.util import placement_group_table

from graftwork.cluster.session import Session
from graftwork.tuning.ledger import Ledger
from graftwork.tuning.run import Sweep, TrialRecord, tune
from tests.ray.test_tune import GOOD, inputs, rates, sweep, wait_for

__all__ = ["inputs"]

GANG = {"train.num_workers": 2, "train.strategy.kind": "fsdp2", "train.quant.dtype": "float32", "gang": "always"}


def groups() -> list[str]:
    """Placement groups that hold something."""
    return [group["state"] for group in placement_group_table().values() if group["state"] != "REMOVED"]


def cpus_are_free() -> bool:
    return bool(ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"])


def test_a_gang_that_is_stopped_leaves_loop_and_places(local_ray: Session, inputs: Path, tmp_path: Path) -> None:
    """The first trial is one of an earlier attempt, and far better: the second is stopped at its first rung."""
    space = rates(GOOD, 1e-5)
    spec = sweep(inputs, tmp_path, space, scheduler={"grace_steps": 2, "reduction": 2}).with_(GANG)
    prepared = Sweep.of(spec)
    ledger = Ledger(prepared.paths)
    earlier = ledger.next(prepared.search)
    assert isinstance(earlier, TrialRecord)
    ledger.update(earlier.trial_id, state="finished", steps=4, losses=((2, 0.1), (4, 0.1)))
    report = tune(spec)
    gang = report.trials[1]
    assert (gang.state, gang.steps, len(gang.losses)) == ("stopped", 2, 1)
    assert gang.notes[0] == "a gang of 2 workers (fsdp2): gang=always"
    assert gang.notes[1].startswith("stopped at step 2: loss ")
    assert gang.peak_rss_bytes > 400 * 2**20, "of a worker, not of the process that started it"
    wait_for(cpus_are_free, "CPUs are free")
    assert not groups()
