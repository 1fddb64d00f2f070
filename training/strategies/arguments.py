"""A strategy as transformers' TrainingArguments take it."""

from typing import Any, Literal

from graftwork.base_model import ResolvedBase
from graftwork.step_plan import StepPlan
from graftwork.training.spec import TrainSpec
from graftwork.training.strategies import deepspeed, fsdp2


def strategy_arguments(
    spec: TrainSpec, plan: StepPlan, world: int, base: ResolvedBase, *, universal: bool = False
) -> dict[str, Any]:
    """The arguments that a strategy adds or changes; ddp none. Called on all ranks.

    `universal`: DeepSpeed goes on from a checkpoint in its universal form, which any number of workers loads.
    """
    if spec.strategy.kind in deepspeed.STAGES:
        deepspeed.prepare_process(spec)
        settings = deepspeed.settings(spec, plan, world, deepspeed.width(base))
        return {"deepspeed": {**settings, "checkpoint": {"load_universal": True}} if universal else settings}
    return fsdp2.settings(spec) if spec.strategy.kind == "fsdp2" else {}


def layout(spec: TrainSpec) -> Literal["none", "zero3", "fsdp2"]:
    """How the base is to lie in memory when it is loaded."""
    kind = spec.strategy.kind
    return kind if kind in ("zero3", "fsdp2") else "none"
