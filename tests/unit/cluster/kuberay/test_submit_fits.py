"""A run that the plan says does not fit is refused by submit, on every target, before anything is written.

The demand comes from the real plan of a real spec: only the base's size is made up, in its config.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from graftwork.cli import app
from graftwork.cluster.jobs.models import Attempt, Finding, Job, TargetMachines
from graftwork.cluster.kuberay.preflight import machines_of, preflight
from graftwork.cluster.spec import ClusterSpec
from graftwork.cluster.targets import local
from graftwork.cluster.targets.ray_jobs import machines_of as machines_of_ray
from graftwork.cluster.targets.ray_jobs import workers
from graftwork.cluster.targets.ray_jobs_api import RayNode
from graftwork.config import validate
from graftwork.planning.hardware import GIB, GPUS
from graftwork.stages.jobs import job_of, with_demand
from graftwork.training.spec import TrainSpec
from tests.kuberay_objects import BASE
from tests.tiny import write_tiny_base

SIZES = {
    "tiny": {},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80},
}
"""Widths and depths of Llama 3; heads are as in the tiny base, which costs a few per cent."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, and a base of each size: equal files but for the config, which is all that a plan reads."""
    made = tmp_path_factory.mktemp("fits")
    made.joinpath("rows.jsonl").write_text(
        "".join(json.dumps({"id": str(i), "prompt": f"card {i} " * 9, "completion": "{}"}) + "\n" for i in range(16))
    )
    for name, changes in SIZES.items():
        config = write_tiny_base(made / name) / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    return made


def spec_of(folder: Path, size: str, **changed: Any) -> TrainSpec:
    tree = {
        "name": "cards",
        "root": str(folder / "root"),
        "base": str(folder / size),
        "quant": {"kind": "none"},
        "data": {"train": str(folder / "rows.jsonl")},
        "adapter": {"kind": "full"},
        "optim": {"lr": 1e-5, "rows_per_step": 8},
        **changed,
    }
    return validate(TrainSpec, tree, "test")


def judged(spec: TrainSpec, folder: Path, cluster: ClusterSpec, machines: TargetMachines) -> tuple[Job, bool]:
    """The job as the command line makes it, and whether the plan says that it fits."""
    job, lines, notes = with_demand(job_of(spec, cluster, "k8s:a/team-a"), spec, folder, machines)
    assert notes == ()
    return job, all(line.fits for line in lines)


def errors(found: list[Finding]) -> set[str]:
    return {one.code for one in found if one.level == "error"}


SPECS = st.fixed_dictionaries(
    {
        "size": st.sampled_from(list(SIZES)),
        "num_workers": st.sampled_from([1, 2, 8]),
        "gpus_per_worker": st.sampled_from([0, 1]),
        "micro_batch": st.sampled_from([1, 8]),
        "adapter": st.sampled_from(["full", "lora"]),
    }
)
MACHINES = st.fixed_dictionaries(
    {
        "count": st.sampled_from([1, 2, 8]),
        "gpu": st.sampled_from([1, 8]),
        "gpu_type": st.sampled_from(list(GPUS)),
        "memory": st.sampled_from([2, 16, 64, 900]),
    }
)


def asked(folder: Path, tree: dict[str, Any]) -> TrainSpec:
    adapter = {"kind": tree["adapter"]}
    return spec_of(
        folder,
        tree["size"],
        num_workers=tree["num_workers"],
        gpus_per_worker=tree["gpus_per_worker"],
        adapter=adapter,
        optim={"lr": 1e-5, "rows_per_step": 8, "micro_batch": tree["micro_batch"]},
        quant={"kind": "none"},
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=SPECS, machine=MACHINES)
def test_what_does_not_fit_pods_or_nodes_is_refused(
    folder: Path, tree: dict[str, Any], machine: dict[str, Any]
) -> None:
    """The same machines as a cluster's file describes them and as a Ray shows them."""
    group = {**machine, "name": "g", "cpu": "64", "memory": f"{machine['memory']}Gi", "node_selector": {"a/b": "c"}}
    cluster = ClusterSpec.model_validate({**BASE, "workers": [group]})
    spec = asked(folder, tree)
    job, fits = judged(spec, folder, cluster, machines_of(cluster))
    if not fits:
        assert errors(preflight(Attempt(job, 1), "team-a")) & {"E-FIT-GPU-MEMORY", "E-FIT-WORKER", "E-FIT-WORKERS"}
    ray_type = {"a100-40": "A100-40G", "a100-80": "A100-80G"}.get(machine["gpu_type"], machine["gpu_type"].upper())
    total = {
        "CPU": 64.0,
        "GPU": float(machine["gpu"]),
        "memory": machine["memory"] * GIB,
        f"accelerator_type:{ray_type}": 1.0,
    }
    nodes = [RayNode(f"n{number}", number == 0, total, {}) for number in range(machine["count"])]
    job, fits = judged(spec, folder, cluster, machines_of_ray("http://head:8265", nodes))
    if not fits:
        assert errors(workers(job, nodes)) & {"E-FIT-GPU-MEMORY", "E-CLUSTER-TOO-SMALL"}


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=SPECS)
def test_what_does_not_fit_this_machine_is_refused(folder: Path, tree: dict[str, Any]) -> None:
    spec = asked(folder, {**tree, "gpus_per_worker": 0})
    job, fits = judged(spec, folder, ClusterSpec(), local.machines_here())
    if not fits:
        assert "E-MEMORY-FIT" in errors(local.fit(job, str(folder / "root"), folder))


