"""FSDP2: torch's `fully_shard` on every block, through accelerate."""

from typing import Any

from graftwork.compat.hf import shard_on_cpu
from graftwork.training.spec import TrainSpec


def settings(spec: TrainSpec) -> dict[str, Any]:
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
