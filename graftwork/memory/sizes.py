"""What a prediction is made of: sizes of rows, and named bytes of one process."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

MIB = 2**20
GIB = 2**30
FP32 = 4
BF16 = 2


@dataclass(frozen=True)
class EachRow:
    """Sizes of each of N rows, in tokens."""

    lengths_N: NDArray[np.int64]
    """What the model computes for a row: what steps are balanced by."""
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
    def from_lengths(
        cls, lengths: Sequence[int], trained: Sequence[int], widths: Sequence[int] | None = None
    ) -> "RowSizes":
        """From each row's tokens, trained tokens and, where a row is several sequences, its longest sequence."""
        lengths_N, trained_N = np.asarray(lengths, dtype=np.int64), np.asarray(trained, dtype=np.int64)
        each = EachRow(lengths_N, trained_N, lengths_N if widths is None else np.asarray(widths, dtype=np.int64))
        return cls._of(each)

    @classmethod
    def _of(cls, each: EachRow) -> "RowSizes":
        lengths_N, trained_N = each.lengths_N, each.trained_N
        return cls(len(lengths_N), int(lengths_N.max()), float(lengths_N.mean()), int(trained_N.max()),
                   float(trained_N.mean()), int(lengths_N.min()), each)  # fmt: skip

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
        kept = (self.each.lengths_N[stays_N], self.each.trained_N[stays_N], widths_N[stays_N])
        return length, self._of(EachRow(*kept))

    @property
    def padded(self) -> bool:
        """Whether rows of one forward pass differ in length: then there is a mask."""
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
    """What all items of some parts ask of a model, in tokens."""

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
