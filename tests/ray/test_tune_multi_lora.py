"""A sweep whose trials share processes against the same sweep one at a time: the same losses, stops and winner."""

import math
from pathlib import Path
from typing import Any

import pytest

from graftwork.cluster.session import Session
from graftwork.tuning.run import tune
from graftwork.tuning.trials import TrialRecord, TuneReport
from tests.ray.test_tune import inputs, sweep

__all__ = ["inputs"]
SPACE = {
    "optim.lr": {"kind": "choice", "values": [0.03, 1e-5, 1e38]},
    "adapter.rank": {"kind": "choice", "values": [2, 4]},
}
"""Of each rank one trial that wins or nearly so, one that is stopped, one that diverges."""


@pytest.mark.soak  # thirteen processes on one CPU
def test_a_sweep_of_six_gives_the_same_with_three_in_a_process(
    ray_cluster: Session, inputs: Path, tmp_path: Path
) -> None:
    """Stops depend on the order of reports, so one process runs at a time; in a group the three are judged at once."""
    keys: dict[str, Any] = {"max_concurrent": 1, "num_trials": 6, "scheduler": {"grace_steps": 2, "reduction": 2}}
    plain = {"train.quant.dtype": "float32"}
    single = tune(sweep(inputs, tmp_path / "single", SPACE, **keys).with_(plain))
    grouped = tune(sweep(inputs, tmp_path / "grouped", SPACE, **keys, share_base=3).with_(plain))
    assert grouped.best == single.best
    assert processes(grouped) == [3, 3]
    for ours, theirs in zip(grouped.trials, single.trials, strict=True):
        assert ours.trial_id == theirs.trial_id
        assert ours.state == theirs.state
        assert (theirs.error or "").startswith(ours.error or "")
        for (step, loss), (their_step, their_loss) in zip(ours.losses, theirs.losses, strict=True):
            assert step == their_step
            assert math.isclose(loss, their_loss, rel_tol=1e-5)
    assert [trial.state for trial in grouped.trials].count("failed") == 2
    assert "stopped" in [trial.state for trial in grouped.trials]


def processes(report: TuneReport) -> list[int]:
    """How many trials each process trained, by what the records say."""

    def with_whom(trial: TrialRecord) -> frozenset[str]:
        said = next(note for note in trial.notes if note.startswith("trained in one process with "))
        return frozenset([trial.trial_id, *said.removeprefix("trained in one process with ").split(", ")])

    return sorted(len(group) for group in {with_whom(trial) for trial in report.trials})
