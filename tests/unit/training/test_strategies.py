"""Every strategy computes the same step: two ranks against one process, shards held, checkpoints gone on from."""

import ctypes.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from graftwork.errors import ConfigError, DataError
from graftwork.storage.store import RunPaths, Store
from graftwork.training.loop import run_steps
from graftwork.training.objectives.rows import PreparedData, prepare
from graftwork.training.objectives.trainer import share
from graftwork.training.run import check
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import LoopResult, TrainJob
from tests.ranks import Ended, Task, train_on
from tests.training import task

TOLERANCE = 2e-6
"""Relative, on losses in fp32: sums over two ranks are added in another order."""
FULL = {"adapter": {"kind": "full"}, "optim.lr": 1e-3}
NF4 = {"quant.kind": "nf4"}
OFFLOADED = {"strategy.offload_optimizer": "cpu", "strategy.offload_weights": "cpu"}
SHORT: dict[str, tuple[str, dict[str, Any]]] = {
    "zero1": ("zero1", {}),
    "zero2 full": ("zero2", FULL),
    "zero3 nf4": ("zero3", NF4),
    "fsdp2 nf4": ("fsdp2", NF4),
}
WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {}),
    "zero1 offloaded": ("zero1", {"strategy.offload_optimizer": "cpu"}),
    "zero1 full": ("zero1", FULL),
    "zero1 nf4": ("zero1", NF4),
    "zero1 int8": ("zero1", {"quant.kind": "int8"}),
    "zero2": ("zero2", {}),
    "zero2 offloaded": ("zero2", {"strategy.offload_optimizer": "cpu"}),
    "zero2 recomputed": ("zero2", {"optim.gradient_checkpointing": True}),
    "zero2 nf4": ("zero2", NF4),
    "zero2 int8": ("zero2", {"quant.kind": "int8"}),
    "zero3": ("zero3", {}),
    "zero3 full": ("zero3", FULL),
    "zero3 full offloaded": ("zero3", {**FULL, **OFFLOADED}),
    "zero3 recomputed": ("zero3", {"optim.gradient_checkpointing": True}),
    "zero3 dora": ("zero3", {"adapter.dora": True}),
    "zero3 int8": ("zero3", {"quant.kind": "int8"}),
    "fsdp2": ("fsdp2", {}),
    "fsdp2 full": ("fsdp2", FULL),
    "fsdp2 recomputed": ("fsdp2", {"optim.gradient_checkpointing": True}),
}


def spec_of(folder: Path, kind: str, changes: Mapping[str, Any]) -> TrainSpec:
    """Six steps; the checkpoint of step 4 is gone on from; 7 held-out rows, which two ranks can't share evenly."""
    usual = {"quant.kind": "none", "optim.epochs": 1, "optim.micro_batch": 2, "eval_every": 6, "data.eval_rows": 7}
    return task(folder, **{**usual, "strategy.kind": kind, **changes})


