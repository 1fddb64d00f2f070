"""What kinds of adapter can't go together with, told before anything starts."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graftwork.training.spec import TrainSpec


def check_adapter(spec: "TrainSpec") -> None:
    """Raises ValueError for keys that can't go with the spec's kind of adapter, or can't take effect with it."""
    if spec.adapter.kind == "full":
        _check_full(spec)
    if spec.adapter.kind == "prefix" and spec.optim.gradient_checkpointing:
        raise ValueError(
            "optim.gradient_checkpointing=true can't go with adapter.kind=prefix: the prefix is a KV cache, which no "
            "block computed again would find. Set optim.gradient_checkpointing=false and a smaller optim.micro_batch, "
            "or adapter.kind=lora"
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
    if spec.alias is not None and "alias" in spec.model_fields_set:
        raise ValueError(
            f"alias={spec.alias} can't take effect with adapter.kind=full: the new base is named by its place, "
            "<root>/bases/<name>/<version>. Leave alias out"
        )
