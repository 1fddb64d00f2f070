"""What a strategy can't be combined with, told before anything starts; docs/guide-training.md has the whole table."""

import ctypes.util
import shutil
from typing import TYPE_CHECKING

from graftwork.adapters.spec import kinds_with
from graftwork.errors import ConfigError, DataError
from graftwork.quantization.spec import compute_dtype
from graftwork.training.objectives.spec import DistillSpec, DpoSpec, RewardSpec

if TYPE_CHECKING:
    from graftwork.training.spec import TrainSpec


# What kinds of adapter can't go together with, told before anything starts.


def check_adapter(spec: "TrainSpec") -> None:
    """Raises ValueError for keys that can't go with the spec's kind of adapter, or can't take effect with it."""
    spec.adapter.check_run(spec)
    if spec.adapter.trains_base and spec.alias not in (None, type(spec).model_fields["alias"].default):
        raise ValueError(
            f"alias={spec.alias} can't take effect with adapter.kind={spec.adapter.kind}: the new base is named by its "
            "place, <root>/bases/<name>/<version>. Leave alias out"
        )
    if spec.base_adapter is not None:
        _check_stack(spec, spec.base_adapter)
    checkpointing = spec.optim.gradient_checkpointing
    if spec.adapter.virtual_tokens and checkpointing:
        raise ValueError(
            f"optim.gradient_checkpointing={checkpointing} can't go with adapter.kind={spec.adapter.kind}: it is KV, "
            "which no block computed again would find. Set optim.gradient_checkpointing=false and a smaller "
            "optim.micro_batch, or adapter.kind=lora"
        )


def _check_stack(spec: "TrainSpec", below: str) -> None:
    """Both are published as one adapter, their exact sum: so both must be plain deltas, and nothing else trained."""
    if not spec.adapter.adds_up:
        raise ValueError(
            f"base_adapter={below} can't go with adapter={spec.adapter.describe()}: the sum of both is published, "
            "and only a LoRA without DoRA adds to one. Set adapter.kind=lora"
        )
    if spec.init_from is not None:
        raise ValueError(
            f"base_adapter={below} can't go with init_from={spec.init_from}: init_from is trained on, base_adapter "
            "stays frozen. Give one of them"
        )
    if spec.objective.kind in ("reward", "fim"):
        raise ValueError(
            f"base_adapter={below} can't go with objective.kind={spec.objective.kind}: a score head or trained "
            "tokens are no part of a sum. Leave base_adapter out"
        )
    if below.partition("@")[0] == spec.name:
        raise ValueError(
            f"base_adapter={below} can't name the task itself: each run would build on the one before. Set "
            "init_from to continue it, or set name to another task"
        )


# What a kind of finetuning can't be combined with: refused when the spec is read.


def taken_effect(spec: "TrainSpec") -> None:
    """Raise ValueError where a key can't take effect, or can't be kept, beside `objective`."""
    objective, adapter = spec.objective, spec.adapter
    if not isinstance(objective, DpoSpec | RewardSpec | DistillSpec):
        return
    where = f"objective.kind={objective.kind}"
    written = isinstance(objective, DistillSpec) and objective.generate is not None
    if spec.strategy.kind == "zero3" and not written:
        raise ValueError(
            f"strategy.kind=zero3 can't go with {where}: a second model, a head or a reference is needed "
            "while the weights are in pieces. Set strategy.kind=fsdp2 or zero2"
        )
    if isinstance(objective, DistillSpec):
        _check_teacher(spec, objective)
        return
    if spec.data.context is not None:
        raise ValueError(f"data.context can't take effect with {where}: put the passages into the rows' prompts")
    if adapter.input_dropout:
        raise ValueError(
            f"adapter.dropout={adapter.input_dropout:g} can't take effect with {where}: two answers are "
            "compared by the same weights, so TRL switches dropout off"
        )
    if isinstance(objective, RewardSpec) and not adapter.trains_score_head:
        raise ValueError(
            f"adapter.kind={adapter.kind} with {where}: a reward model is a {kinds_with('trains_score_head')} adapter "
            "with a score head"
        )


def _check_teacher(spec: "TrainSpec", objective: DistillSpec) -> None:
    teacher = objective.teacher
    if objective.generate is not None and spec.data.context is not None:
        raise ValueError("data.context can't take effect with objective.generate: the teacher answers without it")
    alike = teacher is not None and teacher.adapter is None and teacher.quant in (None, spec.quant)
    if teacher is not None and alike and teacher.base == spec.base:
        raise ValueError(
            "objective.teacher is the run's own base, from which nothing can be learned: name another "
            "base, an adapter or another quant"
        )


ZERO = ("zero1", "zero2", "zero3")
WEIGHTS_SHARDED = ("zero3", "fsdp2")
"""No worker has all weights: every forward pass is one of all workers; outcomes are measured after training, apart."""


def check_strategy(spec: "TrainSpec") -> None:
    """Raises ValueError for keys that can't go with the spec's strategy, or can't take effect with it."""
    _check_offload(spec)
    _check_precision(spec)
    _check_kinds(spec)
    if spec.optim.factors and spec.strategy.kind in ZERO:
        raise ValueError(
            f"optim.factors can't take effect with strategy.kind={spec.strategy.kind}: DeepSpeed's optimizer keeps the "
            "rate to itself. Set strategy.kind=ddp or fsdp2"
        )


def check_here(spec: "TrainSpec") -> None:
    """Raises ConfigError for what the strategy needs of a machine and this one lacks or has otherwise."""
    _check_disks(spec)
    if spec.strategy.kind != "zero3" or spec.gpus:
        return
    dtype, reason = compute_dtype(spec.quant, "cpu")
    if str(dtype) != "torch.float32":
        raise ConfigError(
            f"quant.dtype={spec.quant.dtype} with strategy.kind=zero3 and gpus_per_worker=0",
            f"weights would be in bfloat16 ({reason})",
            "on a CPU DeepSpeed 0.19 reads weights in parts in float32 alone",
            "--set quant.dtype=float32, or --set strategy.kind=zero2",
        )


