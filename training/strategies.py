"""Strategies: how the workers of a run share model and optimizer, as a spec and as arguments of transformers' Trainer.

ZeRO 1, 2 and 3 are DeepSpeed 0.19's. The batch is ours (`StepPlan`), so nothing is "auto"; the optimizer is torch's
AdamW, which transformers' Trainer makes, also where its state is offloaded: fused on a CPU since torch 2.4, and nothing
is compiled for it.
"""

from __future__ import annotations

import ctypes.util
import os
import shutil
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from graftwork.config import Spec
from graftwork.errors import ConfigError, DataError
from graftwork.quantization import compute_dtype

if TYPE_CHECKING:
    from graftwork.base.load import ResolvedBase
    from graftwork.training.loop import StepPlan
    from graftwork.training.spec import TrainSpec

ZERO = ("zero1", "zero2", "zero3")
WEIGHTS_SHARDED = ("zero3", "fsdp2")
"""No worker has all weights: every forward pass is one of all workers; outcomes are measured after training, apart."""


class StrategySpec(Spec):
    """No part of a run's identity: every strategy computes the same step."""

    kind: Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"] = "ddp"
    """ddp: a copy a worker. zero1/2/3: DeepSpeed shards optimizer / + gradients / + weights (arXiv 1910.02054). fsdp2:
    torch shards all three, an nf4 base included."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where a GPU's part of the optimizer's state lies; zero1, zero2, zero3; nvme zero3 alone."""
    offload_weights: Literal["none", "cpu", "nvme"] = "none"
    """Where a GPU's part of the weights lies; zero3, and fsdp2 on GPUs (with the optimizer's state, cpu alone)."""
    nvme_path: str | None = None
    """Folder on a fast disk of each machine, where something is offloaded to nvme."""
    context_parallel: int = Field(default=1, ge=1)
    """Workers that share one row, each with an equal part of its tokens, for rows that are too long for one worker
    (DeepSpeed-Ulysses, arXiv 2309.14509). Divides `num_workers` and the base's attention heads."""

    def check(self, run: TrainSpec) -> None:
        """Raise ValueError for keys of the run that cannot be combined with this strategy, or have no effect."""
        self._check_offload(run)
        self._check_precision(run)
        self._check_context_parallel(run)
        if run.adapter.virtual_tokens and self.kind in WEIGHTS_SHARDED:
            raise ValueError(
                f"adapter.kind={run.adapter.kind} can't go with strategy.kind={self.kind}: PEFT computes it outside of "
                "the model, where its weights are in parts. Set strategy.kind=zero2"
            )
        if run.optim.factors and self.kind in ZERO:
            raise ValueError(
                f"optim.factors can't take effect with strategy.kind={self.kind}: DeepSpeed's optimizer keeps the "
                "rate to itself. Set strategy.kind=ddp or fsdp2"
            )

    def _check_offload(self, run: TrainSpec) -> None:
        kind = self.kind
        if self.offload_optimizer != "none" and kind not in ZERO:
            other = "strategy.offload_weights=cpu takes it along" if kind == "fsdp2" else "Set strategy.kind=zero2"
            raise ValueError(
                f"strategy.offload_optimizer={self.offload_optimizer} can't take effect with strategy.kind={kind}: "
                f"DeepSpeed's stages can (zero1, zero2, zero3). {other}"
            )
        if self.offload_weights != "none" and kind not in WEIGHTS_SHARDED:
            raise ValueError(
                f"strategy.offload_weights={self.offload_weights} can't take effect with strategy.kind={kind}: every "
                "worker computes with its own copy of the weights. Set strategy.kind=zero3"
            )
        if kind == "fsdp2" and self.offload_weights == "nvme":
            raise ValueError("strategy.offload_weights=nvme can't go with strategy.kind=fsdp2: set strategy.kind=zero3")
        if kind == "fsdp2" and self.offload_weights == "cpu" and run.gpus_per_worker == 0:
            raise ValueError(
                "strategy.offload_weights=cpu can't take effect with strategy.kind=fsdp2 and gpus_per_worker=0: the "
                "weights are in the host's memory already. Leave it out"
            )
        nvme = "nvme" in (self.offload_optimizer, self.offload_weights)
        if nvme and self.offload_optimizer == "nvme" and kind != "zero3":
            raise ValueError(
                f"strategy.offload_optimizer=nvme can't go with strategy.kind={kind}: DeepSpeed moves state to disks "
                "in stage 3 alone. Set strategy.kind=zero3, or strategy.offload_optimizer=cpu"
            )
        if nvme and not self.nvme_path:
            raise ValueError("an offload to nvme needs strategy.nvme_path: a folder on a fast disk of each machine")
        if self.nvme_path and not nvme:
            raise ValueError(f"strategy.nvme_path={self.nvme_path} can't take effect: nothing is offloaded to nvme")

    def _check_context_parallel(self, run: TrainSpec) -> None:
        size = self.context_parallel
        if size == 1:
            return
        key = f"strategy.context_parallel={size}"
        if run.num_workers % size:
            raise ValueError(f"num_workers={run.num_workers} must be a multiple of {key}: so many workers share a row")
        if self.kind not in ("ddp", "fsdp2"):
            raise ValueError(
                f"{key} can't go with strategy.kind={self.kind}: DeepSpeed weighs the gradients of workers as those of "
                "whole rows. Set strategy.kind=fsdp2 or ddp"
            )
        if run.objective.kind not in ("sft", "cpt"):
            raise ValueError(
                f"{key} can't go with objective.kind={run.objective.kind}: the loss must be a sum over tokens, as in "
                "sft and cpt"
            )
        if run.objective.traits.packing != "none":
            raise ValueError(
                f"{key} can't go with objective.packing={run.objective.traits.packing}: documents of a row would see "
                "each other. Set objective.packing=none"
            )
        if getattr(run.objective, "answers", None) is not None:
            raise ValueError(f"{key} can't go with objective.answers: a worker has a part of each row alone")
        if run.outcomes.task or run.outcomes.retention or run.outcomes.fairness:
            raise ValueError(f"{key} can't go with outcomes: a worker has a part of each row alone. Leave outcomes out")
        if run.adapter.virtual_tokens:
            raise ValueError(
                f"{key} can't go with adapter.kind={run.adapter.kind}: its virtual tokens stand in one part"
            )
        if run.recovery.min_workers is not None and run.recovery.min_workers % size:
            raise ValueError(f"recovery.min_workers={run.recovery.min_workers} must be a multiple of {key}")

    def _check_precision(self, run: TrainSpec) -> None:
        kind, quant = self.kind, run.quant
        if kind in ZERO and run.gpus and quant.dtype == "float32":
            raise ValueError(
                f"quant.dtype=float32 can't take effect with strategy.kind={kind} on GPUs: DeepSpeed computes in bf16 "
                "and steps fp32 copies. Set quant.dtype=auto, or strategy.kind=ddp"
            )
        if kind in ("fsdp2", "zero3") and quant.method.keeps_checkpoint:
            raise ValueError(
                f"quant.kind={quant.kind} can't go with strategy.kind={kind}: the packed weights of a checkpoint are "
                "not sharded. Set strategy.kind=zero2, or quant.kind=nf4 with strategy.kind=fsdp2"
            )
        if kind == "fsdp2" and not quant.method.shards_in_fsdp2:
            raise ValueError(
                f"quant.kind={quant.kind} can't go with strategy.kind=fsdp2: sharding takes bitsandbytes' scales "
                "off the weights (0.50: 'Parameter' object has no attribute 'CB'). Set quant.kind=nf4, or "
                "strategy.kind=zero2"
            )
        if kind == "zero3" and quant.is_packed and run.gpus:
            raise ValueError(
                f"quant.kind={quant.kind} can't go with strategy.kind=zero3 on GPUs: each GPU would first hold the "
                "whole base (transformers issue 26412, PEFT issue 2016). Set strategy.kind=fsdp2, which shards an nf4 "
                "base, or zero2"
            )


