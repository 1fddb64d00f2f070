"""A record of tensors in one buffer: one allocation, one copy to a device, one piece of memory given back.

An adapter is some 420 small tensors. Freed one by one they leave holes in the heap; copied one by one to a device they
cost 420 launches. The record may be any tree of dataclasses, tuples and dicts; what is no tensor stays as it is.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_ALIGN = 64
"""Bytes; a cache line, and enough for every vector load."""


def flatten(tree: T, *, pin: bool = False) -> tuple[T, torch.Tensor]:
    """The same record over one CPU buffer of bytes, and the buffer. Views of one tensor stay views of one.

    pin: page-locked memory, from which a GPU copies without the CPU.
    """
    found = tensors_of(tree)
    if not all(tensor.is_contiguous() for tensor in found):
        tree = _mapped(tree, torch.Tensor.contiguous)
        found = tensors_of(tree)
    whole = _outermost(found)
    starts, size = [], 0
    for tensor in whole:
        starts.append(size)
        size += -(-tensor.nbytes // _ALIGN) * _ALIGN
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
    for tensor, start in zip(whole, starts, strict=True):
        _at(buffer, tensor, start).copy_(tensor)
    firsts = [tensor.data_ptr() for tensor in whole]

    def place(tensor: torch.Tensor) -> torch.Tensor:
        within = bisect_right(firsts, tensor.data_ptr()) - 1
        return _at(buffer, tensor, starts[within] + tensor.data_ptr() - firsts[within])

    packed: T = _mapped(tree, place)
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
    at: T = _mapped(tree, lambda tensor: _at(there, tensor, int(tensor.storage_offset()) * tensor.dtype.itemsize))
    return at


def _at(buffer: torch.Tensor, like: torch.Tensor, start: int) -> torch.Tensor:
    return buffer.view(like.dtype).as_strided(like.size(), like.stride(), start // like.dtype.itemsize)


def _outermost(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
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
    rest = [tree]
    while rest:
        one = rest.pop()
        if isinstance(one, torch.Tensor):
            found.append(one)
        elif not isinstance(one, str):
            rest += _children(one)
    return found


def _children(tree: object) -> Sequence[Any]:
    if isinstance(tree, dict):
        return list(tree.values())
    if isinstance(tree, tuple | list):
        return tree
    return [getattr(tree, name) for name in _fields(type(tree))]


def _fields(kind: type) -> Iterable[str]:
    """The fields of a dataclass, none for another type. Twice as quick as dataclasses.fields: thousands are asked."""
    return getattr(kind, "__dataclass_fields__", ())


def _mapped(tree: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _mapped(value, change) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)([_mapped(value, change) for value in tree])
    names = _fields(type(tree))
    return type(tree)(**{name: _mapped(getattr(tree, name), change) for name in names}) if names else tree