class Strategies:
    """Jobs of one folder, and what one process makes of them."""

    def __init__(self, folder: Path, cases: Mapping[str, tuple[str, dict[str, Any]]]) -> None:
        self.folder, self.cases = folder, cases
        self.data: PreparedData = prepare(spec_of(folder, "ddp", {}))
        tasks = {name: Task(TrainJob(spec_of(folder, *case), self.data)) for name, case in cases.items()}
        self.run = RunPaths(Store(str(folder / "stopped")), "colours", "0" * 64)
        stopped = TrainJob(spec_of(folder, "zero3", OFFLOADED), self.data, self.run)
        tasks |= {"stopped": Task(stopped, stop_at=4), "gone on": Task(stopped)}
        self.ended: Mapping[str, Ended] = train_on(2, tasks, folder / "ranks")

    def alone(self, name: str) -> LoopResult:
        """The case in this process: the plain loop."""
        _, changes = self.cases[name]
        plain = {key: value for key, value in changes.items() if not key.startswith("strategy.")}
        return run_steps(TrainJob(spec_of(self.folder, "ddp", plain), self.data), lambda _: True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("strategies")


@pytest.fixture(scope="module")
def short(folder: Path) -> Strategies:
    return Strategies(folder, SHORT)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", SHORT)
def test_two_ranks_compute_what_one_process_does(short: Strategies, name: str) -> None:
    same_curves(short.ended[name].result, short.alone(name))


@pytest.mark.soak
def test_every_strategy_with_every_adapter_and_precision_that_it_takes(tmp_path: Path) -> None:
    strategies = Strategies(tmp_path, WHOLE)
    for name in WHOLE:
        same_curves(strategies.ended[name].result, strategies.alone(name))


def same_curves(ours: LoopResult, alone: LoopResult) -> None:
    assert len(ours.train_loss) == 6
    assert alone.train_loss[-1][1] < alone.train_loss[0][1], "it learns"
    assert dict(ours.train_loss) == pytest.approx(dict(alone.train_loss), rel=TOLERANCE)
    assert dict(ours.eval_loss) == pytest.approx(dict(alone.eval_loss), rel=TOLERANCE)


@pytest.mark.parametrize("name", ["zero3 nf4", "fsdp2 nf4", "gone on"])
def test_each_rank_holds_its_part_of_the_weights_packed_ones_included(short: Strategies, name: str) -> None:
    """accelerate 1.15 trains whole copies on a CPU when FSDP is asked for, with equal losses and without a word."""
    held = [note for note in short.ended[name].result.notes if "each of 2 workers holds 50% of the weights" in note]
    assert len(held) == 1


def test_a_sharded_run_goes_on_from_its_checkpoint(short: Strategies) -> None:
    """ZeRO-3, all of it offloaded; the state of both ranks' optimizers is in the checkpoint."""
    assert short.ended["stopped"].steps == (1, 2, 3, 4)
    assert short.ended["gone on"].steps == (5, 6)
    alone = run_steps(TrainJob(spec_of(short.folder, "ddp", {}), short.data), lambda _: True)
    same_curves(short.ended["gone on"].result, alone)


def test_a_sharded_checkpoint_holds_whole_adapters_and_each_ranks_state(short: Strategies) -> None:
    run = short.run
    names = run.store.list(*run.checkpoints("checkpoint-6"))
    assert "adapter_model.safetensors" in names
    assert not [name for name in names if name.endswith(".py")], "no copies of DeepSpeed's programs"
    folder = run.store.local_dir(*run.checkpoints("checkpoint-6"))
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    assert len(shapes) == 2 * 7 * 2
    assert {shape for name, shape in shapes.items() if "gate_proj.lora_A" in name} == {(16, 64)}
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    assert sorted(file for file in files if "_rank_1_" in file or file.endswith("state_1.pth")) == [
        "global_step6/zero_pp_rank_1_mp_rank_00_model_states.pt",
        "global_step6/zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "rng_state_1.pth",
    ]


def test_what_this_machine_lacks_is_told_before_anything_starts(folder: Path) -> None:
    disk = {"strategy.kind": "zero3", "strategy.offload_optimizer": "nvme", "strategy.nvme_path": "/disk"}
    if ctypes.util.find_library("aio") is None:
        with pytest.raises(ConfigError, match=r"no libaio.*\n.*async_io.*\n.*offload to cpu"):
            check(task(folder, **disk))
    with pytest.raises(ConfigError, match=r"float32 alone\n.*--set quant.dtype=float32"):
        check(task(folder, **{"strategy.kind": "zero3", "quant.dtype": "bfloat16"}))
    with pytest.raises(DataError, match="2 rows for num_workers=4"):
        check(task(folder, **{"strategy.kind": "zero3", "data.eval_rows": 2, "num_workers": 4}))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("count", [3, 7, 8, 10])
@pytest.mark.parametrize("micro", [1, 4])
def test_held_out_rows_make_equally_many_passes_on_each_rank(world: int, count: int, micro: int) -> None:
    parts = [share(np.arange(count) % 4, micro, rank, world) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    assert sorted(row for part in parts for batch in part for row in batch) == list(range(count))
    assert max(len(batch) for part in parts for batch in part) <= max(micro, math.ceil(count / world))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"strategy.offload_optimizer": "cpu"}, "Set strategy.kind=zero2"),
        ({"strategy.kind": "zero2", "strategy.offload_weights": "cpu"}, "Set strategy.kind=zero3"),
        ({"strategy.kind": "zero2", "strategy.offload_optimizer": "nvme"}, "Set strategy.kind=zero3"),
        ({"strategy.kind": "zero3", "strategy.offload_optimizer": "nvme"}, "needs strategy.nvme_path"),
        ({"strategy.nvme_path": "/disk"}, "nothing is offloaded to nvme"),
        (
            {"strategy.kind": "fsdp2", "strategy.offload_optimizer": "cpu"},
            "offload_weights=cpu takes it along",
        ),
        (
            {"strategy.kind": "fsdp2", "strategy.offload_weights": "cpu", "gpus_per_worker": 0},
            "in the host's memory already",
        ),
        ({"strategy.kind": "fsdp2", "quant.kind": "int8"}, "Set quant.kind=nf4"),
        ({"strategy.kind": "zero3", "quant": {"kind": "nf4"}, "gpus_per_worker": 1}, "Set strategy.kind=fsdp2"),
        ({"strategy.kind": "zero2", "quant.kind": "none", "gpus_per_worker": 1}, "Set quant.dtype=auto"),
        ({"strategy.kind": "zero3", "adapter.kind": "prefix"}, "Set strategy.kind=zero2"),
        ({"strategy.kind": "zero3", "objective.kind": "dpo"}, "Set strategy.kind=fsdp2 or zero2"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_alternative(
    folder: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        task(folder, **changes)
    assert says in str(refused.value)
