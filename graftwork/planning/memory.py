"""Plan of a stage: sizes of rows, bytes of weights and activations, and the check that a machine has room for them."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from graftwork.adapters.kind import AdapterKind, ValueBytes
from graftwork.base.model_shape import ModelShape
from graftwork.planning.hardware import BF16, FP32, GIB, MIB, Machine
from graftwork.quantization import QuantSpec


@dataclass(frozen=True)
class EachRow:
    """Sizes of each of N rows, in tokens."""

    lengths_N: NDArray[np.int64]
    """Tokens that the model computes for a row; steps are balanced by them."""
    trained_N: NDArray[np.int64]
    widths_N: NDArray[np.int64]
    """The longest sequence of a row, which the others of a forward pass are padded to."""


@dataclass(frozen=True)
class RowSizes:
    """Sizes of a set of rendered rows, in tokens."""

    count: int
    longest: int
    mean: float
    longest_trained: int
    """Most trained tokens in one row."""
    mean_trained: float
    shortest: int = 0
    each: EachRow | None = field(default=None, compare=False, repr=False)
    """The rows themselves; None where only their extremes are known."""

    @classmethod
    def from_lengths(cls, lengths: ArrayLike, trained: ArrayLike, widths: ArrayLike | None = None) -> "RowSizes":
        """From each row's tokens, trained tokens and, where a row is several sequences, its longest sequence."""
        lengths_N, trained_N = np.asarray(lengths, dtype=np.int64), np.asarray(trained, dtype=np.int64)
        each = EachRow(lengths_N, trained_N, lengths_N if widths is None else np.asarray(widths, dtype=np.int64))
        return cls(
            len(lengths_N),
            int(lengths_N.max()),
            float(lengths_N.mean()),
            int(trained_N.max()),
            float(trained_N.mean()),
            int(lengths_N.min()),
            each,
        )

    @classmethod
    def at_most(cls, max_length: int, count: int = 1) -> "RowSizes":
        """The largest rows that a spec admits, half of each trained."""
        return cls(count, max_length, max_length, max_length // 2, max_length / 2)

    def without_longer(self, share: float) -> "tuple[int, RowSizes]":
        """A `max_length` of that share of the longest sequence, and the rows that it leaves."""
        if self.each is None:
            length = int(self.longest * share)
            shorter = replace(self, longest=length, longest_trained=min(length, self.longest_trained))
            return length, shorter
        widths_N = self.each.widths_N
        length = max(int(widths_N.max() * share), int(widths_N.min()))
        stays_N = widths_N <= length
        lengths_N, trained_N = self.each.lengths_N[stays_N], self.each.trained_N[stays_N]
        return length, self.from_lengths(lengths_N, trained_N, widths_N[stays_N])

    @property
    def padded(self) -> bool:
        """Return whether rows of one forward pass differ in length: then there is a mask."""
        return self.shortest != self.longest


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted bytes of one process, by name; they are all alive at the peak."""

    parts: tuple[tuple[str, int], ...]
    assumptions: tuple[str, ...] = ()
    host: tuple[tuple[str, int], ...] = ()
    """Bytes in the machine's own memory, where `parts` are a GPU's."""

    @property
    def peak_bytes(self) -> int:
        return sum(size for _, size in self.parts)

    @property
    def host_bytes(self) -> int:
        return sum(size for _, size in self.host)

    def part(self, name: str) -> int:
        """Bytes of one part, 0 where the plan has none."""
        return dict(self.parts).get(name, 0)


BATCH_TOKENS, BATCH_ROWS = 1024, 16
"""Of a forward pass that measures outcomes. Tokens: less than most training steps hold."""


@dataclass(frozen=True)
class TokenWork:
    """Tokens that a model reads and writes for all items of some parts."""

    read: int = 0
    """Of prompts and continuations that are weighed."""
    weighed: int = 0
    """Positions of them whose logits are computed."""
    prompts: int = 0
    """Of prompts that are answered."""
    written: int = 0
    """At the most, of answers."""
    decoding_steps: float = 0.0
    """Forward passes that write one token of each answer of a batch."""

    def describe(self) -> str:
        """Return the work as text."""
        return f"{self.read} tokens weighed, up to {self.written} written"


INT64 = 8
ROUTER_COPIES, PLACES = 3, 4
"""Of the weights of a token's experts; of their numbers and of the order by which transformers groups them."""
# Bytes that a token leaves for the backward pass, counted from the autograd graphs of transformers and PEFT.


def saved_bytes(
    model: ModelShape,
    adapter: AdapterKind,
    padded_to: int | None = None,
    *,
    value_bytes: int = FP32,
    autocast: bool = False,
    mask_bytes: int = FP32,
) -> float:
    """Bytes that one token leaves in one block, `adapter` attached and the rest frozen, without checkpointing.

    `padded_to`: tokens of a row in a batch with padding, which repeats keys and values to the query heads
    (transformers' `use_gqa_in_sdpa`) and keeps a mask a block; None for rows of one length. Attention that keeps its
    scores repeats them in any case: `padded_to` is then the length of all rows. The adapter is in fp32 in
    any case: on a base of 16 bits each of its targets keeps its own input once more, in fp32 or, under autocast (as
    on a GPU), in 16 bits. `mask_bytes`: of a value of dropout's mask, 4 on a CPU and 1 on a GPU.
    """
    size = ValueBytes(value_bytes, BF16 if autocast else FP32, mask_bytes)
    return frozen_bytes(model, padded_to, adapter.virtual_tokens, value_bytes) + adapter.saved_bytes(model, size)


def frozen_bytes(model: ModelShape, padded_to: int | None, virtual_tokens: int, value_bytes: int) -> float:
    """Return the bytes that one token leaves in one frozen block, as `saved_bytes` counts them."""
    kv, row = model.kv_size if padded_to is None else model.q_size, padded_to or 0
    stretch = 1.0
    if virtual_tokens and padded_to:  # they always bring a mask; keys and values are longer by them
        row = padded_to + virtual_tokens
        stretch = row / padded_to
    norms = model.norms * (model.hidden + 1)  # the input of each RMSNorm and its 1/rms, in fp32
    norms += (model.q_size + model.kv_size) * model.qk_norm + model.latent_ranks
    computed = 2 * model.q_size + 2 * kv * stretch + model.latent_rest + model.mlp_values  # q, k, v, attention's output
    if model.keeps_scores:
        attention = row * model.heads * model.score_bytes[value_bytes == BF16] + model.heads * INT64
    else:
        attention = row * value_bytes + model.heads * FP32  # the mask, sums of exponentials
    return computed * value_bytes + norms * FP32 + attention + _router_bytes(model)


def _router_bytes(model: ModelShape) -> float:
    """Probabilities of all experts, weights and places of the chosen ones; on average over the blocks."""
    chosen = model.experts_per_token * (ROUTER_COPIES * FP32 + PLACES * INT64)
    return (model.num_experts * FP32 + chosen) * model.expert_blocks / model.layers


def weight_bytes(model: ModelShape, quant: QuantSpec, value_bytes: int = FP32, *, dequantised: bool = False) -> int:
    """Return the bytes of the resident base. `value_bytes`: 4 for fp32, 2 for bf16 and fp16."""
    if quant.method.keeps_checkpoint:
        return (model.params - model.packed_params) * value_bytes + model.packed_bytes
    if not quant.is_packed or dequantised:
        return model.params * value_bytes
    packed = (*model.linears, *(model.experts if quant.is_4bit else ()))
    weights, rows = sum(one.count * one.params for one in packed), sum(one.count * one.outputs for one in packed)
    plain = (model.params - weights) * value_bytes
    return plain + round(quant.method.packed_bytes(weights, rows, quant.double_quant))


def loading_bytes(model: ModelShape, quant: QuantSpec) -> dict[str, int]:
    """Beside the resident base while it is quantised: the pages of the checkpoint's file that were read."""
    read = quant.is_packed and not quant.method.keeps_checkpoint  # a kept checkpoint is the resident base
    return {"checkpoint file": model.params * model.file_bytes} if read else {}


def largest_linear(model: ModelShape, quant: QuantSpec) -> int:
    """Weights that are unpacked at once of a quantised base: the largest linear, or all experts of a block."""
    experts = model.expert_params // max(1, model.expert_blocks) if quant.is_4bit else 0
    return max(experts, *(linear.params for linear in model.linears))


def unpacked_params(model: ModelShape, quant: QuantSpec) -> int:
    """Weights that a pass unpacks of a quantised base, of experts all, whichever the tokens pass."""
    return model.linear_params + (model.expert_params if quant.is_4bit else 0)


def unpacked_layer_bytes(model: ModelShape, quant: QuantSpec, value_bytes: int = FP32) -> int:
    """Return the bytes of the largest quantised linear while it is multiplied: its plain weight, and steps towards it.

    A kept checkpoint's values pass through bytes (two copies) and fp32 or 16 bits.
    """
    steps = 6 if quant.method.keeps_checkpoint else 0
    return largest_linear(model, quant) * (value_bytes + steps)


def kv_bytes(model: ModelShape, tokens: int, value_bytes: int = FP32) -> int:
    """Keys and values of `tokens` positions in all blocks."""
    return model.kv_values * tokens * value_bytes


CUDA_BYTES = 600 * MIB
"""CUDA's context, cuBLAS' workspaces and the kernels' code on one GPU, outside of torch's allocator."""
FRAGMENTS = 0.03
"""Of a GPU's allocated memory: blocks that torch's allocator cannot put together again."""


START_S = 10.0
"""CPU seconds of a process from its start to its first step: imports (8.5), the base, the trainer."""
HEADROOM = 0.95
"""Share of the available memory that a plan may take."""


@dataclass(frozen=True)
class StagePlan:
    """Memory and time that a stage takes, predicted before it starts."""

    stage: str
    processes: int
    peak_bytes_per_process: int
    """On a GPU what the process takes of the GPU."""
    total_bytes: int
    seconds: float
    verdict: str
    """`fits`, or `needs 9.1 of 8.0 GiB; fits with optim.micro_batch=2`."""
    parts: tuple[tuple[str, int], ...]
    """Bytes of one process, by name."""
    assumptions: tuple[str, ...]
    step_s: float | None = None
    """Seconds of one optimizer step, where the stage trains."""
    warnings: tuple[str, ...] = ()
    """Settings that work, and are better changed."""
    host_bytes_per_process: int = 0
    """Peak in the machine's own memory, where the peak per process is a GPU's."""

    @property
    def fits(self) -> bool:
        return self.verdict == "fits"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "parts": dict(self.parts)}


