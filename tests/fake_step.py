"""Oracle of the memory model: a real training step on tensors without memory, with every storage counted.

The base is built on the meta device and its tensors are made again under PyTorch's FakeTensorMode, which knows shapes
and no values; a dispatch mode outside of it adds up the bytes of live storages, as the allocator of a GPU rounds them.
No GPU and no weights are needed: a step of an 8B model takes some 10 s of two cores.
"""

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import DynamicCache
from transformers.utils import logging

from graftwork.base import meta_model
from graftwork.planning.hardware import BF16
from graftwork.planning.memory import RowSizes
from graftwork.quantization import BLOCK, SCALE_BLOCK, SMALLEST
from graftwork.training.adapters.attach import attach
from graftwork.training.planning.memory import TILE_TOKENS, TILE_VOCAB, Pass, micro_batch, pass_of
from graftwork.training.spec import TrainSpec

CUDA_ROUNDS = 512
"""Bytes of which every storage takes a whole number on a GPU (c10/cuda/CUDACachingAllocator)."""
STEPS = 2
"""The first makes the optimizer's state, the second is every later one."""


@dataclass(frozen=True)
class Replayed:
    """Bytes of live storages of one worker, the process itself left out."""

    peak_bytes: int
    weights: int
    """Of the base where it is frozen."""
    trained: int
    gradients: int
    optimizer: int


def fake_tensors() -> AbstractContextManager[Any]:
    """Return a block in which new tensors have shapes, dtypes and storages of a size, but no memory and no values.

    Tensors of the meta device, the public form, do not act as those of the CPU. Tensors from outside may take part.
    Upstream: `torch._subclasses.fake_tensor.FakeTensorMode`.
    """
    return FakeTensorMode(allow_non_fake_inputs=True)


