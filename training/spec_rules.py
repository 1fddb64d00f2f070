"""Keys of a run that cannot be combined with a kind of adapter; docs/guide-training.md has the whole table."""

from typing import TYPE_CHECKING

from graftwork.adapters.spec import LoraSpec

if TYPE_CHECKING:
    from graftwork.training.spec import TrainSpec


def check_adapter(spec: "TrainSpec") -> None:
    """Raises ValueError for keys that can't go with the spec's kind of adapter, or can't take effect with it."""
    if spec.adapter.kind == "full":
        _check_full(spec)
    if spec.base_adapter is not None:
        _check_stack(spec, spec.base_adapter)
    checkpointing = spec.optim.gradient_checkpointing
    if spec.adapter.kind == "prefix" and checkpointing:
        raise ValueError(
            f"optim.gradient_checkpointing={checkpointing} can't go with adapter.kind=prefix: the prefix is KV, "
            "which no block computed again would find. Set optim.gradient_checkpointing=false and a smaller "
            "optim.micro_batch, or adapter.kind=lora"
        )


def _check_full(spec: "TrainSpec") -> None:
    if spec.quant.kind != "none":
        raise ValueError(
            f"quant.kind={spec.quant.kind} can't go with adapter.kind=full: quantised weights have no gradient. Set "
            "quant.kind=none, or train a LoRA on the quantised base (QLoRA): adapter.kind=lora"
        )
    if "lr" not in spec.optim.model_fields_set:
        raise ValueError(
            f"adapter.kind=full needs optim.lr: the default of {spec.optim.lr:g} is LoRA's and would undo what the "
            "base knows. 1e-5 to 5e-5 is usual for all weights"
        )
    if spec.init_from is not None:
        raise ValueError(
            f"init_from={spec.init_from} can't go with adapter.kind=full: an adapter is no start for all weights. Set "
            "base to the base to go on from"
        )
    if spec.alias not in (None, type(spec).model_fields["alias"].default):
        raise ValueError(
            f"alias={spec.alias} can't take effect with adapter.kind=full: the new base is named by its place, "
            "<root>/bases/<name>/<version>. Leave alias out"
        )


def _check_stack(spec: "TrainSpec", below: str) -> None:
    """Both are published as one adapter, their exact sum: so both must be plain deltas, and nothing else trained."""
    if not isinstance(spec.adapter, LoraSpec) or spec.adapter.dora:
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
