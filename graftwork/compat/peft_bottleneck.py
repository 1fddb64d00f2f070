"""Bottleneck adapters (Houlsby, arXiv 1902.00751; Pfeiffer, arXiv 2005.00247) as a tuner of PEFT.

PEFT 0.21 has none, and AdapterHub's `adapters` pins transformers 4.57. As a tuner of PEFT it takes part in all that is
built on PEFT: TRL's trainers, saving and resuming, quantised bases, switching it off. The form on disk is the one that
`graftwork/adapters/bottleneck.py` defines:

    result + up(activation(down(result))) * scaling
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer

from graftwork.compat.hf import layer_tuner

KIND = "BOTTLENECK"
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.nn.functional.relu,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
}


@dataclass
class BottleneckConfig(PeftConfig):  # type: ignore[misc]  # peft has no types
    """adapter_config.json of a bottleneck adapter."""

    bottleneck_size: int = 48
    activation: str = "gelu"
    use_bias: bool = True
    scaling: float = 1.0
    target_modules: set[str] = field(default_factory=set)
    exclude_modules: set[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = KIND
        self.target_modules = set(self.target_modules)


class BottleneckLayer(torch.nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A linear with a small network behind it. The network begins as nothing: `up` is zero."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    # BaseTunerLayer's, which has no types
    active_adapters: list[str]
    disable_adapters: bool
    get_base_layer: Callable[[], torch.nn.Module]
    set_adapter: Callable[[str], None]

    def __init__(self, base_layer: torch.nn.Module, name: str, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down, self.bottleneck_up = torch.nn.ModuleDict(), torch.nn.ModuleDict()
        self.configs: dict[str, BottleneckConfig] = {}
        self.add(name, config)

    def add(self, name: str, config: BottleneckConfig) -> None:
        """Lay one more adapter on this linear, and make it the active one."""
        width = _width(self.get_base_layer())
        up = torch.nn.Linear(config.bottleneck_size, width, bias=config.use_bias)
        for parameter in up.parameters():
            torch.nn.init.zeros_(parameter)
        down = torch.nn.Linear(width, config.bottleneck_size, bias=config.use_bias)
        self.bottleneck_down[name], self.bottleneck_up[name] = down, up
        self.configs[name] = config
        self.set_adapter(name)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The linear's result and what the networks of the active adapters add to it."""
        result: torch.Tensor = self.base_layer(inputs)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name in self.configs:
                result = result + self._add_delta(name, result).to(result.dtype)
        return result

    def _add_delta(self, name: str, result: torch.Tensor) -> torch.Tensor:
        config, down = self.configs[name], self.bottleneck_down[name]
        hidden = ACTIVATIONS[config.activation](down(result.to(next(down.parameters()).dtype)))
        added: torch.Tensor = self.bottleneck_up[name](hidden)
        return added * config.scaling


class BottleneckModel(layer_tuner()):  # type: ignore[misc]
    """A base with a bottleneck behind each of the config's targets."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}


def register() -> None:
    """Make the kind known to PEFT in this process. `register_peft_method` takes names of PEFT's own enum alone."""
    mappings: dict[Any, Any]
    for mappings, what in (
        (PEFT_TYPE_TO_CONFIG_MAPPING, BottleneckConfig),
        (PEFT_TYPE_TO_TUNER_MAPPING, BottleneckModel),
        (PEFT_TYPE_TO_PREFIX_MAPPING, BottleneckModel.prefix),
    ):
        mappings[KIND] = what


def _width(linear: torch.nn.Module) -> int:
    """Features that come out of a linear; transformers' Conv1D calls them nf."""
    found = getattr(linear, "out_features", None) or getattr(linear, "nf", None)
    assert isinstance(found, int), f"a bottleneck stands behind a linear, not behind {type(linear).__name__}"
    return found
