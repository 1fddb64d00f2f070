"""Training over several nodes: raylets of one CPU each, so that the two workers of a run lie on different ones."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from graftwork.training.loop import run_steps
from graftwork.training.objectives.rows import prepare
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import LoopResult, TrainJob
from tests.process_races import ROOT
from tests.ray_cluster import Raylet, Raylets, environment
from tests.training import task

TOLERANCE = 2e-6
"""Relative, on losses in fp32, as in tests/unit/training/test_strategies.py."""
WITHIN_S = 420
FULL = {"adapter": {"kind": "full"}, "optim.lr": 1e-3}
PROGRAM = """
import json, sys
from graftwork.cluster.session import session
from graftwork.training.run import train
from graftwork.training.spec import TrainSpec

with session("job"):
    for text in sys.argv[1:]:
        report = train(TrainSpec.model_validate_json(text)).as_dict()
        print(json.dumps({key: report[key] for key in ("train_loss", "eval_loss", "notes")}), flush=True)
"""


@dataclass(frozen=True)
class Trained:
    """What a driver said of its runs, one after the other, and which nodes had a worker of theirs at the same time."""

    reports: list[dict[str, Any]]
    nodes_at_once: set[str]


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[str, list[Raylet]]]:
    """(address, two nodes of one CPU); the head has none."""
    raylets = Raylets()
    try:
        yield raylets.address, [raylets.add(), raylets.add()]
    finally:
        raylets.close()


def trained(nodes: tuple[str, list[Raylet]], specs: list[TrainSpec]) -> Trained:
    """Train the specs from a driver of its own."""
    address, raylets = nodes
    driver = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *(spec.model_dump_json(exclude_unset=True) for spec in specs)],
        cwd=ROOT,
        env={**environment(), "RAY_ADDRESS": address, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
    )
    at_once: set[str] = set()
    while True:
        try:
            out, _ = driver.communicate(timeout=0.5)
            break
        except subprocess.TimeoutExpired:
            with_workers = {raylet.node_id for raylet in raylets if has_worker(raylet)}
            at_once = max(at_once, with_workers, key=len)
    assert driver.returncode == 0, out
    return Trained([json.loads(line) for line in out.splitlines() if line.startswith("{")], at_once)


def has_worker(raylet: Raylet) -> bool:
    """Whether a worker of Ray Train is among the node's processes."""
    for process in psutil.Process(raylet.pid).children(recursive=True):
        try:
            if "TrainWorker" in " ".join(process.cmdline()):
                return True
        except psutil.NoSuchProcess:
            continue
    return False


def spec_of(folder: Path, kind: str, **changes: Any) -> TrainSpec:
    short = {"quant.kind": "none", "optim.epochs": 1, "eval_every": 6, "checkpoint_every": 6, "alias": None}
    if "adapter" in changes:
        del short["alias"]
    return task(folder, **{"name": kind, **short, "strategy.kind": kind, **changes})


def alone(spec: TrainSpec) -> LoopResult:
    plain = spec.with_({"strategy": {}})
    return run_steps(TrainJob(plain, prepare(plain)), lambda _: True)


def same_curves(report: dict[str, Any], one: LoopResult) -> None:
    assert len(report["train_loss"]) == 6
    assert dict(map(tuple, report["train_loss"])) == pytest.approx(dict(one.train_loss), rel=TOLERANCE)
    assert dict(map(tuple, report["eval_loss"])) == pytest.approx(dict(one.eval_loss), rel=TOLERANCE)


@pytest.mark.long
@pytest.mark.timeout(WITHIN_S + 60)
def test_zero_2_and_3_over_two_nodes_compute_what_one_process_does(
    nodes: tuple[str, list[Raylet]], tmp_path: Path
) -> None:
    specs = [spec_of(tmp_path, "zero2"), spec_of(tmp_path, "zero3", **FULL)]
    found = trained(nodes, specs)
    assert len(found.nodes_at_once) == 2, "a worker on each node"
    for spec, report in zip(specs, found.reports, strict=True):
        same_curves(report, alone(spec))
    assert "each of 2 workers holds 50%" in " ".join(found.reports[1]["notes"])


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_every_other_strategy_over_two_nodes_too(nodes: tuple[str, list[Raylet]], tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        ("ddp", {}),
        ("zero1", FULL),
        ("zero3", {"strategy.offload_optimizer": "cpu", "strategy.offload_weights": "cpu"}),
        ("fsdp2", {"quant.kind": "nf4"}),
    ]
    specs = [spec_of(tmp_path, kind, **changes) for kind, changes in cases]
    for spec, report in zip(specs, trained(nodes, specs).reports, strict=True):
        same_curves(report, alone(spec))
