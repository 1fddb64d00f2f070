"""Bottleneck adapters: a small two-layer network behind the last linear of a block.

PEFT has no such kind: `compat.peft_bottleneck` adds it to PEFT. The form on disk follows PEFT's:

    adapter_config.json  peft_type "BOTTLENECK", bottleneck_size, activation (relu, gelu, silu, tanh), use_bias,
                         scaling, target_modules and exclude_modules as in PEFT, e.g. ["o_proj", "down_proj"]
    weights              base_model.model.MODULE.bottleneck_down.weight [size, out], .bottleneck_up.weight [out, size],
                         and with use_bias .bottleneck_down.bias [size], .bottleneck_up.bias [out]

    result + up(activation(down(result))) * scaling
"""

import re
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from pydantic import Field

from graftwork.adapters.kind import ATTENTION_ENDS, MLP_ENDS, AdapterKind, ValueBytes, ends

if TYPE_CHECKING:
    from graftwork.base.model_shape import ModelShape
    from graftwork.compat.peft_bottleneck import BottleneckConfig

Activation = Literal["relu", "gelu", "silu", "tanh"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
DOWN_KEY = re.compile(r"(?P<module>.+)\.bottleneck_down\.weight")


class BottleneckSpec(AdapterKind):
    """Small two-layer networks inside each block (Houlsby, arXiv 1902.00751; Pfeiffer, arXiv 2005.00247)."""

    peft_type: ClassVar[str] = "BOTTLENECK"
    learning_rates: ClassVar[tuple[float, float]] = (1e-4, 1e-2)
    """Houlsby et al. tried 3e-5 to 3e-3, AdapterHub takes 1e-4. Measured on SmolLM2-135M, short runs
    (docs/guide-training.md): 2e-3."""

    kind: Literal["bottleneck"] = "bottleneck"
    placement: Literal["houlsby", "pfeiffer"] = "pfeiffer"
    """houlsby: behind the attention's and the MLP's output; pfeiffer: behind the MLP's alone."""
    size: int = Field(default=48, ge=1)
    """Width of the hidden layer."""
    activation: Activation = "gelu"

    @property
    def block_ends(self) -> tuple[tuple[str, ...], ...]:
        """Names of the linears that have a network behind them, block by block."""
        return (MLP_ENDS,) if self.placement == "pfeiffer" else (MLP_ENDS, ATTENTION_ENDS)

    def describe(self) -> str:
        """Return the adapter in a few words."""
        return f"{self.placement.capitalize()} bottleneck of {self.size}"

    def peft_config(self, model: Any) -> "BottleneckConfig":
        """Return the config of our PEFT tuner. Raises ConfigError where the model has no such layers."""
        from graftwork.compat.peft_bottleneck import BottleneckConfig, register

        register()
        asked = f"adapter.kind=bottleneck, placement={self.placement}"
        return BottleneckConfig(
            bottleneck_size=self.size,
            activation=self.activation,
            target_modules={name for block in self.block_ends for name in ends(asked, block, model)},
            task_type="CAUSAL_LM",
        )

    def trained_params(self, model: "ModelShape") -> int:
        """Return the values of down and up with their biases."""
        names = tuple(name for block in self.block_ends for name in block)
        widths = ((linear.count, linear.outputs) for linear in model.match_layers(names))
        return sum(count * (2 * width * self.size + self.size + width) for count, width in widths)

    def saved_bytes(self, model: "ModelShape", size: ValueBytes) -> float:
        """Return the bytes of each network's input, and of its hidden layer before and after the activation."""
        return len(self.block_ends) * (model.hidden + 2 * self.size) * size.computed