def test_the_plan_says_both_of_these_specs(folder: Path) -> None:
    """Else the properties above would hold for nothing."""
    cluster = ClusterSpec.model_validate({**BASE, "workers": [{"gpu": 1, "gpu_type": "T4", "memory": "900Gi"}]})
    verdicts = {
        size: judged(spec_of(folder, size, num_workers=1, gpus_per_worker=1), folder, cluster, machines_of(cluster))[1]
        for size in SIZES
    }
    assert verdicts == {"tiny": True, "1b": False, "8b": False, "70b": False}


def test_a_full_finetune_of_many_rows_is_refused_on_a_t4(folder: Path) -> None:
    """The plan's own figure is in the finding."""
    cluster = ClusterSpec.model_validate({**BASE, "workers": [{"gpu": 1, "gpu_type": "T4", "count": 2}]})
    spec = spec_of(folder, "8b", num_workers=2, gpus_per_worker=1)
    job, lines, _ = with_demand(job_of(spec, cluster, "k8s:a/team-a"), spec, folder, machines_of(cluster))
    [found] = [one for one in preflight(Attempt(job, 1), "team-a") if one.code == "E-FIT-GPU-MEMORY"]
    assert found.problem == "T4 has 14.6 GiB"
    assert f"{lines[0].peak_bytes_per_process / GIB:.1f} GiB" in found.rule


def test_the_machines_own_memory_counts_for_gpu_workers(folder: Path) -> None:
    """ZeRO-3 with the optimizer in the host's memory: the GPU has room, a pod of 16Gi has none."""
    strategy = {"kind": "zero3", "offload_optimizer": "cpu"}
    spec = spec_of(folder, "8b", num_workers=2, gpus_per_worker=1, strategy=strategy)
    for memory, refused in (("16Gi", {"E-FIT-WORKER"}), ("900Gi", set())):
        group = {"gpu": 1, "gpu_type": "H100", "count": 2, "memory": memory, "cpu": "8"}
        cluster = ClusterSpec.model_validate({**BASE, "workers": [group]})
        job, _ = judged(spec, folder, cluster, machines_of(cluster))
        assert job.demand.memory_bytes_per_worker > 16 * GIB
        assert errors(preflight(Attempt(job, 1), "team-a")) - {"E-PATH-LOCAL"} == refused


@pytest.mark.parametrize("command", [["train"], ["plan"]])
def test_the_command_line_refuses_before_it_writes(folder: Path, tmp_path: Path, command: list[str]) -> None:
    root, file = tmp_path / "root", tmp_path / "train.yaml"
    optim = {"lr": 1e-5, "rows_per_step": 8, "micro_batch": 8}
    spec = spec_of(folder, "70b", gpus_per_worker=0, num_workers=1, optim=optim)
    tree = spec.model_dump(mode="json", exclude_unset=True)
    file.write_text(json.dumps({"kind": "train", **tree, "root": str(root)}))
    where = ["--target", "local"] if command == ["plan"] else ["--detach"]
    done = CliRunner().invoke(app, [*command, str(file), *where])
    assert "E-MEMORY-FIT" in done.output or "E-MEMORY-FIT" in str(done.exception), done.output
    assert done.exit_code in (1, 2)
    assert not root.exists()
