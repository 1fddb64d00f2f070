"""A record of tensors in one buffer is the same record: equal values, views that stay views, nothing else touched."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from graftwork.serving.engine.adapters.loaded import copy_to_device, flatten, tensors_of


@dataclass(frozen=True)
class Part:
    """Weights of an adapter in a group of layers, as a loaded record has them."""

    values: torch.Tensor
    scaling: float


@dataclass(frozen=True)
class Record:
    """Record with tensors in fields, mappings and tuples."""

    name: str
    stack: torch.Tensor
    parts: Mapping[str, tuple[Part | None, ...]]
    nothing: None = None


def record() -> Record:
    """Three dtypes, odd sizes, views of one stack, a transposed and an empty tensor."""
    stack = torch.arange(30, dtype=torch.float32).view(10, 3)
    other = torch.arange(7, dtype=torch.bfloat16)
    parts = {
        "views": (Part(stack[:4], 1.0), None, Part(stack[4:], 2.0)),
        "own": (Part(other, 0.5), Part(torch.arange(6, dtype=torch.float64).view(2, 3).t(), 0.25)),
        "empty": (Part(torch.empty(0, 4), 1.0),),
    }
    return Record("a record", stack, parts)


def test_values_shapes_and_everything_else_stay() -> None:
    before = record()
    after, buffer = flatten(before)
    assert [t.tolist() for t in tensors_of(after)] == [t.tolist() for t in tensors_of(before)]
    assert [(t.dtype, t.shape) for t in tensors_of(after)] == [(t.dtype, t.shape) for t in tensors_of(before)]
    assert (after.name, after.nothing, after.parts["views"][1]) == ("a record", None, None)
    assert [part.scaling for part in after.parts["own"] if part] == [0.5, 0.25]
    assert all(t.untyped_storage().data_ptr() == buffer.data_ptr() for t in tensors_of(after) if t.numel())
    assert all(t.data_ptr() % t.dtype.itemsize == 0 for t in tensors_of(after))


def test_views_of_one_tensor_stay_views_of_one_and_take_no_room() -> None:
    after, buffer = flatten(record())
    after.stack[5, 0] = -1.0
    view = after.parts["views"][2]
    assert view is not None
    assert view.values[1, 0] == -1.0
    assert buffer.nbytes == 128 + 64 + 64  # the stack, seven values, six values, each on lines of 64 bytes


def test_on_another_device_it_is_rebuilt_from_one_copy() -> None:
    """The meta device has shapes and offsets and no data, which is what can be compared without a GPU."""
    after, buffer = flatten(record())
    assert copy_to_device(after, buffer, torch.device("cpu")) is after
    there = copy_to_device(after, buffer, torch.device("meta"))
    assert {t.device.type for t in tensors_of(there)} == {"meta"}
    facts = [[(t.shape, t.stride(), t.dtype, t.storage_offset()) for t in tensors_of(one)] for one in (after, there)]
    assert facts[0] == facts[1]
