"""What a job's workers take: as its place is told, and what is said where it cannot be predicted."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from graftwork.cluster.jobs.models import ExecSpec
from graftwork.cluster.kuberay.preflight import machines_of
from graftwork.cluster.spec import ClusterSpec
from graftwork.cluster.targets.local import machines_here
from graftwork.stages.jobs import demands_of, job_of, predict, with_demand
from graftwork.training.planning.plan import RAY_TRAIN_START_S
from graftwork.training.spec import TrainSpec
from tests.tiny import write_tiny_base


def spec_of(folder: Path, **changed: object) -> TrainSpec:
    rows = [{"id": str(i), "prompt": f"card {i}", "completion": "{}"} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "name": "cards",
        "root": str(folder / "root"),
        "base": str(write_tiny_base(folder / "base")),
        "quant": {"kind": "none"},
        "data": {"train": str(folder / "rows.jsonl")},
        "num_workers": 2,
    }
    return TrainSpec.model_validate({**tree, **changed})


def test_workers_memory_and_time_are_those_of_the_stages_plan(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, gpus_per_worker=0)
    job, [line], notes = with_demand(job_of(spec, ClusterSpec()), spec, tmp_path, machines_here())
    assert notes == ()
    assert (job.demand.num_workers, job.demand.cpus_per_worker, job.demand.gpus_per_worker) == (2, 1.0, 0.0)
    assert (job.demand.memory_bytes_per_worker, job.demand.seconds) == (line.peak_bytes_per_process, line.seconds)
    assert job.demand.gpu_memory_bytes_per_worker == 0


def test_a_gpu_that_the_cluster_names_is_planned_for_with_its_memory_and_the_machines(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, gpus_per_worker=1)
    cluster = ClusterSpec.model_validate({"workers": [{"gpu": 1, "gpu_type": "H100", "count": 2}]})
    lines, notes = predict(spec, tmp_path, machines_of(cluster))
    assert notes == ()
    assert any("h100" in note for note in lines[0].assumptions)
    [demand] = demands_of(spec, lines)
    assert demand.gpu_memory_bytes_per_worker == lines[0].peak_bytes_per_process > 0
    assert demand.memory_bytes_per_worker == lines[0].host_bytes_per_process > 0


def test_data_that_only_the_cluster_sees_is_said_and_keeps_nothing_from_running(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, data={"train": "/only/there/rows.jsonl"}, gpus_per_worker=0)
    lines, [note] = predict(spec, tmp_path, machines_here())
    assert (lines, note.code, note.level) == ((), "W-NOT-PREDICTED", "warning")
    assert "/only/there/rows.jsonl" in note.problem
    assert demands_of(spec, lines)[0].num_workers == 2


def test_a_program_is_one_worker(tmp_path: Path) -> None:
    spec = ExecSpec(name="hello", argv=("true",))
    assert predict(spec, tmp_path, machines_here()) == ((), ())
    assert demands_of(spec, ())[0].num_workers == 1


def test_ray_train_starts_a_single_worker_on_a_cluster_alone(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, gpus_per_worker=0, num_workers=1)
    here, there = machines_here(), replace(machines_here(), owner="cluster group cpu")
    ([local], _), ([remote], _) = (predict(spec, tmp_path, machines) for machines in (here, there))
    assert remote.seconds - local.seconds == pytest.approx(RAY_TRAIN_START_S, rel=0.05)
