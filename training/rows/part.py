"""One dataset of a run, rendered: what every kind's `read` gives."""

from collections.abc import Sized
from dataclasses import dataclass
from typing import Literal

from graftwork.errors import DataError
from graftwork.training.rows.token_rows import Rows
from graftwork.training.spec import TrainSpec

Part = Literal["train", "eval"]


@dataclass(frozen=True)
class ReadPart:
    """Rendered rows of one dataset, and what was left out of it."""

    rows: Rows
    dropped: int
    """Rows longer than `max_length`."""
    fingerprint: str
    """Digest of the raw rows."""
    notes: tuple[str, ...] = ()
    """What was left out or decided, for the run's report."""
    trained_tokens: tuple[int, ...] = ()
    """Rows of the embedding that are to be trained beside the adapter."""


def counted(items: Sized, name: str) -> str:
    """`3 rows`, `1 row`."""
    return f"{len(items)} {name}{'s' * (len(items) != 1)}"


def too_long(spec: TrainSpec, part: Part, number: int, row_id: str, tokens: int) -> DataError:
    """The error of a row that `too_long: refuse` does not let in."""
    return DataError(
        f"data.{part}={getattr(spec.data, part)}, row {number} (id {row_id})",
        f"{tokens} tokens",
        f"too_long=refuse allows at most max_length={spec.max_length}",
        f"set max_length={tokens}, shorten the row, or set too_long=drop",
    )


def nothing_left(spec: TrainSpec, part: Part, dropped: int) -> DataError:
    """The error of a set whose rows are all too long."""
    return DataError(
        f"data.{part}={getattr(spec.data, part)}",
        f"all {dropped} rows are longer than max_length={spec.max_length} tokens",
        "at least one row must fit",
        "raise max_length or shorten the rows",
    )
