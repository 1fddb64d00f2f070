"""Rows of the dataset as token ids and loss masks: rendered once in the driver, shared by workers and trials."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graftwork.training.spec import TrainSpec


@dataclass(frozen=True)
class TokenRows:
    """Rows laid end to end. N rows, T tokens over all; row i is `[offsets[i], offsets[i + 1])`."""

    ids_T: NDArray[np.int32]
    trained_T: NDArray[np.bool_]
    """True where the token is a target of the loss."""
    offsets: NDArray[np.int64]
    """N + 1 positions."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Ids and mask of one row."""
        start, end = self.offsets[index], self.offsets[index + 1]
        return self.ids_T[start:end], self.trained_T[start:end]

    @classmethod
    def of(cls, rows: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> "TokenRows":
        """From (ids, mask) pairs."""
        lengths = [len(ids) for ids, _ in rows]
        return cls(
            np.array([token for ids, _ in rows for token in ids], dtype=np.int32),
            np.array([trained for _, mask in rows for trained in mask], dtype=np.bool_),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        )


@dataclass(frozen=True)
class PreparedData:
    """All that the loop needs of the datasets, and what was left out."""

    train: TokenRows
    eval: TokenRows | None
    dropped: int
    """Training rows longer than `max_length`."""
    dropped_eval: int
    pad_id: int
    fingerprint: str
    """Digest of the raw rows, as the manifest records it."""


def prepare(spec: TrainSpec) -> PreparedData:
    """Read, render and check the rows of a spec. Runs in the driver, before any worker starts.

    Raises DataError: a bad row, an empty set, a row that is too long under `too_long: refuse`, nothing left to train on.
    """
    raise NotImplementedError
