"""Experts and routers of a mixture-of-experts base: their names and sizes, and the form of a LoRA on them.

transformers 5 stores the experts of a block as two parameters of three dimensions, `gate_up_proj` and `down_proj`. PEFT
0.21 adapts them by `target_parameters`: it stacks the ranks of all experts, and nests one wrapper a parameter, so that
the tensors of all parameters but the last of a module are below as many `base_layer`.
Legend: E experts, R rank, I in, O out.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftwork.adapters.kind import text_linears
from graftwork.errors import ConfigError

WRAPPED = ".base_layer"
"""Part of a tensor's name for each wrapper of PEFT around the one that the tensor belongs to."""
SHARED = re.compile(r"\.shared_(expert|experts|mlp)\.")
"""Modules next to the experts through which every token passes: plain linear layers."""
FUSED_NAMES = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Ends of names that PEFT 0.21 takes for parts of fused experts wherever they are (`_MOE_TARGET_MODULE_MAPPING`)."""


@dataclass(frozen=True)
class ExpertWeight:
    """One parameter of three dimensions: a matrix an expert."""

    name: str
    """`model.layers.0.mlp.experts.down_proj`."""
    experts: int
    inputs: int
    outputs: int

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def params(self) -> int:
        """Weights of all experts."""
        return self.experts * self.inputs * self.outputs


def expert_weights(model: Any) -> list[ExpertWeight]:
    """Return the experts' parameters of the decoder, in the model's order; empty for a dense base."""
    decoder = {id(module) for module in model.get_decoder().modules()}
    found = []
    for name, module in model.named_modules():
        if id(module) not in decoder or "Experts" not in type(module).__name__:
            continue  # kernels of convolutions and gates of recurrent layers have three dimensions too
        for key, shape in _shapes(module):
            if len(shape) == 3:
                experts, first, second = shape
                # classes of transformers say that they store [in, out]; Llama-4's does so and has no such mark
                turned = getattr(module, "is_transposed", (second if "down" in key else first) == _width(model))
                inputs, outputs = (first, second) if turned else (second, first)
                found.append(ExpertWeight(f"{name}.{key}", experts, inputs, outputs))
    return found


def experts_problem(module: Any) -> str:
    """Return why the engine cannot compute adapters of this module's experts; empty where it can.

    It does what transformers' `use_experts_implementation` says of a class: gate and up projection in one, gated, then
    down; stored [out, in] or [in, out], with a bias or without.
    """
    if not hasattr(module, "is_transposed"):
        return "its experts are not computed by transformers' experts interface"
    if not module.has_gate or getattr(module, "has_post_expert_norm", False):
        return "its experts are not one gated projection up and one down"
    return ""


def _width(model: Any) -> int:
    return int(model.config.get_text_config().hidden_size)


def _shapes(module: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Shapes of a module's own parameters, as they multiply: of packed ones the shape before packing."""
    for key, parameter in module.named_parameters(recurse=False):
        yield key, tuple(parameter.shape)
    for key, packed in getattr(module, "parametrizations", {}).items():
        state = getattr(packed[0], "quant_state", None)
        yield key, tuple(packed.original.shape if state is None else state.shape)


def adaptable_linears(model: Any) -> list[str]:
    """Full names of the decoder's linear layers that a LoRA is put on: all but routers, and experts that are linears.

    A router that is adapted by accident moves tokens to other experts; PEFT's "all-linear" takes it.
    """
    found = text_linears(model)
    blocks = _blocks(model, found)
    return [name for name in found if not any(name.startswith(block) for block in blocks) or SHARED.search(name)]


def _blocks(model: Any, found: Sequence[str]) -> set[str]:
    """Starts of the names of modules with experts and their router: `model.layers.0.mlp.`."""
    inside = {one.module for one in expert_weights(model)}
    inside |= {name[: name.index(".experts.")] + ".experts" for name in found if ".experts." in name}
    return {module.rpartition(".")[0] + "." for module in inside}


def split_targets(model: Any, modules: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return (`target_modules`, `target_parameters`) that mean these linear layers of a base with experts to PEFT.

    PEFT 0.21 rewrites `target_modules` of such a base, for adapters of transformers 4: a name that ends in `up_proj`
    becomes the experts' `gate_up_proj`, of shared experts and dense blocks too. As parameters, `NAME.weight`, they are
    left as they are, and their tensors have the same names.
    """
    names = list(modules)
    fused = [name for name in names if name.rpartition(".")[2] in FUSED_NAMES] if expert_weights(model) else []
    return [name for name in names if name not in set(fused)], [f"{name}.weight" for name in fused]


def expert_targets(asked: str, model: Any) -> list[str]:
    """Return the ends of the experts' parameters for `target_parameters`. Raises ConfigError for a dense base."""
    found = expert_weights(model)
    if not found:
        raise ConfigError(
            asked,
            f"{type(model).__name__} has no experts in parameters of three dimensions",
            f"{asked.partition('=')[0]} is for mixture-of-experts bases with fused experts",
            f"leave {asked.partition('=')[0]} out",
        )
    return sorted({".".join(one.name.rsplit(".", 2)[1:]) for one in found})


def router_weights(model: Any) -> list[str]:
    """Full names of the weights of routers: of modules next to the experts with one row an expert."""
    counts = {one.module.rpartition(".")[0]: (one.module, one.experts) for one in expert_weights(model)}
    found = []
    for block, (inside, experts) in counts.items():
        for name, weight in model.get_submodule(block).named_parameters():
            full = f"{block}.{name}"
            if name.endswith("weight") and weight.dim() == 2 and len(weight) == experts:
                found += [] if full.startswith(f"{inside}.") or SHARED.search(full) else [full]
    return found


def is_stacked(module: str, targets: Iterable[str]) -> bool:
    """Return whether the tensors of this module are of experts: some target parameter is one of its own.

    `module`: as in the file, `...mlp.experts.base_layer`. `NAME.weight` is a linear layer, whose name ends in NAME.
    """
    plain = module.replace(WRAPPED, "")
    owners = {target.rpartition(".")[0] for target in targets if not target.endswith(".weight")}
    return any(plain == owner or plain.endswith(f".{owner}") for owner in owners)


def file_modules(parameters: Sequence[str]) -> Mapping[str, str]:
    """Return the module names of PEFT's file by parameter of one module, which are given in the module's order.

    The wrapper of the last parameter is the outermost: `experts` for `experts.down_proj`, and `experts.base_layer` for
    `experts.gate_up_proj`.
    """
    depths = range(len(parameters) - 1, -1, -1)
    return {name: name.rpartition(".")[0] + WRAPPED * depth for name, depth in zip(parameters, depths, strict=True)}
