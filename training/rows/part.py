"""One dataset of a run, rendered: what every kind's `read` gives."""

from array import array
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from graftwork import data
from graftwork.chat import Prompt
from graftwork.data import DatasetRow
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
    warnings: tuple[str, ...] = ()
    """Ignored keys of the dataset, and of the rows of the prompt's worked examples."""
    contents: "array[int]" = field(default_factory=lambda: array("q"))
    """A hash of each raw row without its id, comparable in this process alone."""

    def rows_in(self, other: "ReadPart") -> int:
        """The number of raw rows of this dataset whose content is in the other one too."""
        return int(np.isin(np.array(self.contents), np.array(other.contents)).sum())

    def is_same(self, other: "ReadPart") -> bool:
        """True where both datasets hold the same raw rows, in any order."""
        return sorted(self.contents) == sorted(other.contents)


def noted(rows: Iterable[DatasetRow], contents: "array[int]") -> Iterator[DatasetRow]:
    """Pass the rows on, and append the hash of each conversation to `contents`."""
    for row in rows:
        contents.append(hash(row.messages))
        yield row


def read_prompt(spec: TrainSpec, part: Part) -> tuple[Prompt, tuple[str, ...]]:
    """The prompt with its worked examples, and the note on keys that were ignored in them, once for the run."""
    keys = data.key_check("train")
    prompt = data.resolve_prompt(spec.prompt, keys)
    return prompt, keys.note("prompt.few_shot_file") if part == "train" else ()


def format_row_count(items: Sized, name: str) -> str:
    """`3 rows`, `1 row`."""
    return f"{len(items)} {name}{'s' * (len(items) != 1)}"


def too_long(spec: TrainSpec, part: Part, number: int, row_id: str, tokens: int) -> DataError:
    """The error of a row that `on_overlong: refuse` does not let in."""
    return DataError(
        f"data.{part}={getattr(spec.data, part)}, row {number} (id {row_id})",
        f"{tokens} tokens",
        f"on_overlong=refuse allows at most max_length={spec.max_length}",
        f"set max_length={tokens}, shorten the row, or set on_overlong=drop",
    )


def nothing_left(spec: TrainSpec, part: Part, dropped: int) -> DataError:
    """The error of a set whose rows are all too long."""
    return DataError(
        f"data.{part}={getattr(spec.data, part)}",
        f"all {dropped} rows are longer than max_length={spec.max_length} tokens",
        "at least one row must fit",
        "raise max_length or shorten the rows",
    )