def check_here(spec: TrainSpec) -> None:
    """Raise ConfigError for what the strategy needs of a machine and this one lacks or has otherwise."""
    strategy = spec.strategy
    key = next((key for key in ("offload_optimizer", "offload_weights") if getattr(strategy, key) == "nvme"), None)
    if key is not None:
        libaio, compiler = ctypes.util.find_library("aio"), shutil.which("c++")
        missing = [] if libaio else ["libaio (apt-get install libaio-dev)"]
        missing += [] if compiler else ["a C++ compiler"]
        if missing:
            raise ConfigError(
                f"strategy.{key}=nvme",
                f"this machine has no {' and no '.join(missing)}",
                "DeepSpeed builds its reader of disks (async_io) on each machine, once",
                "install it on all machines of the cluster and on this one, or offload to cpu",
            )
    if strategy.kind == "zero3" and not spec.gpus:
        dtype, reason = compute_dtype(spec.quant, "cpu")
        if str(dtype) != "torch.float32":
            raise ConfigError(
                f"quant.dtype={spec.quant.dtype} with strategy.kind=zero3 and gpus_per_worker=0",
                f"weights would be in bfloat16 ({reason})",
                "on a CPU DeepSpeed 0.19 reads weights in parts in float32 alone",
                "--set quant.dtype=float32, or --set strategy.kind=zero2",
            )


def check_rows(spec: TrainSpec, held_out: int) -> None:
    """Raise DataError for fewer held-out rows than workers, where every forward pass is one of all workers."""
    if spec.strategy.kind in WEIGHTS_SHARDED and 0 < held_out < spec.num_workers:
        raise DataError(
            f"data.eval with strategy.kind={spec.strategy.kind}",
            f"{held_out} rows for num_workers={spec.num_workers}",
            "each forward pass is one of all workers, so each needs a row",
            f"give at least {spec.num_workers} held-out rows, or set strategy.kind=zero2",
        )


