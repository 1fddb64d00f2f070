"""Status of a run however its driver ends, and what a driver that was overtaken may still publish."""

import json
import math
from pathlib import Path

import pytest

from graftwork.artifacts.manifest import aliases
from graftwork.base import publish as base_publish
from graftwork.cluster.jobs.fencing import Fence, SupersededError
from graftwork.cluster.jobs.store import JobStore
from graftwork.errors import Interrupted, StorageError
from graftwork.training.loop import run_steps, train_as_worker
from graftwork.training.report import TrainReport
from graftwork.training.run import ResolvedRun, _write_run_inputs, publish, train_resolved
from graftwork.training.worker_messages import LoopResult, TrainJob, read_steps
from tests.jobs import command_job
from tests.training import task


@pytest.fixture
def run(tmp_path: Path) -> ResolvedRun:
    return ResolvedRun.resolve(task(tmp_path, num_workers=1, **{"optim.epochs": 0.5}))


def status_of(run: ResolvedRun) -> dict[str, str]:
    found: dict[str, str] = run.paths.store.read_json(*run.paths.status())
    return found


def blocked(run: ResolvedRun, name: str) -> Path:
    """A folder in the place of a file of the run, which can't be written then."""
    path = Path(run.paths.store.path(*run.paths.file(name)))
    path.unlink(missing_ok=True)
    (path / "in the way").mkdir(parents=True)
    return path


def test_an_error_of_any_class_leaves_the_status_failed(run: ResolvedRun) -> None:
    def fail(_job: TrainJob) -> LoopResult:
        raise KeyError("step")

    with pytest.raises(KeyError):
        train_resolved(run, workers=fail)
    assert (status_of(run)["state"], status_of(run)["error"]) == ("failed", "KeyError: 'step'")


def test_inputs_that_cannot_be_written_leave_the_status_failed(run: ResolvedRun) -> None:
    blocked(run, "plan.json")
    with pytest.raises(StorageError, match=r"plan\.json"):
        train_resolved(run)
    assert status_of(run)["state"] == "failed"


def test_ctrl_c_stays_interrupted_where_the_status_cannot_be_written(run: ResolvedRun) -> None:
    def interrupt(_job: TrainJob) -> LoopResult:
        blocked(run, "status.json")
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="no checkpoint was made yet"):
        train_resolved(run, workers=interrupt)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_an_overtaken_driver_publishes_nothing(tmp_path: Path, kind: str) -> None:
    spec = task(tmp_path, **{"num_workers": 1, "adapter": {"kind": kind}, "quant": {"kind": "none"}})
    run = ResolvedRun.resolve(spec.with_({"optim.epochs": 0.5, "quant.dtype": "float32"}))
    result = run_steps(TrainJob(run.spec, run.data, run.paths), lambda _: True)
    _write_run_inputs(run)
    jobs, job = JobStore(run.spec.root), command_job(run.spec.root, ["true"])
    jobs.record(job, "local")
    jobs.open_attempt(job.job_id, 1)
    fence = Fence(run.spec.root, job.job_id, 1, 1)
    fence.require()
    jobs.open_attempt(job.job_id, 2)
    with pytest.raises(SupersededError):
        publish(run, result, read_steps(run.paths), fence.require)
    folder = Path(run.spec.root, "bases" if kind == "full" else "adapters", "colours")
    [version] = folder.iterdir()
    assert not (version / base_publish.MANIFEST_FILE).exists(), "its files have no name yet"
    assert list(version.iterdir()), "it was refused at the last moment"
    assert aliases(run.paths.store, "colours") == {}


def test_a_driver_that_is_overtaken_after_the_manifest_moves_no_alias(run: ResolvedRun) -> None:
    result = run_steps(TrainJob(run.spec, run.data, run.paths), lambda _: True)
    _write_run_inputs(run)
    manifests: list[int] = []

    def overtaken_at_the_alias() -> None:
        manifests.append(len(list(Path(run.spec.root, "adapters").glob("*/*/manifest.json"))))
        if manifests == [0, 1]:
            raise SupersededError("job", "a later one has taken over")

    with pytest.raises(SupersededError):
        publish(run, result, read_steps(run.paths), overtaken_at_the_alias)
    assert manifests == [0, 1], "asked before the manifest, and before the alias"
    assert aliases(run.paths.store, "colours") == {}
    made = publish(run, result, read_steps(run.paths))
    assert aliases(run.paths.store, "colours") == {"latest": made.version}


def test_a_peak_that_cannot_be_noted_does_not_fail_a_complete_run(
    run: ResolvedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "machine").write_text("a file in the place of the folder")
    monkeypatch.setenv("GRAFTWORK_CACHE", str(cache))
    result = train_as_worker(TrainJob(run.spec, run.data, run.paths), None, lambda: False)
    assert isinstance(result, LoopResult), result
    [warning] = [record for record in caplog.records if "memory peak" in record.message]
    assert warning.exc_info is not None


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def test_a_report_with_nan_is_json_and_reads_back() -> None:
    report = TrainReport(
        run_id="colours-00000000",
        adapter="colours@1",
        version="1",
        reused=False,
        steps=4,
        rows=8,
        dropped_rows=0,
        tokens=10,
        wall_s=1.0,
        tokens_per_s=10.0,
        train_loss=((4, 0.5),),
        eval_loss=((2, math.nan), (4, 0.25)),
        eval_metrics={"reward": math.inf, "accuracy": 0.5},
        peak_rss_bytes_per_worker=(1,),
        peak_cuda_bytes_per_worker=(0,),
    )
    text = json.dumps(report.as_dict())
    again = TrainReport.from_dict(json.loads(text, parse_constant=refuse_constant), reused=True)
    assert math.isnan(again.eval_loss[0][1])
    assert again.eval_loss[1] == (4, 0.25)
    assert math.isnan(again.eval_metrics["reward"])
    assert again.eval_metrics["accuracy"] == 0.5
