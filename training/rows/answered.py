"""Held-out rows whose answers are generated and compared: where each answer begins, and the group that it counts in."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from graftwork.training.rows.token_rows import TokenRows


@dataclass(frozen=True)
class AnsweredRows(TokenRows):
    """Token rows of which the tokens from `starts_N[i]` on are the answer to those before."""

    starts_N: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    groups_N: tuple[str, ...] = ()
    """A name a row, such as `length=512 depth=50`; empty: no groups."""

    def prompt(self, index: int) -> list[int]:
        """What the answer is asked by."""
        ids: list[int] = self.row(index)[0][: self.starts_N[index]].tolist()
        return ids

    def answer(self, index: int) -> list[int]:
        """The right answer, its end token with it."""
        ids: list[int] = self.row(index)[0][self.starts_N[index] :].tolist()
        return ids


def answered(rows: TokenRows, groups: tuple[str, ...] = ()) -> AnsweredRows:
    """Rows whose answer is the last run of trained tokens, as a conversation's last turn is."""
    starts = []
    for index in range(len(rows)):
        trained = rows.row(index)[1]
        last = int(np.flatnonzero(trained)[-1])
        before = np.flatnonzero(~trained[:last])
        starts.append(int(before[-1]) + 1 if len(before) else 0)
    return AnsweredRows(rows.ids_T, rows.trained_T, rows.offsets_N1, np.array(starts, dtype=np.int64), groups)