class EachResult(TorchDispatchMode):
    """Block in which a function is called with each tensor that any operation returns, forward and backward.

    Upstream: `torch.utils._python_dispatch.TorchDispatchMode.__torch_dispatch__(func, types, args, kwargs)` and
    `torch.utils._pytree.tree_iter`.
    """

    def __init__(self, take: Callable[[torch.Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.take = take

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then hand on its tensors."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self.take(tensor)
        return out


def storage_key(storage: torch.UntypedStorage) -> int:
    """Return a number that all Python objects of one storage share while it is alive; the next storage may reuse it.

    A fake tensor's storage has no `data_ptr`. Upstream: `UntypedStorage._cdata`, the address of the C++ object.
    """
    return int(storage._cdata)


class LiveStorageCounter(EachResult):
    """Adds up the storages that are alive."""

    def __init__(self, rounds: int) -> None:
        super().__init__(self._add)
        self.rounds, self.now, self.peak = rounds, 0, 0
        self._known: set[int] = set()

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage_key(storage)
        if key in self._known:
            return
        size = -(-storage.nbytes() // self.rounds) * self.rounds
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def replay(
    spec: TrainSpec,
    config: Mapping[str, Any],
    rows: RowSizes,
    *,
    value_bytes: int,
    adapter_dtype: torch.dtype = torch.float32,
) -> Replayed:
    """Two steps of one worker that has the model whole. `config` is the base's config.json.

    `spec` has no `auto`. What workers share under ZeRO and FSDP2 is not replayed. `adapter_dtype`: ours is fp32; TRL's
    own is bfloat16 on a quantised base.
    """
    assert spec.quant.kind != "int8", "bitsandbytes' kernels for it need real tensors"
    assert not (spec.quant.is_packed and spec.adapter.reads_base_weights), "unpacking needs real tensors"
    cuda = spec.gpus > 0
    taken = pass_of(spec, rows, micro_batch(spec))
    live = LiveStorageCounter(CUDA_ROUNDS if cuda else 1)
    with _quiet():
        model = _built(spec, config, torch.bfloat16 if value_bytes == BF16 else torch.float32, adapter_dtype)
        return _steps(spec, model, taken, live, autocast=cuda and value_bytes == BF16)


def _steps(spec: TrainSpec, model: Any, taken: Pass, live: LiveStorageCounter, *, autocast: bool) -> Replayed:
    with fake_tensors(), live:
        _materialise(model)
        moments: list[torch.Tensor] = []
        live.peak = live.now
        passes = min(2, spec.optim.rows_per_step // spec.num_workers // taken.rows)
        gradients = 0
        for _ in range(STEPS):
            for _ in range(passes):
                _pass(spec, model, taken, autocast=autocast)
            gradients = sum(_size(p.grad) for p in model.parameters() if p.grad is not None)
            if not moments:  # the fused AdamW makes them at its first step, and nothing else
                moments = [torch.zeros_like(p) for p in model.parameters() if p.requires_grad for _ in range(2)]
            model.zero_grad()
        state = sum(map(_size, moments))
        weights, trained = (sum(map(_size, _tensors(model, trained=which))) for which in (False, True))
        return Replayed(live.peak, weights, trained, gradients, state)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' word that checkpointing has no use for the empty cache of `_pass`."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(category=FutureWarning, action="ignore"):
            yield
    finally:
        logging.set_verbosity(before)


def _built(spec: TrainSpec, config: Mapping[str, Any], dtype: torch.dtype, adapter_dtype: torch.dtype) -> Any:
    """The base with its adapter, as `training.loop` makes it, on the meta device."""
    base = meta_model.build(config, dtype).requires_grad_(False)
    with torch.device("meta"):
        if spec.quant.is_4bit:
            _pack(base, dtype, double=spec.quant.double_quant)
        model = attach(base, spec.adapter, begin=False).train()  # start values need real tensors
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapter_dtype)
    if spec.gpus:
        _drop_as_a_gpu_does(model)
    if spec.optim.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _drop_as_a_gpu_does(model: Any) -> None:
    """Dropout that keeps a mask of bytes: on a CPU PyTorch keeps one of values."""
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Dropout):
            model.set_submodule(name, _ByteDropout(module.p))


class _ByteDropout(torch.nn.Module):
    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.native_dropout(inputs, self.share, True)[0]


def _pack(base: Any, dtype: torch.dtype, *, double: bool) -> None:
    """Every linear but the head as bitsandbytes' 4-bit one, so that PEFT takes it for what it is."""
    head = base.get_output_embeddings()
    for name, linear in list(base.named_modules()):
        if isinstance(linear, torch.nn.Linear) and linear is not head:
            base.set_submodule(name, PackedLinear(linear.in_features, linear.out_features, dtype, double=double))
    base.is_loaded_in_4bit = True


class PackedLinear(bnb.nn.Linear4bit):  # type: ignore[misc]  # bitsandbytes has no types
    """A 4-bit linear whose products unpack the whole weight, as bitsandbytes does for more than a few rows."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, *, double: bool) -> None:
        super().__init__(inputs, outputs, bias=False, compute_dtype=dtype, quant_type=SMALLEST, device="meta")
        blocks = -(-inputs * outputs // BLOCK)
        scales = torch.float32 if not double else torch.uint8
        self.register_buffer("scales", torch.empty(blocks, dtype=scales, device="meta"))
        self.register_buffer("scales_of_scales", torch.empty(double * -(-blocks // SCALE_BLOCK), device="meta"))

    def packed(self) -> torch.Tensor:
        """Two weights a byte."""
        return torch.empty(self.in_features * self.out_features // 2, 1, dtype=torch.uint8)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """In the compute dtype."""
        out: torch.Tensor = _Unpacked.apply(  # type: ignore[no-untyped-call]
            inputs.to(self.compute_dtype), self.out_features
        )
        return out


class _Unpacked(torch.autograd.Function):
    """Product with a weight that is there for as long as the product takes; nothing is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, outputs: int) -> torch.Tensor:
        ctx.inputs = inputs.shape[-1]
        return torch.nn.functional.linear(inputs, torch.empty(outputs, ctx.inputs, dtype=inputs.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ torch.empty(gradient.shape[-1], ctx.inputs, dtype=gradient.dtype), None


def _materialise(model: Any) -> None:
    """Make each tensor of the meta device again, so that it counts; tied ones stay tied."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) not in made:
                packed = isinstance(module, PackedLinear) and name == "weight"
                data = module.packed() if packed else torch.empty(parameter.shape, dtype=parameter.dtype)
                made[id(parameter)] = parameter, torch.nn.Parameter(data, requires_grad=parameter.requires_grad)
            setattr(module, name, made[id(parameter)][1])
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _pass(spec: TrainSpec, model: Any, taken: Pass, *, autocast: bool) -> None:
    """One forward and backward pass over the longest rows, through the output head that the kind has."""
    sequences = max(1, taken.tokens // taken.row)
    inputs: dict[str, Any] = {"input_ids": torch.zeros(sequences, taken.row, dtype=torch.long)}
    prompted = getattr(model, "active_peft_config", None) and model.active_peft_config.is_prompt_learning
    if taken.masked and not prompted:  # in the form that the model would make of a mask whose values it reads
        inputs["attention_mask"] = torch.ones(sequences, 1, taken.row, taken.row, dtype=torch.bool)
    elif not prompted:  # an empty cache: without one transformers looks for packed rows, and makes a mask to be safe
        inputs["past_key_values"] = DynamicCache(config=model.config)
    with _gpu_kernels() if spec.gpus else contextlib.nullcontext():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), _head(model, taken) as loss_of:
            output = model(**inputs, use_cache=False)
            loss = loss_of(output.logits)
            if spec.objective.traits.scored_per_step:
                with torch.no_grad():
                    model(**inputs | {"past_key_values": DynamicCache(config=model.config)}, use_cache=False)
        loss.backward()


@contextmanager
def _gpu_kernels() -> Iterator[None]:
    """Attention whose keys and values differ in size by a GPU's kernel: on a CPU sdpa keeps a matrix of its scores."""
    functional = torch.nn.functional
    own = functional.scaled_dot_product_attention

    def attend(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        if query.shape[-1] == value.shape[-1]:
            return own(query, key, value, *args, **kwargs)
        return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True, 0.0, True)[0]

    functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = own


@contextmanager
def _head(model: Any, taken: Pass) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """A hook that sends the scored positions alone through the head, and the loss of its logits."""
    head = model.get_output_embeddings()
    scored: list[torch.Tensor] = []

    def before(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        hidden_PH = args[0].reshape(-1, args[0].shape[-1])
        hidden_NH = hidden_PH.index_select(0, torch.zeros(max(1, taken.scored), dtype=torch.long))
        if not taken.fused_head:
            return (hidden_NH,)
        scored.append(_FusedHead.apply(hidden_NH, head.weight))  # type: ignore[no-untyped-call]
        return (hidden_NH[:1],)

    def loss_of(logits: torch.Tensor) -> torch.Tensor:
        if scored:
            return scored[0].sum()
        logits_NV = logits.reshape(-1, logits.shape[-1])
        targets_N = torch.zeros(len(logits_NV), dtype=torch.long)
        return torch.nn.functional.cross_entropy(logits_NV.float(), targets_N, reduction="sum")

    hook = head.register_forward_pre_hook(before)
    try:
        yield loss_of
    finally:
        hook.remove()


class _FusedHead(torch.autograd.Function):
    """The storages of TRL's head that works in tiles (trl/kernels/chunked_logprob.py)."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden_NH, weight_VH)
        torch.empty(_tile(hidden_NH, weight_VH), dtype=hidden_NH.dtype)
        return torch.empty(len(hidden_NH))

    @staticmethod
    def backward(ctx: Any, gradient_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:  # noqa: ARG004
        hidden_NH, weight_VH = ctx.saved_tensors
        summed_NH = torch.zeros(hidden_NH.shape)
        summed_VH = torch.zeros(weight_VH.shape) if ctx.needs_input_grad[1] else None
        torch.empty(_tile(hidden_NH, weight_VH), dtype=hidden_NH.dtype)
        return summed_NH.to(hidden_NH.dtype), None if summed_VH is None else summed_VH.to(weight_VH.dtype)


def _tile(hidden_NH: torch.Tensor, weight_VH: torch.Tensor) -> tuple[int, int]:
    return min(len(hidden_NH), TILE_TOKENS), min(len(weight_VH), TILE_VOCAB)


def _tensors(model: Any, *, trained: bool) -> Iterator[torch.Tensor]:
    """The weights that are trained, or those that are not and the buffers."""
    yield from (parameter for parameter in model.parameters() if parameter.requires_grad == trained)
    if not trained:
        yield from model.buffers()


def _size(tensor: Any) -> int:
    return int(tensor.untyped_storage().nbytes()) if isinstance(tensor, torch.Tensor) else 0
