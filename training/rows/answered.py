"""Held-out rows whose answers are generated and compared: where each answer begins, and the group that it counts in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from graftwork.training.rows.token_rows import TokenRows


@dataclass(frozen=True)
class AnsweredRows(TokenRows):
    """Token rows of which the trained tokens from `starts_N[i]` on are the answer to those before."""

    starts_N: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    groups_N: tuple[str, ...] = ()
    """A name a row, such as `length=512, depth=50`; empty: no groups."""

    def prompt(self, index: int) -> list[int]:
        """What the answer is asked by."""
        ids: list[int] = self.row(index)[0][: self.starts_N[index]].tolist()
        return ids

    def answer(self, index: int) -> list[int]:
        """The right answer, its end token with it; what a template writes behind that is left out."""
        ids, trained = (part[self.starts_N[index] :] for part in self.row(index))
        found: list[int] = ids[trained].tolist()
        return found


def answered(rows: TokenRows, groups: tuple[str, ...] = ()) -> AnsweredRows:
    """Rows whose answer is the last run of trained tokens, as a conversation's last turn is."""
    starts = []
    for index in range(len(rows)):
        trained = rows.row(index)[1]
        last = int(np.flatnonzero(trained)[-1])
        before = np.flatnonzero(~trained[:last])
        starts.append(int(before[-1]) + 1 if len(before) else 0)
    return AnsweredRows(rows.ids_T, rows.trained_T, rows.offsets_N1, np.array(starts, dtype=np.int64), groups)


def groups_of(fields: Mapping[str, Sequence[str]], numbers: Sequence[int]) -> tuple[str, ...]:
    """The group of each row, as `length=512, depth=50`. numbers: which row (from 1) of the file each one is."""
    return tuple(", ".join(f"{name}={values[number - 1]}" for name, values in fields.items()) for number in numbers)
