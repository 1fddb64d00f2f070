"""Training of all weights: no adapter, and the run ends in a new base."""

from typing import TYPE_CHECKING, ClassVar, Literal

from graftwork.adapters.kind import FP32, AdapterKind, TrainingKeys, ValueBytes

if TYPE_CHECKING:
    from graftwork.base.model_shape import ModelShape


class FullSpec(AdapterKind):
    """All weights, in fp32. The run ends in a new base, `<root>/bases/<name>/<version>`, rather than an adapter."""

    learning_rates: ClassVar[tuple[float, float]] = (1e-5, 1e-3)
    """All weights of instruction-tuned models are usually trained at 1e-5 to 1e-4, small models higher. Measured on
    SmolLM2-135M, short runs (docs/guide-training.md): 2e-4."""
    trains_base: ClassVar[bool] = True
    trains_tokens: ClassVar[bool] = True

    kind: Literal["full"] = "full"

    def describe(self) -> str:
        """Return the adapter in a few words."""
        return "all weights"

    def check_run(self, run: TrainingKeys) -> None:
        """Raise ValueError for a quantised base, the default learning rate, or an adapter to start from."""
        if run.quant.is_packed:
            raise ValueError(
                f"quant.kind={run.quant.kind} can't go with adapter.kind=full: quantised weights have no gradient. Set "
                "quant.kind=none, or train a LoRA on the quantised base (QLoRA): adapter.kind=lora"
            )
        if "lr" not in run.optim.model_fields_set:
            raise ValueError(
                f"adapter.kind=full needs optim.lr: the default of {run.optim.lr:g} is LoRA's and would undo what the "
                "base knows. 1e-5 to 5e-5 is usual for all weights"
            )
        if run.init_from is not None:
            raise ValueError(
                f"init_from={run.init_from} can't go with adapter.kind=full: an adapter is no start for all weights. "
                "Set base to the base to go on from"
            )

    def trained_params(self, model: "ModelShape") -> int:
        """Return the values of the text decoder and the head."""
        return model.params - model.outside_params

    def saved_bytes(self, model: "ModelShape", size: ValueBytes) -> float:
        """Return the bytes of the inputs of all linears: all weights need them, a frozen block does not."""
        h, i = model.hidden, model.intermediate
        if size.computed == FP32:  # the normed inputs, q's, gate's and down's; o's is the attention's output
            return 4 * h * FP32 + i * size.computed
        return 2 * h * FP32 + (5 * h + i) * size.computed  # under autocast each linear saves its own input in 16 bits
