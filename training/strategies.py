"""ZeRO 1, 2 and 3 by DeepSpeed 0.19: its configuration, and the process that it runs in.

The batch is ours (`StepPlan`), so nothing is "auto"; the optimizer is torch's AdamW, which transformers' Trainer makes,
also where its state is offloaded: fused on a CPU since torch 2.4, and nothing is compiled for it.
"""

import os
from typing import Any, Literal

from torch.distributed.tensor import DTensor

from graftwork.base.load import ResolvedBase
from graftwork.compat.hf import shard_on_cpu
from graftwork.training.spec import TrainSpec
from graftwork.training.spec_rules import WEIGHTS_SHARDED
from graftwork.training.step_plan import StepPlan

# A strategy as transformers' TrainingArguments take it.


def strategy_arguments(
    spec: TrainSpec, plan: StepPlan, world: int, base: ResolvedBase, *, universal: bool = False
) -> dict[str, Any]:
    """The arguments that a strategy adds or changes; ddp none. Called on all ranks.

    `universal`: DeepSpeed goes on from a checkpoint in its universal form, which any number of workers loads.
    """
    if spec.strategy.kind in STAGES:
        prepare_process(spec)
        settings = deepspeed_settings(spec, plan, world, width(base))
        return {"deepspeed": {**settings, "checkpoint": {"load_universal": True}} if universal else settings}
    return fsdp2_settings(spec) if spec.strategy.kind == "fsdp2" else {}


def layout(spec: TrainSpec) -> Literal["none", "zero3", "fsdp2"]:
    """How the base is to lie in memory when it is loaded."""
    kind = spec.strategy.kind
    return kind if kind in ("zero3", "fsdp2") else "none"


STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
LEAST_BUCKET_VALUES = 500_000
"""Values of one reduction or gathering are hidden_size squared, as accelerate has it, but never fewer: a copy of them
lives beside gradients and weights."""
PERSISTENT_ROWS = 10
"""Under ZeRO-3 tensors of at most so many times hidden_size (norms, biases, small adapters) stay whole everywhere."""


def deepspeed_settings(spec: TrainSpec, plan: StepPlan, world: int, hidden_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a run of `world` workers on a base of that width."""
    return {
        "train_batch_size": plan.micro_batch * plan.accumulation * world,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": spec.optim.max_grad_norm,
        "bf16": {"enabled": spec.gpus > 0},
        "zero_optimization": _zero(spec, hidden_size),
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
    if strategy.offload_optimizer != "none":
        zero["offload_optimizer"] = _offload(spec, strategy.offload_optimizer)
    if strategy.offload_weights != "none":
        zero["offload_param"] = _offload(spec, strategy.offload_weights)
    return zero


def _offload(spec: TrainSpec, device: str) -> dict[str, Any]:
    where = {"nvme_path": spec.strategy.nvme_path} if device == "nvme" else {}
    return {"device": device, "pin_memory": spec.gpus > 0, **where}


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
    """Under ZeRO-3 what makes transformers load a base in shards for as long as it lives, else None.

    A base that each worker first loaded whole would have to fit each worker, which is what ZeRO-3 is to avoid.
    """
    if spec.strategy.kind != "zero3":
        return None
    from transformers.integrations import HfDeepSpeedConfig

    prepare_process(spec)
    return HfDeepSpeedConfig(deepspeed_settings(spec, plan, world, width(base)))


def width(base: ResolvedBase) -> int:
    """The base's hidden size, by the names that configurations have for it."""
    sizes = (base.config.get(key) for key in ("hidden_size", "n_embd", "d_model"))
    return int(next((size for size in sizes if size), 1024))


# FSDP2: torch's `fully_shard` on every block, through accelerate.


def fsdp2_settings(spec: TrainSpec) -> dict[str, Any]:
    """What TrainingArguments take for it."""
    if not spec.gpus:
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


# What a worker holds of the weights.


def held_bytes(model: Any) -> tuple[int, int]:
    """(bytes of the weights on this worker between passes, bytes of all weights). A tied weight counts once."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # FSDP2 keeps the head's weights whole after a pass forward
    here = whole = 0
    for parameter in model.parameters():
        part = getattr(parameter, "ds_tensor", None)  # ZeRO-3
        if part is None:
            part = parameter.to_local() if isinstance(parameter, DTensor) else parameter  # FSDP2
        here += part.numel() * part.element_size()
        whole += getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
    return here, whole


def notes(kind: str, model: Any, world: int) -> tuple[str, ...]:
    """What sharding came to; nothing where each worker holds all weights. After training began."""
    if kind not in WEIGHTS_SHARDED:
        return () if kind == "ddp" else (f"strategy={kind} on {world} workers",)
    here, whole = held_bytes(model)
    assert world == 1 or here < whole, f"{kind} sharded nothing"  # accelerate 1.15 does so on a CPU, silently
    return (
        f"strategy={kind}: each of {world} workers holds {here / whole:.0%} of the weights' {whole / 2**20:.1f} MiB",
    )
