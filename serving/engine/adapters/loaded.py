"""One loaded adapter, and its tensors in one buffer: one allocation, one copy to a device, one piece of memory freed.

An adapter is some 420 small tensors. Freed one by one they leave holes in the heap; copied one by one to a device they
cost 420 launches. The record may be any tree of dataclasses, tuples and dicts; what is no tensor stays as it is.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch

from graftwork.serving.engine.adapters.format import (
    ExpertLora,
    InputRows,
    OutputRows,
    SiteBottleneck,
    SiteScale,
    SiteWeights,
    VirtualTokens,
)


@dataclass(frozen=True)
class GroupWeights:
    """The adapter of linears with a common input. a_RI: the members' lora_A in one, [sum of ranks, in], where a GPU's
    kernels read them; elsewhere None."""

    a_RI: torch.Tensor | None
    members: tuple[SiteWeights | None, ...]
    """By member number; each member's a_RI is a view of the stack where there is one. None: not adapted."""
    starts: tuple[int, ...]
    """First line of each member, all ranks one below the other."""


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """One adapter version on the engine's device."""

    version: str
    rank: int
    groups: Mapping[str, GroupWeights]
    """LoRA by group of linears; empty for an adapter without it."""
    scales: Mapping[str, SiteScale] = field(default_factory=dict)
    """DoRA and IA3: channels that are multiplied, by linear."""
    bottlenecks: Mapping[str, SiteBottleneck] = field(default_factory=dict)
    experts: Mapping[str, ExpertLora] = field(default_factory=dict)
    routers: Mapping[str, SiteWeights] = field(default_factory=dict)
    inputs: InputRows | None = None
    outputs: OutputRows | None = None
    virtual_tokens: VirtualTokens | None = None

    @cached_property
    def only_lora(self) -> bool:
        """True: `groups` is all that it changes."""
        return bool(self.groups) and self.decodes_by_lora and self.virtual_tokens is None

    @property
    def decodes_by_lora(self) -> bool:
        """True: `groups` is all that a decoding token needs of it; what stands before the prompt is in its KV."""
        changes = (self.scales, self.bottlenecks, self.experts, self.routers, self.inputs, self.outputs)
        return not any(changes)


T = TypeVar("T")
_ALIGN = 64
"""Bytes; a cache line, and enough for every vector load."""


def flatten(tree: T, *, pin: bool = False) -> tuple[T, torch.Tensor]:
    """The same record over one CPU buffer of bytes, and the buffer. Views of one tensor stay views of one.

    pin: page-locked memory, from which a GPU copies without the CPU.
    """
    found = tensors_of(tree)
    if not all(tensor.is_contiguous() for tensor in found):
        tree = _map_tensors(tree, torch.Tensor.contiguous)
        found = tensors_of(tree)
    whole = _outer_tensors(found)
    starts, size = [], 0
    for tensor in whole:
        starts.append(size)
        size += -(-tensor.nbytes // _ALIGN) * _ALIGN
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
    for tensor, start in zip(whole, starts, strict=True):
        _view_at(buffer, tensor, start).copy_(tensor)
    firsts = [tensor.data_ptr() for tensor in whole]

    def place(tensor: torch.Tensor) -> torch.Tensor:
        within = bisect_right(firsts, tensor.data_ptr()) - 1
        return _view_at(buffer, tensor, starts[within] + tensor.data_ptr() - firsts[within])

    packed: T = _map_tensors(tree, place)
    return packed, buffer


def common_buffer(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The memory that all of these lie in, where they are views of one, each contiguous on a line of its own."""
    whole = tensors[0].untyped_storage()
    for tensor in tensors:
        if tensor.untyped_storage().data_ptr() != whole.data_ptr() or tensor.data_ptr() % _ALIGN:
            return None
    if not all(tensor.is_contiguous() for tensor in tensors):
        return None
    return torch.empty(0, dtype=torch.uint8).set_(whole)


def copy_to_device(tree: T, buffer: torch.Tensor, device: torch.device) -> T:
    """The record of `flatten` on another device, by one copy of its buffer; on the CPU it is the record itself."""
    if buffer.device == device or device.type == "cpu":
        return tree
    there = buffer.to(device, non_blocking=True)
    at: T = _map_tensors(
        tree, lambda tensor: _view_at(there, tensor, int(tensor.storage_offset()) * tensor.dtype.itemsize)
    )
    return at


def _view_at(buffer: torch.Tensor, like: torch.Tensor, start: int) -> torch.Tensor:
    return buffer.view(like.dtype).as_strided(like.size(), like.stride(), start // like.dtype.itemsize)


def _outer_tensors(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors that are no part of another one, by address."""
    found: list[torch.Tensor] = []
    end = -1
    for tensor in sorted(tensors, key=lambda tensor: (tensor.data_ptr(), -tensor.nbytes)):
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        if last > end:
            assert first >= end, "tensors that overlap in part"
            found.append(tensor)
            end = last
    return found


def tensors_of(tree: object) -> list[torch.Tensor]:
    """Every tensor of a record."""
    found: list[torch.Tensor] = []
    rest: list[Any] = [tree]
    while rest:
        one = rest.pop()
        if isinstance(one, torch.Tensor):
            found.append(one)
        elif isinstance(one, dict):
            rest += one.values()
        elif isinstance(one, tuple | list):
            rest += one
        elif not isinstance(one, str):
            rest += [getattr(one, name) for name in _fields(type(one))]
    return found


def _fields(kind: type) -> Iterable[str]:
    """The fields of a dataclass, none for another type. Twice as quick as dataclasses.fields: thousands are asked."""
    return getattr(kind, "__dataclass_fields__", ())


def _map_tensors(tree: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _map_tensors(value, change) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)([_map_tensors(value, change) for value in tree])
    names = _fields(type(tree))
    return type(tree)(**{name: _map_tensors(getattr(tree, name), change) for name in names}) if names else tree