def charge_bytes(peak_bytes: int, processes: int, machine: Machine) -> int:
    """Bytes to hold against `machine.memory_bytes`: processes share a machine's memory, and have a GPU each."""
    return peak_bytes if machine.gpu is not None else peak_bytes * processes


def fits(charged_bytes: int, machine: Machine) -> bool:
    """Return whether so much leaves the headroom free."""
    return charged_bytes <= HEADROOM * machine.memory_bytes


def of_room(charged_bytes: int, machine: Machine) -> str:
    """`9.1 of 8.0 GiB`, of one GPU where there are GPUs."""
    each = " a GPU" if machine.gpu is not None else ""
    return f"{charged_bytes / GIB:.1f} of {machine.memory_bytes / GIB:.1f} GiB{each}"


def verdict_of(charged_bytes: int, machine: Machine, ways_out: Iterable[tuple[str, int]]) -> str:
    """Return `fits`, or what it needs and the nearest change that fits. Bytes are those of `charge_bytes`."""
    if fits(charged_bytes, machine):
        return "fits"
    needs = f"needs {of_room(charged_bytes, machine)}"
    way_out = next((setting for setting, size in ways_out if fits(size, machine)), None)
    return f"{needs}; fits with {way_out}" if way_out else f"{needs}; no change of the spec fits: take a smaller base"
