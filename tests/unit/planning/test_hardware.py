"""GPUs that `auto` stands for: of this machine as the driver lists them, of a cluster as its file or Ray names them."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from graftwork.cli import app
from graftwork.cluster.kuberay.preflight import machines_of
from graftwork.cluster.spec import ClusterSpec
from graftwork.cluster.targets.ray_jobs import machines_of as machines_of_ray
from graftwork.cluster.targets.ray_jobs_api import RayNode
from graftwork.config import Spec, validate
from graftwork.errors import ConfigError
from graftwork.planning.hardware import Accelerators, gpus_here, gpus_of, is_auto, with_gpus
from graftwork.serving.evaluation.spec import CompareSpec
from graftwork.serving.quantize.spec import QuantizeSpec
from graftwork.serving.spec import ServeSpec
from graftwork.training.run import ResolvedRun
from graftwork.training.spec import TrainSpec
from graftwork.tuning.run import Sweep
from graftwork.tuning.spec import TuneSpec
from tests.tiny import write_tiny_base

TRAIN: dict[str, Any] = {"name": "cards", "base": "b", "data": {"train": "rows.jsonl", "eval": "held-out.jsonl"}}
ARMS = [{"name": "a"}, {"name": "b"}]
STAGES: list[Spec] = [
    validate(TrainSpec, TRAIN, "test"),
    validate(TuneSpec, {"name": "sweep", "train": TRAIN}, "test"),
    validate(ServeSpec, {"name": "s", "base": "b"}, "test"),
    validate(
        CompareSpec,
        {"name": "c", "base": "b", "eval": "e", "scorers": [{"kind": "exact"}], "arms": ARMS, "baseline": "a"},
        "test",
    ),
    validate(QuantizeSpec, {"name": "q", "base": "b", "eval": "e", "answer_schema": "s", "arms": ARMS}, "test"),
]


@pytest.mark.parametrize("spec", STAGES, ids=lambda spec: spec.kind)
def test_auto_is_the_default_and_becomes_a_number_with_a_reason(spec: Spec) -> None:
    assert is_auto(spec)
    on_gpus, note = with_gpus(spec, Accelerators(4, ("H100",), "cluster group h100"))
    assert gpus_of(on_gpus) == 1
    assert note is not None
    assert note.endswith("=1 (cluster group h100 has GPUs)")
    on_cpus, note = with_gpus(spec, Accelerators(0))
    assert gpus_of(on_cpus) == 0
    assert note is not None
    assert note.endswith("=0 (this machine has no GPU)")
    assert with_gpus(on_cpus, Accelerators(4)) == (on_cpus, None), "a number stays, and so does an explicit 0"


@pytest.mark.parametrize("spec", STAGES, ids=lambda spec: spec.kind)
def test_the_identity_holds_the_number_so_that_cpu_specs_keep_theirs(spec: Spec) -> None:
    """Before `auto` the default was 0: the same spec on the same CPUs is the same job and the same run."""
    kind = type(spec).model_fields["kind"].default
    key = {"tune": "train.gpus_per_worker", "train": "gpus_per_worker"}.get(kind, "num_gpus")
    resolved, _ = with_gpus(spec, Accelerators(0))
    assert resolved.identity() == spec.with_({key: 0}).identity() == spec.with_({key: 0.0}).identity()
    assert '"auto"' not in json.dumps(resolved.model_dump(mode="json", include={"gpus_per_worker", "num_gpus"}))
    assert resolved.identity() != with_gpus(spec, Accelerators(1))[0].identity()


def test_vllm_gets_a_gpu_for_each_part_of_a_replica() -> None:
    engine = {"kind": "vllm", "tensor_parallel_size": 2}
    spec = validate(ServeSpec, {"name": "s", "base": "b", "engine": engine}, "test")
    resolved, note = with_gpus(spec, Accelerators(0))
    assert (gpus_of(resolved), note) == (2, "num_gpus=2 (engine.kind=vllm: engine.tensor_parallel_size)")


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["H100", "T4", "H100"]),
        ("", []),
        ("1", ["T4"]),
        ("2,0", ["H100", "H100"]),
        ("-1", []),
        ("1,-1,0", ["T4"]),
        ("GPU-8932f937,GPU-7a1b", ["H100", "T4"]),
        ("7", []),
    ],
)
def test_gpus_here_are_those_that_a_process_may_use(
    nvidia_smi: Path, visible: str | None, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = gpus_here()
    assert [next(part for part in ("H100", "T4") if part in name) for name, _ in found] == names
    assert all(size in (81559 << 20, 15360 << 20) for _, size in found)


def test_a_machine_without_a_driver_has_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus_here() == []


def test_a_cluster_has_the_gpus_of_its_groups() -> None:
    groups = [
        {"name": "h100", "gpu": 8, "count": 2, "gpu_type": "H100"},
        {"name": "cpu"},
        {"name": "grows", "gpu": 1, "count": 0, "max_count": 4, "gpu_type": "T4"},
    ]
    machines = machines_of(ClusterSpec.model_validate({"workers": groups}))
    assert (machines.gpus, machines.gpu_types) == (20, ("H100", "T4"))
    assert machines.accelerators.owner == "cluster group h100, grows"
    assert machines.smallest_gpu is not None
    assert machines.smallest_gpu.name == "t4", "a worker may be placed on either"
    none = machines_of(ClusterSpec())
    assert (none.gpus, none.accelerators.owner) == (0, "the cluster's file")


def test_a_ray_has_the_gpus_of_its_nodes() -> None:
    nodes = [
        RayNode("a", True, {"CPU": 4, "memory": 1e9}, {}),
        RayNode("b", False, {"CPU": 8, "GPU": 2, "memory": 2e9, "accelerator_type:A100": 1}, {}),
    ]
    machines = machines_of_ray("http://head:8265", nodes)
    assert (machines.cpus, machines.gpus, machines.gpu_types) == (12, 2, ("A100",))
    assert machines.accelerators.owner == "http://head:8265"


def test_a_slice_of_a_gpu_is_no_whole_gpu() -> None:
    group = {"gpu": 1, "gpu_type": "H100-MIG-1g.5gb"}
    machines = machines_of(ClusterSpec.model_validate({"workers": [group]}))
    assert (machines.smallest_gpu, machines.planned_for(1)) == (None, None)


def rows(folder: Path) -> dict[str, Any]:
    for name in ("rows", "held-out"):
        lines = (json.dumps({"id": str(i), "prompt": f"{name} {i}", "completion": "{}"}) for i in range(8))
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    data = {"train": str(folder / "rows.jsonl"), "eval": str(folder / "held-out.jsonl")}
    base = str(write_tiny_base(folder / "base"))
    return {**TRAIN, "root": str(folder / "root"), "base": base, "quant": {"kind": "none"}, "data": data}


def test_runs_and_sweeps_resolve_it_before_they_are_named(tmp_path: Path, nvidia_smi: Path) -> None:
    tree = rows(tmp_path)
    run = ResolvedRun.resolve(validate(TrainSpec, tree, "test"))
    assert (run.spec.gpus_per_worker, run.notes) == (1.0, ("gpus_per_worker=1 (this machine has GPUs)",))
    nvidia_smi.write_text("#!/bin/sh\nexit 9\n")  # a driver without GPUs
    on_cpus = ResolvedRun.resolve(validate(TrainSpec, tree, "test"))
    assert (on_cpus.spec.gpus_per_worker, on_cpus.notes) == (0.0, ())
    explicit = ResolvedRun.resolve(validate(TrainSpec, {**tree, "gpus_per_worker": 0}, "test"))
    assert on_cpus.paths.run_id == explicit.paths.run_id != run.paths.run_id
    sweep = Sweep.resolve(validate(TuneSpec, {"name": "sweep", "root": tree["root"], "train": tree}, "test"))
    assert sweep.spec.train.gpus_per_worker == 0.0


def test_rules_of_devices_hold_for_the_number() -> None:
    """`auto` passes, and what it becomes is judged."""
    full = {
        **TRAIN,
        "adapter": {"kind": "full"},
        "quant": {"kind": "none", "dtype": "float32"},
        "strategy": {"kind": "zero2"},
        "optim": {"lr": 1e-5},
    }
    spec = validate(TrainSpec, full, "test")
    assert gpus_of(with_gpus(spec, Accelerators(0))[0]) == 0
    with pytest.raises(ConfigError, match="quant.dtype=float32 can't take effect"):
        with_gpus(spec, Accelerators(1))


def test_a_plan_for_a_gpu_says_what_the_file_needs(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    for gpus, said in (("auto", "note: gpus_per_worker=1 (--gpu h100)"), (0, "the file has gpus_per_worker=0")):
        file.write_text(json.dumps({"kind": "train", **rows(tmp_path), "gpus_per_worker": gpus}))
        done = CliRunner().invoke(app, ["plan", str(file), "--gpu", "h100"])
        assert (done.exit_code, said in done.stdout) == (0, True), done.output


def test_a_driver_that_fails_has_no_gpu_and_one_that_hangs_is_named(
    nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed, error 9'\nexit 9\n")
    assert gpus_here() == []
    nvidia_smi.write_text("#!/bin/sh\nexec sleep 30\n")
    monkeypatch.setattr("graftwork.planning.hardware.NVIDIA_SMI_S", 0.2)
    with pytest.raises(ConfigError, match=r"nvidia-smi has not answered within 0\.2 s"):
        gpus_here()
