"""What a prediction is made of: sizes of rows, and named bytes of one process."""

from collections.abc import Sequence
from dataclasses import dataclass

MIB = 2**20
GIB = 2**30
FP32 = 4
BF16 = 2


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

    @classmethod
    def of(cls, lengths: Sequence[int], trained: Sequence[int]) -> "RowSizes":
        """From each row's tokens and trained tokens."""
        count = len(lengths)
        return cls(
            count, int(max(lengths)), sum(lengths) / count, int(max(trained)), sum(trained) / count, int(min(lengths))
        )

    @classmethod
    def at_most(cls, max_length: int, count: int = 1) -> "RowSizes":
        """The largest rows that a spec admits, half of each trained."""
        return cls(count, max_length, max_length, max_length // 2, max_length / 2)

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