def _check_disks(spec: "TrainSpec") -> None:
    strategy = spec.strategy
    key = next((key for key in ("offload_optimizer", "offload_weights") if getattr(strategy, key) == "nvme"), None)
    if key is None:
        return
    missing = [
        name
        for name, there in (
            ("libaio (apt-get install libaio-dev)", ctypes.util.find_library("aio")),
            ("a C++ compiler", shutil.which("c++")),
        )
        if not there
    ]
    if missing:
        raise ConfigError(
            "strategy.offload_optimizer=nvme"
            if strategy.offload_optimizer == "nvme"
            else "strategy.offload_weights=nvme",
            f"this machine has no {' and no '.join(missing)}",
            "DeepSpeed builds its reader of disks (async_io) on each machine, once",
            "install it on all machines of the cluster and on this one, or offload to cpu",
        )


def check_rows(spec: "TrainSpec", held_out: int) -> None:
    """Raises DataError for fewer held-out rows than workers, where every forward pass is one of all workers."""
    if spec.strategy.kind in WEIGHTS_SHARDED and 0 < held_out < spec.num_workers:
        raise DataError(
            f"data.eval with strategy.kind={spec.strategy.kind}",
            f"{held_out} rows for num_workers={spec.num_workers}",
            "each forward pass is one of all workers, so each needs a row",
            f"give at least {spec.num_workers} held-out rows, or set strategy.kind=zero2",
        )


def _check_offload(spec: "TrainSpec") -> None:
    strategy, kind = spec.strategy, spec.strategy.kind
    if strategy.offload_optimizer != "none" and kind not in ZERO:
        other = "strategy.offload_weights=cpu takes it along" if kind == "fsdp2" else "Set strategy.kind=zero2"
        raise ValueError(
            f"strategy.offload_optimizer={strategy.offload_optimizer} can't take effect with strategy.kind={kind}: "
            f"DeepSpeed's stages can (zero1, zero2, zero3). {other}"
        )
    if strategy.offload_weights != "none" and kind not in WEIGHTS_SHARDED:
        raise ValueError(
            f"strategy.offload_weights={strategy.offload_weights} can't take effect with strategy.kind={kind}: every "
            "worker computes with its own copy of the weights. Set strategy.kind=zero3"
        )
    if kind == "fsdp2" and strategy.offload_weights == "nvme":
        raise ValueError("strategy.offload_weights=nvme can't go with strategy.kind=fsdp2: set strategy.kind=zero3")
    if kind == "fsdp2" and strategy.offload_weights == "cpu" and spec.gpus_per_worker == 0:
        raise ValueError(
            "strategy.offload_weights=cpu can't take effect with strategy.kind=fsdp2 and gpus_per_worker=0: the "
            "weights are in the host's memory already. Leave it out"
        )
    nvme = "nvme" in (strategy.offload_optimizer, strategy.offload_weights)
    if nvme and strategy.offload_optimizer == "nvme" and kind != "zero3":
        raise ValueError(
            f"strategy.offload_optimizer=nvme can't go with strategy.kind={kind}: DeepSpeed moves state to disks in "
            "stage 3 alone. Set strategy.kind=zero3, or strategy.offload_optimizer=cpu"
        )
    if nvme and not strategy.nvme_path:
        raise ValueError("an offload to nvme needs strategy.nvme_path: a folder on a fast disk of each machine")
    if strategy.nvme_path and not nvme:
        raise ValueError(f"strategy.nvme_path={strategy.nvme_path} can't take effect: nothing is offloaded to nvme")


def _check_kinds(spec: "TrainSpec") -> None:
    kind, objective = spec.strategy.kind, spec.objective
    if spec.adapter.virtual_tokens and kind in WEIGHTS_SHARDED:
        raise ValueError(
            f"adapter.kind={spec.adapter.kind} can't go with strategy.kind={kind}: PEFT computes it outside of the "
            "model, where its weights are in parts. Set strategy.kind=zero2"
        )
    if kind == "fsdp2" and isinstance(objective, DistillSpec) and objective.on_policy > 0:
        raise ValueError(
            f"objective.on_policy={objective.on_policy:g} can't go with strategy.kind=fsdp2: the workers' samples end "
            "after different numbers of passes. Set objective.on_policy=0, or strategy.kind=zero2"
        )


def _check_precision(spec: "TrainSpec") -> None:
    kind, quant = spec.strategy.kind, spec.quant
    if kind in ZERO and spec.gpus and spec.quant.dtype == "float32":
        raise ValueError(
            f"quant.dtype=float32 can't take effect with strategy.kind={kind} on GPUs: DeepSpeed computes in bf16 and "
            "steps fp32 copies. Set quant.dtype=auto, or strategy.kind=ddp"
        )
    if kind == "fsdp2" and not quant.method.shards_in_fsdp2:
        raise ValueError(
            f"quant.kind={quant.kind} can't go with strategy.kind=fsdp2: sharding takes bitsandbytes' scales off the "
            "weights (0.50: 'Parameter' object has no attribute 'CB'). Set quant.kind=nf4, or strategy.kind=zero2"
        )
    if kind == "zero3" and quant.is_packed and spec.gpus:
        raise ValueError(
            f"quant.kind={quant.kind} can't go with strategy.kind=zero3 on GPUs: each GPU would first hold the whole "
            "base (transformers issue 26412, PEFT issue 2016). Set strategy.kind=fsdp2, which shards an nf4 base, or "
            "zero2"
        )
