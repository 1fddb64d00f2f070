"""The base's linears that can take an adapter, hooked once: each adds the running step's adapter deltas to its result.

A hook replaces the `forward` of one module instance (nn.Linear, bitsandbytes' Linear4bit and Linear8bitLt, and GPT-2's
Conv1D alike), so names, weights and `state_dict` of the model stay as they are; `unhook` gives the model back.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from graftwork.serving.engine.adapters.format import LinearShape
from graftwork.serving.engine.adapters.loaded import LoadedAdapter

_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Children of one module that read the same tensor: their lora_A are computed together."""


@dataclass(frozen=True)
class LoraLayer:
    """One hooked linear: member number `member` of the group `group`."""

    name: str
    shape: LinearShape
    group: str
    member: int


Forward = Callable[..., torch.Tensor]


class Deltas(Protocol):
    """The adapters of one step."""

    def add(self, site: LoraLayer, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """`result` of the base plus each row's delta. x: [..., in], result: [..., out]."""


class LoraPart(Protocol):
    """Some adapters of one step. `shrink` is called once a group, `expand` with its result once a linear of it."""

    def shrink(self, group: str, x_NI: torch.Tensor) -> torch.Tensor | None:
        """lora_A of every member on the part's rows; None where none of its adapters touches the group."""

    def expand(self, site: LoraLayer, shrunk: torch.Tensor, out_NO: torch.Tensor) -> None:
        """Adds the deltas of one linear to the part's rows of `out_NO`."""


@dataclass(frozen=True)
class LoraSegment:
    """Packed tokens `first` to `stop` run with one adapter."""

    first: int
    stop: int
    weights: LoadedAdapter


class StepDeltas:
    """Deltas that `Sites` adds during one forward pass: the decoding tokens' `parts`, the prompt tokens' segments."""

    def __init__(self, parts: Sequence[LoraPart], segments: Sequence[LoraSegment]) -> None:
        self.parts, self._segments = parts, segments
        self._group = ""
        self._input: torch.Tensor | None = None
        self._shrunk: list[torch.Tensor | None] = []

    def add(self, site: LoraLayer, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Adds in place: `result` is the linear's own fresh output."""
        x_TI, out_TO = x.reshape(-1, x.shape[-1]), result.view(-1, result.shape[-1])
        if self.parts:
            if site.group != self._group or x is not self._input:
                self._group, self._input = site.group, x
                self._shrunk = [part.shrink(site.group, x_TI) for part in self.parts]
            for part, shrunk in zip(self.parts, self._shrunk, strict=True):
                if shrunk is not None:
                    part.expand(site, shrunk, out_TO)
        for segment in self._segments:
            group = segment.weights.groups.get(site.group)
            weights = group.members[site.member] if group else None
            if weights is not None:
                x_SI = x_TI[segment.first : segment.stop]
                a_RI, b_OR = weights.widened(x_SI.dtype)
                out_TO[segment.first : segment.stop] += linear(linear(x_SI, a_RI), b_OR) * weights.scaling
        return result


class Inputs(Protocol):
    """Changes of a linear's input by rows of one step."""

    def scaled(self, site: LoraLayer, x: torch.Tensor) -> torch.Tensor:
        """`x` itself, or a copy with some rows changed."""


class Sites:
    """All hooked linears of one model. `deltas` and `inputs` are set around a pass; None costs a comparison a linear.

    forward_of: computes a linear's own result; None: the module.
    """

    def __init__(self, model: torch.nn.Module, forward_of: Callable[[torch.nn.Module], Forward] | None = None) -> None:
        self.deltas: Deltas | None = None
        self.inputs: Inputs | None = None
        self._hooked: list[torch.nn.Module] = []
        linears = _inner_linears(model)
        self.sites = {site.name: site for site in _group_linears(linears)}
        for name, module in linears.items():
            self._hook(self.sites[name], module, module.forward if forward_of is None else forward_of(module))

    @property
    def shapes(self) -> Mapping[str, LinearShape]:
        """in and out features by name."""
        return {name: site.shape for name, site in self.sites.items()}

    def groups(self) -> dict[str, list[LoraLayer]]:
        """Sites by group, in member order."""
        groups: dict[str, list[LoraLayer]] = {}
        for site in self.sites.values():
            groups.setdefault(site.group, []).append(site)
        return {name: sorted(members, key=lambda site: site.member) for name, members in groups.items()}

    def unhook(self) -> None:
        """Gives every linear its own forward back."""
        for module in self._hooked:
            del module.forward
        self._hooked.clear()

    def _hook(self, site: LoraLayer, module: torch.nn.Module, base: Forward) -> None:
        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.inputs is not None:
                x = self.inputs.scaled(site, x)
            result = base(x, *args, **kwargs)
            return result if self.deltas is None else self.deltas.add(site, x, result)

        module.forward = forward
        self._hooked.append(module)


def _inner_linears(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Every linear but the output layer, which peft's "all-linear" leaves out too. bitsandbytes' are subclasses.

    So are the routers of some bases with experts (PhiMoE, Llama-4), whose results are the experts of each token.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    return {name: module for name, module in linears.items() if module is not output}


def is_linear(module: torch.nn.Module) -> bool:
    """True of an nn.Linear, and of transformers' Conv1D (GPT-2), which stores its weight as [in, out].

    Subclasses of model families are routers, which return more than one tensor (PhiMoE, Llama-4).
    """
    is_router = type(module).__module__.startswith("transformers.models.")
    return isinstance(module, torch.nn.Linear | Conv1D) and not is_router


def _shape_of(module: Any) -> LinearShape:
    if isinstance(module, Conv1D):
        return LinearShape(*map(int, module.weight.shape))
    return LinearShape(int(module.in_features), int(module.out_features))


def _group_linears(linears: Mapping[str, torch.nn.Module]) -> list[LoraLayer]:
    sites = []
    for name, module in linears.items():
        parent, _, child = name.rpartition(".")
        family = next((names for names in _SAME_INPUT if child in names), None)
        together = family is not None and all(f"{parent}.{sibling}" in linears for sibling in family)
        group = f"{parent}.{'+'.join(family)}" if together and family else name
        sites.append(LoraLayer(name, _shape_of(module), group, family.index(child) if together and family else 0))
    return sites
