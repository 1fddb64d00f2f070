"""A sweep whose trials are jobs: each a driver with a Ray of its own; the sweep only waits, reads and cancels."""

from pathlib import Path

import pytest

from graftwork.cluster.session import Session
from graftwork.cluster.targets import backend_of
from graftwork.errors import ConfigError
from graftwork.tuning.remote_trial import Elsewhere, check_elsewhere
from graftwork.tuning.run import tune
from graftwork.tuning.spec import TuneSpec
from graftwork.tuning.trials import TuneProgress
from tests.ray.test_tune import rates, sweep, write_inputs

HERE = Elsewhere("local", {})


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> TuneSpec:
    folder = tmp_path_factory.mktemp("jobs")
    asha = {"kind": "asha", "grace_steps": 4, "reduction": 4}
    return sweep(
        write_inputs(folder),
        folder / "root",
        rates(1e-2, 1e-5, 2e-5),
        max_concurrent=2,
        steps=16,
        report_every=4,
        scheduler=asha,
    )


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_each_trial_is_a_job_that_is_cancelled_when_it_falls_behind(ray_cluster: Session, spec: TuneSpec) -> None:
    seen: list[TuneProgress] = []
    report = tune(spec, on_progress=seen.append, elsewhere=HERE)
    jobs = {status.job_id: status for status in backend_of("local", spec.root).list()}
    assert len(jobs) == 3
    assert {status.kind for status in jobs.values()} == {"trial"}
    assert all(status.ended for status in jobs.values())
    assert report.best["optim.lr"] == 1e-2
    ended = {trial.trial_id: trial for trial in report.trials}
    assert {trial.state for trial in ended.values()} <= {"finished", "stopped"}
    assert "stopped" in {trial.state for trial in ended.values()}, "the slow rates are far behind after four steps"
    states = {job_id: status.state for job_id, status in jobs.items()}
    for trial in ended.values():
        [state] = [state for job_id, state in states.items() if f"-{trial.trial_id}-" in job_id]
        assert state == ("succeeded" if trial.state == "finished" else "cancelled")
        assert any("a job of its own" in note for note in trial.notes)
    assert not (Path(spec.root) / "adapters").exists(), "trials publish nothing"
    assert tune(spec, elsewhere=HERE).reused


@pytest.mark.parametrize("keys", [{"share_base": 2}])
def test_trials_that_need_each_other_are_no_jobs(tmp_path: Path, keys: dict[str, int]) -> None:
    asked = sweep(write_inputs(tmp_path), tmp_path / "root", rates(1e-2, 1e-5), **keys)
    with pytest.raises(ConfigError, match="stands alone"):
        check_elsewhere(asked)
