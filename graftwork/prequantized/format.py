"""Packed checkpoint formats in common: the tensors that make up one weight, and the error of an unknown setting.

A format is one module next to this one, with one function that reads `quantization_config`. Legend: O output rows and I
input columns of a linear, G groups of inputs that share a scale.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

from graftwork.errors import BaseModelError

if TYPE_CHECKING:
    import torch

Settings = Mapping[str, Any]
"""`quantization_config` of a config.json."""
Parts = Mapping[str, "torch.Tensor"]
"""Tensors of one weight, by the end of their names."""

IGNORED = (
    "input_scale",
    "input_scale_ub",
    "activation_scale",
    "output_scale",
    "input_zero_point",
    "k_scale",
    "v_scale",
    "q_scale",
)
"""Ends of tensors that describe quantised activations and caches, which are computed in the compute dtype here."""


def needed(parts: Parts) -> Parts:
    """Return the parts without those of activations."""
    return {name: part for name, part in parts.items() if name not in IGNORED}


@dataclass(frozen=True)
class PackedFormat:
    """One format with the settings of one checkpoint."""

    label: str
    """For a plan: `FP8 (blocks of 128x128)`."""
    parts: tuple[str, ...]
    """Ends of the names of the tensors that make up one weight."""
    marks: tuple[str, ...]
    """Parts of which each packed weight has one and no plain weight has any."""
    dequantise: "Callable[[Parts, torch.dtype], torch.Tensor]"
    """Exact values of a weight, [O, I], as the format's reference computes them, then in the dtype."""
    packed_bytes: Callable[[int, int], int]
    """Bytes of a linear with these inputs and outputs, scales included."""
    prepare: Callable[[Parts], Parts] = needed
    """Parts that the values depend on: what a layer keeps in memory. A decision that reads values is taken here, once:
    a GPU would wait for it in each pass."""
    plain: tuple[str, ...] = ()
    """Modules that the checkpoint does not pack: parts of dotted names, or `re:` and a regular expression."""
    joint: str = "."
    """Between the name of a module and that of a part."""
    of_linears: bool = True
    """The format packs linear layers; else experts, whose weights have three dimensions."""
    native: bool = False
    """transformers loads it packed by itself on every device."""
    check_file: Callable[[Mapping[str, str]], None] | None = None
    """Raises BaseModelError for the header of a safetensors file with weights that the format does not read."""

    def split(self, key: str) -> tuple[str, str] | None:
        """Return (module, part) of a tensor's name; None for one that is no part of a weight."""
        for part in self.parts:
            if key.endswith(self.joint + part):
                return key[: -len(self.joint + part)], part
        return None

    def group(self, keys: Iterable[str]) -> dict[str, dict[str, str]]:
        """Return module -> part -> name of the tensor, for the packed weights among these tensors."""
        found: dict[str, dict[str, str]] = {}
        for key in keys:
            if split := self.split(key):
                found.setdefault(split[0], {})[split[1]] = key
        return {module: parts for module, parts in found.items() if any(mark in parts for mark in self.marks)}

    def weight_name(self, module: str) -> str:
        """Return the name of the plain weight that takes the place of a module's parts."""
        return f"{module}.weight" if self.joint == "." else module

    def packs(self, module: str) -> bool:
        """Return whether the checkpoint packs the linear layer of this name, by its config."""
        return self.of_linears and not any(_matches(module, pattern) for pattern in self.plain)


def unsupported(key: str, found: str, rule: str, hint: str = "") -> BaseModelError:
    """Return the error of a setting that no module here reads. `key`: its name in `quantization_config`."""
    return BaseModelError(f"quantization_config.{key}", found, rule, hint or HINT)


HINT = "take the base's unquantised checkpoint, with quant.kind=nf4 or int8 where memory is short"


def names(settings: Settings, *keys: str) -> tuple[str, ...]:
    """Return the names of modules under the first of the keys that has any."""
    for key in keys:
        if found := settings.get(key):
            return tuple(str(name) for name in found)
    return ()


def group_count(inputs: int, columns: int) -> int:
    """Return the scales of an output with these inputs; a group has `columns` of them, or all for 0 and less."""
    return ceil(inputs / columns) if columns > 0 else 1


def grain(columns: int) -> str:
    """Return the words of a label for groups of so many inputs; 0 and less: one of all."""
    return f"groups of {columns}" if columns > 0 else "a scale per output"


def unpack_columns(packed: "torch.Tensor", bits: int) -> "torch.Tensor":
    """Return the unsigned values of int32 words [..., N], lowest bits first: [..., N * 32 / bits].

    In int8 for up to 4 bits and in int16 for 8, so that a difference of two has room.
    """
    import torch

    octets = packed.contiguous().view(torch.uint8)  # lowest byte first, as x86-64 and arm64 store words
    if bits == 8:
        return octets.to(torch.int16)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    values: torch.Tensor = (octets.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return values.flatten(-2).to(torch.int8)


def _matches(module: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return f".{pattern}." in f".{module}."