def strategy_arguments(
    spec: TrainSpec, plan: StepPlan, world: int, base: ResolvedBase, *, universal: bool = False
) -> dict[str, Any]:
    """The arguments that a strategy adds or changes; ddp none. Called on all ranks.

    `universal`: DeepSpeed goes on from a checkpoint in its universal form, which any number of workers loads.
    """
    if spec.strategy.kind in STAGES:
        prepare_process(spec)
        settings = deepspeed_settings(spec, plan, world, base)
        return {"deepspeed": {**settings, "checkpoint": {"load_universal": True}} if universal else settings}
    return fsdp2_settings(spec) if spec.strategy.kind == "fsdp2" else {}


STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
LEAST_BUCKET_VALUES = 500_000
"""Values of one reduction or gathering are hidden_size squared, as accelerate has it, but never fewer: a copy of them
lives next to gradients and weights."""
PERSISTENT_ROWS = 10
"""Under ZeRO-3 tensors of at most so many times hidden_size (norms, biases, small adapters) stay whole everywhere."""


def deepspeed_settings(spec: TrainSpec, plan: StepPlan, world: int, base: ResolvedBase) -> dict[str, Any]:
    """DeepSpeed's configuration for a run of `world` workers on a base."""
    sizes = (base.config.get(key) for key in ("hidden_size", "n_embd", "d_model"))
    return {
        "train_batch_size": plan.micro_batch * plan.accumulation * world,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": spec.optim.max_grad_norm,
        "bf16": {"enabled": spec.gpus > 0},
        "zero_optimization": _zero(spec, int(next((size for size in sizes if size), 1024))),
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }


def _zero(spec: TrainSpec, hidden_size: int) -> dict[str, Any]:
    strategy, bucket = spec.strategy, max(hidden_size**2, LEAST_BUCKET_VALUES)
    zero: dict[str, Any] = {
        "stage": STAGES[strategy.kind],
        "overlap_comm": spec.gpus > 0,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if strategy.kind == "zero3":
        zero |= {
            "stage3_prefetch_bucket_size": bucket,
            "stage3_param_persistence_threshold": PERSISTENT_ROWS * hidden_size,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    offloads = {"offload_optimizer": strategy.offload_optimizer, "offload_param": strategy.offload_weights}
    for key, device in offloads.items():
        if device != "none":
            where = {"nvme_path": strategy.nvme_path} if device == "nvme" else {}
            zero[key] = {"device": device, "pin_memory": spec.gpus > 0, **where}
    return zero


def prepare_process(spec: TrainSpec) -> None:
    """Make DeepSpeed use this worker's process group of torch, and build nothing. Called on all ranks.

    On a CPU DeepSpeed 0.19 compiles a shared-memory operator (150 s, a C++ compiler needed), which it uses in inference
    alone (`inference_all_reduce` in deepspeed/comm/torch.py): its own table of usable operators is told no.
    """
    if not spec.gpus:
        os.environ["DS_ACCELERATOR"] = "cpu"
        from deepspeed import ops
        from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

        ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    import torch.distributed
    from deepspeed import comm

    if not comm.is_initialized():
        comm.init_distributed(torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False)


def sharding(spec: TrainSpec, plan: StepPlan, world: int, base: ResolvedBase) -> Any:
    """Under ZeRO-3: the object that makes transformers load a base in shards for as long as the object exists.

    A base that each worker first loaded whole would have to fit each worker, which is what ZeRO-3 is to avoid.
    """
    from transformers.integrations import HfDeepSpeedConfig

    prepare_process(spec)
    return HfDeepSpeedConfig(deepspeed_settings(spec, plan, world, base))


def fsdp2_settings(spec: TrainSpec) -> dict[str, Any]:
    """TrainingArguments of FSDP2."""
    if not spec.gpus:
        from graftwork.compat.hf import shard_on_cpu

        shard_on_cpu()
    return {
        "accelerator_config": {"use_configured_state": not spec.gpus},
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "reshard_after_forward": True,
            "cpu_offload": spec.strategy.offload_weights == "cpu",
            "state_dict_type": "FULL_STATE_DICT",
            "activation_checkpointing": spec.optim.gradient_checkpointing,
        },
        # FSDP's own, or each block's weights are gathered once more in the backward pass
        "activation_checkpointing": False,
    }


def notes(kind: str, model: Any, world: int) -> tuple[str, ...]:
    """The share of the weights that each worker holds; nothing where each has all of them. After training began."""
    if kind not in WEIGHTS_SHARDED:
        return () if kind == "ddp" else (f"strategy={kind} on {world} workers",)
    from torch.distributed.tensor import DTensor

    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # FSDP2 leaves the head's weights whole after a pass forward
    here = whole = 0
    for parameter in model.parameters():  # a tied weight counts once
        part = getattr(parameter, "ds_tensor", None)  # ZeRO-3
        if part is None:
            part = parameter.to_local() if isinstance(parameter, DTensor) else parameter  # FSDP2
        here += part.numel() * part.element_size()
        whole += getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
    assert world == 1 or here < whole, f"{kind} sharded nothing"  # accelerate 1.15 does so on a CPU, silently
    return (
        f"strategy={kind}: each of {world} workers holds {here / whole:.0%} of the weights' {whole / 2**20:.1f} MiB",
    )
