"""The datasets of a run as token ids: rendered once in the driver, shared by workers and trials."""

import hashlib
import importlib
from dataclasses import dataclass, replace
from typing import Protocol

from graftwork import base_model
from graftwork.chat import Template
from graftwork.errors import DataError
from graftwork.storage import Store
from graftwork.training.rows.kept import KeptRows
from graftwork.training.rows.packed import PackedRows
from graftwork.training.rows.part import Part, ReadPart, format_row_count
from graftwork.training.rows.token_rows import Rows, TokenRows
from graftwork.training.spec import TrainSpec

__all__ = ["PreparedData", "TokenRows", "prepare"]

READERS = {
    "cpt": "graftwork.training.rows.cpt",
    "fim": "graftwork.training.rows.fim",
    "sft": "graftwork.training.rows.sft",
    "dpo": "graftwork.training.rows.pairs",
    "reward": "graftwork.training.rows.pairs",
    "distill": "graftwork.training.rows.distill",
    "grpo": "graftwork.training.rows.rl",
    "rloo": "graftwork.training.rows.rl",
}
"""The module whose `read` renders the rows of each kind of finetuning."""


class Reader(Protocol):
    """A module of `training.rows`."""

    def read(self, spec: TrainSpec, template: Template, part: Part) -> ReadPart:
        """One dataset of the spec, rendered. Raises DataError, StorageError."""
        ...


@dataclass(frozen=True)
class PreparedData:
    """All that the loop needs of the datasets, and what was left out."""

    train: Rows
    eval: Rows | None
    dropped: int
    """Training rows longer than `max_length`."""
    dropped_eval: int
    pad_id: int
    fingerprint: str
    """Digest of the raw training rows, as the adapter's manifest records it."""
    notes: tuple[str, ...] = ()
    """What was left out or decided of the training rows."""
    warnings: tuple[str, ...] = ()
    """Warnings before a run: ignored keys, held-out rows that are trained on, too few rows."""
    trained_tokens: tuple[int, ...] = ()
    """Rows of the embedding that are trained beside the adapter."""

    def digest(self) -> str:
        """sha256 hex over what the model sees: data, template, prompt and retrieved context at once."""
        seen = self.train.digest() + (self.eval.digest() if self.eval else "")
        return hashlib.sha256(seen.encode()).hexdigest()

    def left_out(self, max_length: int) -> str:
        """The rows that are too long, counted: `3 of 48 training rows and 6 of 24 held-out rows ...`; empty: none."""
        sets = (("training", self.dropped, len(self.train)), ("held-out", self.dropped_eval, len(self.eval or ())))
        counts = [f"{dropped} of {dropped + kept} {name} rows" for name, dropped, kept in sets if dropped]
        return f"{' and '.join(counts)} left out: longer than max_length={max_length}" if counts else ""

    def shared(self, store: Store) -> "PreparedData":
        """The same, with large sets of rows copied to the store: workers of other machines take them from there."""

        def copied(rows: Rows | None) -> Rows | None:
            return rows.shared(store) if isinstance(rows, KeptRows | PackedRows) else rows

        return replace(self, train=copied(self.train) or self.train, eval=copied(self.eval))


def prepare(spec: TrainSpec) -> PreparedData:
    """Read, render and check the rows of a spec. Runs in the driver, before any worker starts.

    Raises DataError (a bad row, an empty set, a row too long under `on_overlong: refuse`, nothing left to train on,
    held-out rows that are the training rows), BaseModelError, StorageError.
    """
    template = base_model.template(base_model.resolve(spec.base))
    reader: Reader = importlib.import_module(READERS[spec.objective.kind])
    train = reader.read(spec, template, "train")
    held_out = reader.read(spec, template, "eval") if spec.data.eval is not None else None
    warnings = (*train.warnings, *_few(train), *(_held_out_warnings(spec, train, held_out) if held_out else ()))
    return PreparedData(
        train=train.rows,
        eval=held_out.rows if held_out else None,
        dropped=train.dropped,
        dropped_eval=held_out.dropped if held_out else 0,
        pad_id=template.pad_id,
        fingerprint=train.fingerprint,
        notes=train.notes,
        warnings=tuple(dict.fromkeys(warnings)),
        trained_tokens=train.trained_tokens,
    )


def _few(train: ReadPart) -> tuple[str, ...]:
    if len(train.contents) != 1:
        return ()
    return ("data.train: 1 row: every step repeats it, so its loss says nothing about other rows",)


def _held_out_warnings(spec: TrainSpec, train: ReadPart, held_out: ReadPart) -> tuple[str, ...]:
    """Ignored keys, and held-out rows that are trained on. Raises DataError where both datasets are the same rows."""
    if held_out.is_same(train):
        raise DataError(
            f"data.eval={spec.data.eval}",
            f"its {format_row_count(held_out.contents, 'row')} are the rows of data.train={spec.data.train}",
            "held-out rows are not trained on",
            "name other rows, or leave data.eval out",
        )
    shared = held_out.rows_in(train)
    rows = format_row_count(held_out.contents, "row")
    seen = f"data.eval: {shared} of {rows} also in data.train, so its loss is too low"
    return (*held_out.warnings, *([seen] if shared else []))
