"""Datasets of a run as token rows: reading, packing by best fit decreasing, answered held-out rows.

The model is given positions that begin anew at each document and no attention mask: transformers (5.23,
masking_utils.find_packed_sequence_indices) then keeps documents apart. With a mask of ones it does not.
"""

import bisect
import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from graftwork.base import load as base_model
from graftwork.datasets import rows as data
from graftwork.datasets.rows import DatasetRow
from graftwork.errors import DataError
from graftwork.prompts.render import Prompt
from graftwork.storage.store import Store
from graftwork.training.objectives.protocol import Packing, Part
from graftwork.training.objectives.row_cache import IGNORED, KeptRows, Rows, TokenRows

if TYPE_CHECKING:
    import torch

    from graftwork.training.spec import TrainSpec


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


@dataclass(frozen=True)
class PackedRows:
    """Packs of whole documents. P packs, D documents; pack p holds `order_D[offsets_P1[p]:offsets_P1[p + 1]]`."""

    documents: TokenRows
    order_D: NDArray[np.int64]
    offsets_P1: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets_P1) - 1

    @property
    def lengths_N(self) -> NDArray[np.int64]:
        """Tokens of each pack."""
        return self._sums(self.documents.lengths_N)

    @property
    def scored_N(self) -> NDArray[np.int64]:
        """Trained tokens of each pack."""
        return self._sums(self.documents.scored_N)

    @property
    def widths_N(self) -> NDArray[np.int64]:
        """A pack is one sequence."""
        return self.lengths_N

    def pack(self, index: int) -> NDArray[np.int64]:
        """The documents of a pack."""
        return self.order_D[self.offsets_P1[index] : self.offsets_P1[index + 1]]

    def digest(self) -> str:
        """sha256 hex over the documents and which stand together."""
        parts = (self.documents.digest().encode(), self.order_D.tobytes(), self.offsets_P1.tobytes())
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()

    def collate(self, indices: Sequence[int], pad_id: int) -> "dict[str, torch.Tensor]":
        """Input ids, positions and labels (B, T); padding on the right is a document of its own that nobody scores."""
        import torch

        width = int(self.lengths_N[list(indices)].max())
        ids_BT = np.full((len(indices), width), pad_id, dtype=np.int64)
        labels_BT = np.full((len(indices), width), IGNORED, dtype=np.int64)
        positions_BT = np.zeros((len(indices), width), dtype=np.int64)
        for place, index in enumerate(indices):
            start = 0
            for document in self.pack(int(index)):
                ids, trained = self.documents.row(int(document))
                end = start + len(ids)
                ids_BT[place, start:end] = ids
                labels_BT[place, start + 1 : end] = np.where(trained, ids, IGNORED)[1:]  # the first has no past
                positions_BT[place, start:end] = np.arange(len(ids))
                start = end
            positions_BT[place, start:] = np.arange(width - start)
        batch = {"input_ids": ids_BT, "position_ids": positions_BT, "labels": labels_BT}
        return {key: torch.from_numpy(value) for key, value in batch.items()}

    def shared(self, store: Store) -> "PackedRows":
        """The same packs of documents that workers of other machines can take from the store, where they are many."""
        return replace(self, documents=self.documents.shared(store)) if isinstance(self.documents, KeptRows) else self

    def _sums(self, of_D: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.add.reduceat(of_D[self.order_D], self.offsets_P1[:-1]) if len(self) else np.zeros(0, dtype=np.int64)


def pack_rows(rows: TokenRows, packing: Packing, max_length: int) -> tuple[Rows, tuple[str, ...]]:
    """The rows as the spec wants them, and a note on what packing gained. No row is longer than `max_length`."""
    if packing == "none":
        return rows, ()
    packs = best_fit(rows.lengths_N.tolist(), max_length)
    order_D = np.array([document for pack in packs for document in pack], dtype=np.int64)
    made = PackedRows(rows, order_D, np.cumsum([0, *map(len, packs)], dtype=np.int64))
    full = int(made.lengths_N.sum()) / (len(made) * max_length)
    return made, (
        f"packing=best_fit: {format_row_count(rows, 'document')} in {format_row_count(made, 'row')}, {full:.1%} full",
    )


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Indices of `lengths` in packs of at most `room`: the longest first, each into the fullest pack that holds it.

    Equal lengths give equal packs. At most 11/9 of the fewest packs possible, plus one (Johnson 1973).
    """
    packs: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, pack), ascending
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        assert lengths[index] <= room, f"row {index} of {lengths[index]} tokens in packs of {room}"
        place = bisect.bisect_left(free, (lengths[index], -1))
        left, pack = free.pop(place) if place < len(free) else (room, len(packs))
        if pack == len(packs):
            packs.append([])
        packs[pack].append(index)
        bisect.insort(free, (left - lengths[index], pack))
    return [sorted(pack) for pack in packs]


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


def read_prompt(spec: "TrainSpec", part: Part) -> tuple[Prompt, tuple[str, ...]]:
    """The prompt with its worked examples, and the note on keys that were ignored in them, once for the run."""
    keys = data.key_check("train")
    prompt = data.resolve_prompt(spec.prompt, keys)
    return prompt, keys.note("prompt.few_shot_file") if part == "train" else ()


def format_row_count(items: Sized, name: str) -> str:
    """`3 rows`, `1 row`."""
    return f"{len(items)} {name}{'s' * (len(items) != 1)}"


def too_long(spec: "TrainSpec", part: Part, number: int, row_id: str, tokens: int) -> DataError:
    """The error of a row that `on_overlong: refuse` does not let in."""
    return DataError(
        f"data.{part}={getattr(spec.data, part)}, row {number} (id {row_id})",
        f"{tokens} tokens",
        f"on_overlong=refuse allows at most max_length={spec.max_length}",
        f"set max_length={tokens}, shorten the row, or set on_overlong=drop",
    )


def nothing_left(spec: "TrainSpec", part: Part, dropped: int) -> DataError:
    """The error of a set whose rows are all too long."""
    return DataError(
        f"data.{part}={getattr(spec.data, part)}",
        f"all {dropped} rows are longer than max_length={spec.max_length} tokens",
        "at least one row must fit",
        "raise max_length or shorten the rows",
    )


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


def prepare(spec: "TrainSpec") -> PreparedData:
    """Read, render and check the rows of a spec. Runs in the driver, before any worker starts.

    Raises DataError (a bad row, an empty set, a row too long under `on_overlong: refuse`, nothing left to train on,
    held-out rows that are the training rows), BaseModelError, StorageError.
    """
    template = base_model.template(base_model.resolve(spec.base))
    train = spec.objective.read(spec, template, "train")
    held_out = spec.objective.read(spec, template, "eval") if spec.data.eval is not None else None
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


def _held_out_warnings(spec: "TrainSpec", train: ReadPart, held_out: ReadPart) -> tuple[str, ...]:
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
