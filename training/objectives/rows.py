"""Rows of a run: kinds of token rows, packing by best fit decreasing, the cache of rendered rows, reading.

    <cache>/tokens/<key>/{ids.bin, trained.bin, offsets.bin, about.json}

Small sets travel with the job. Of a set past `INLINE_BYTES` only its place does: a worker maps the files of its
machine, copied from `<root>/tokens/<key>` where they are not there.

The model is given positions that begin again at each document and no attention mask: transformers (5.23,
masking_utils.find_packed_sequence_indices) then keeps documents apart. With a mask of ones it does not.
"""

import bisect
import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from graftwork.base.load import resolve
from graftwork.base.load import template as base_template
from graftwork.datasets.keys import KeyCheck
from graftwork.datasets.rows import DatasetRow, key_check, resolve_prompt
from graftwork.datasets.sources import RowSource
from graftwork.errors import DataError
from graftwork.prompts.render import Prompt
from graftwork.storage.local import build_once
from graftwork.storage.store import Store, cache_root
from graftwork.training.objectives.protocol import Packing, Part, Rows

if TYPE_CHECKING:
    import torch

    from graftwork.prompts.template import Template
    from graftwork.training.spec import TrainSpec

IGNORED = -100  # torch's cross-entropy leaves these targets out


@dataclass(frozen=True)
class TokenRows:
    """Rows laid end to end. N rows, T tokens over all; row i is `[offsets_N1[i], offsets_N1[i + 1])`."""

    ids_T: NDArray[np.int32]
    trained_T: NDArray[np.bool_]
    """True where the token is a target of the loss."""
    offsets_N1: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets_N1) - 1

    @property
    def lengths_N(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        return np.diff(self.offsets_N1)

    @property
    def scored_N(self) -> NDArray[np.int64]:
        """Trained tokens of each row."""
        return np.add.reduceat(self.trained_T, self.offsets_N1[:-1], dtype=np.int64)

    @property
    def widths_N(self) -> NDArray[np.int64]:
        """A row is one sequence."""
        return self.lengths_N

    def row(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Ids and mask of one row."""
        start, end = self.offsets_N1[index], self.offsets_N1[index + 1]
        return self.ids_T[start:end], self.trained_T[start:end]

    def digest(self) -> str:
        """sha256 hex over ids, masks and row borders."""
        parts = (self.ids_T, self.trained_T, self.offsets_N1)
        return hashlib.sha256(b"".join(hashlib.sha256(part.data).digest() for part in parts)).hexdigest()

    def collate(self, indices: Sequence[int], pad_id: int) -> "dict[str, torch.Tensor]":
        """Input ids, attention mask and labels (B, T), padded on the right to the batch's longest row."""
        import torch

        width = int(max(self.lengths_N[i] for i in indices))
        ids_BT = torch.full((len(indices), width), pad_id, dtype=torch.long)
        mask_BT = torch.zeros((len(indices), width), dtype=torch.long)
        labels_BT = torch.full((len(indices), width), IGNORED, dtype=torch.long)
        for place, index in enumerate(indices):
            ids, trained = self.row(int(index))
            ids_BT[place, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
            mask_BT[place, : len(ids)] = 1
            labels_BT[place, : len(ids)] = torch.from_numpy(np.where(trained, ids, IGNORED).astype(np.int64))
        return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT}

    @classmethod
    def from_pairs(cls, rows: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> "TokenRows":
        """From (ids, mask) pairs."""
        return cls(
            np.array([token for ids, _ in rows for token in ids], dtype=np.int32),
            np.array([trained for _, mask in rows for trained in mask], dtype=np.bool_),
            np.cumsum([0, *(len(ids) for ids, _ in rows)], dtype=np.int64),
        )


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int, device: Any = None) -> "tuple[torch.Tensor, torch.Tensor]":
    """Ids and attention mask (B, T) of prompts, padded on the left, so that all answers begin in one column."""
    import torch

    width = max(map(len, prompts))
    ids_BT = torch.tensor([[pad_id] * (width - len(ids)) + list(ids) for ids in prompts], device=device)
    mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    return ids_BT, mask_BT


@dataclass(frozen=True)
class AnsweredRows(TokenRows):
    """Token rows of which the trained tokens from `starts_N[i]` on are the answer to those before."""

    starts_N: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    groups_N: tuple[str, ...] = ()
    """A name a row, such as `length=512, depth=50`; empty: no groups."""

    def prompt(self, index: int) -> list[int]:
        """Ids before the answer."""
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
        return replace(self, documents=self.documents.shared(store)) if isinstance(self.documents, CachedRows) else self

    def _sums(self, of_D: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.add.reduceat(of_D[self.order_D], self.offsets_P1[:-1]) if len(self) else np.zeros(0, dtype=np.int64)


def check_packing(run: "TrainSpec", packing: Packing) -> None:
    """Raise ValueError where rows of several documents cannot be trained."""
    if packing != "none" and run.adapter.virtual_tokens:
        raise ValueError(
            f"objective.packing={packing} can't go with adapter.kind={run.adapter.kind}: it would come before the "
            "first document of a row alone. Set objective.packing=none"
        )


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


INLINE_BYTES = 64 * 2**20
"""Most bytes of a set that is sent whole to every worker."""
FLUSH_TOKENS = 1 << 20
FOLDER = "tokens"


class RowWriter:
    """Takes rows one after another; no more than `FLUSH_TOKENS` of them wait in memory."""

    def __init__(self, folder: Path) -> None:
        self._ids, self._trained = (folder / "ids.bin").open("wb"), (folder / "trained.bin").open("wb")
        self._waiting: tuple[list[int], list[bool]] = ([], [])
        self._offsets, self._folder = [0], folder

    def add(self, ids: Sequence[int], trained: Sequence[bool]) -> None:
        """One row, behind those before it."""
        self._waiting[0].extend(ids)
        self._waiting[1].extend(trained)
        self._offsets.append(self._offsets[-1] + len(ids))
        if len(self._waiting[0]) >= FLUSH_TOKENS:
            self._flush()

    def close(self, about: dict[str, Any]) -> None:
        """Write what waits, where the rows begin, and `about`."""
        self._flush()
        self._ids.close()
        self._trained.close()
        np.array(self._offsets, dtype=np.int64).tofile(self._folder / "offsets.bin")
        (self._folder / "about.json").write_text(json.dumps(about), encoding="utf-8")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def _flush(self) -> None:
        ids, trained = self._waiting
        np.array(ids, dtype=np.int32).tofile(self._ids)
        np.array(trained, dtype=np.bool_).tofile(self._trained)
        self._waiting = ([], [])


@dataclass(frozen=True)
class CachedRows(TokenRows):
    """Token rows in files. Sent to another process as their key and the root that has a copy."""

    key: str = ""
    root: str | None = None

    def __reduce__(self) -> tuple[Callable[..., TokenRows], tuple[object, ...]]:
        return open_rows, (self.key, self.root)

    def shared(self, store: Store) -> "CachedRows":
        """The same rows, with a copy in the store that other machines can take. Runs in the driver, before workers."""
        if not store.exists(FOLDER, self.key, "about.json"):
            folder = cache_root() / FOLDER / self.key
            for name in ("ids.bin", "trained.bin", "offsets.bin", "about.json"):  # the last says that all are there
                store.upload(folder / name, FOLDER, self.key, name)
        return CachedRows(self.ids_T, self.trained_T, self.offsets_N1, self.key, store.uri)


def cached_rows(key: str, build: Callable[[RowWriter], dict[str, Any]]) -> tuple[TokenRows, dict[str, Any]]:
    """The rows of a key and what was noted of them; rendered by `build` the first time. `build` gives the note."""

    def fill(folder: Path) -> None:
        writer = RowWriter(folder)
        writer.close(build(writer))

    folder = build_once(cache_root() / FOLDER / key, fill)
    return open_rows(key, None), json.loads((folder / "about.json").read_text(encoding="utf-8"))


def open_rows(key: str, root: str | None) -> TokenRows:
    """The rows of a key: of this machine's cache, else of the root's copy. Large ones are mapped and not read."""

    def fetch(folder: Path) -> None:
        assert root is not None, f"token rows {key} are in no store"
        Store(root).download(folder, FOLDER, key)

    folder = build_once(cache_root() / FOLDER / key, fetch)
    offsets = np.fromfile(folder / "offsets.bin", dtype=np.int64)
    ids, trained = folder / "ids.bin", folder / "trained.bin"
    if offsets[-1] * 5 <= INLINE_BYTES:
        return TokenRows(np.fromfile(ids, dtype=np.int32), np.fromfile(trained, dtype=np.bool_), offsets)
    return CachedRows(
        np.memmap(ids, dtype=np.int32, mode="r"),
        np.memmap(trained, dtype=np.bool_, mode="r"),
        offsets,
        key,
        root,
    )


@dataclass(frozen=True)
class ReadPart:
    """Rendered rows of one dataset, and what was left out of it."""

    rows: Rows
    dropped: int
    """Rows longer than `max_length`."""
    fingerprint: str
    """Digest of the raw rows."""
    notes: tuple[str, ...] = ()
    """Notes for the run's report: rows left out, decisions."""
    trained_tokens: tuple[int, ...] = ()
    """Rows of the embedding that are to be trained with the adapter."""
    warnings: tuple[str, ...] = ()
    """Ignored keys of the dataset, and of the rows of the prompt's worked examples."""
    contents: "array[int]" = field(default_factory=lambda: array("q"))
    """A hash of each raw row without its id (`Example.content_hash`)."""
    keys: KeyCheck | None = None
    """Format, ids, used and ignored keys of the rows that were read."""
    numbers: tuple[int, ...] = ()
    """The raw row (from 1, in order of reading) that each row of tokens came from; empty: each row gave one."""


def noted(rows: Iterable[DatasetRow], contents: "array[int]") -> Iterator[DatasetRow]:
    """Pass the rows on, and append the hash of each one's content to `contents`."""
    for row in rows:
        contents.append(row.content_hash())
        yield row


def data_of(spec: "TrainSpec", part: Part) -> tuple[RowSource, int | None]:
    """Source of a dataset of the run, and the number of its rows to read."""
    assert part == "train" or spec.data.eval is not None, "the spec has this part"
    return spec.data.source(part, spec.seed), spec.data.train_rows if part == "train" else spec.data.eval_rows


def read_prompt(spec: "TrainSpec", part: Part) -> tuple[Prompt, tuple[str, ...]]:
    """The prompt with its worked examples, and the note on keys that were ignored in them, once for the run."""
    keys = key_check("train")
    prompt = resolve_prompt(spec.prompt, keys)
    return prompt, keys.note("prompt.few_shot_file") if part == "train" else ()


def format_row_count(items: Sized, name: str) -> str:
    """`3 rows`, `1 row`."""
    return f"{len(items)} {name}{'s' * (len(items) != 1)}"


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
    """Notes on the training rows: rows left out, decisions."""
    warnings: tuple[str, ...] = ()
    """Warnings before a run: ignored keys, held-out rows that are trained on, too few rows."""
    trained_tokens: tuple[int, ...] = ()
    """Rows of the embedding that are trained with the adapter."""

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
        train, held_out = self.train, self.eval
        if isinstance(train, CachedRows | PackedRows):
            train = train.shared(store)
        if isinstance(held_out, CachedRows | PackedRows):
            held_out = held_out.shared(store)
        return replace(self, train=train, eval=held_out)


def prepare(spec: "TrainSpec") -> PreparedData:
    """Read, render and check the rows of a spec. Runs in the driver, before any worker starts.

    Raises DataError (a bad row, an empty set, a row too long under `on_overlong: refuse`, nothing left to train on,
    held-out rows that are the training rows), BaseModelError, StorageError.
    """
    template = base_template(resolve(spec.base))
    train = spec.objective.read(spec, template, "train")
    warnings, notes = [*train.warnings, *_template_notes(train, template, "train")], list(train.notes)
    notes += train.keys.mixture_note("data.train") if train.keys else ()
    if len(train.contents) == 1:
        warnings.append("data.train: 1 row: every step repeats it, so its loss says nothing about other rows")
    held_out = None
    if spec.data.eval is not None:
        held_out = spec.objective.read(spec, template, "eval")
        if sorted(held_out.contents) == sorted(train.contents):
            rows, source = format_row_count(held_out.contents, "row"), spec.data.source("train", spec.seed)
            raise DataError(
                f"data.eval={spec.data.eval}",
                f"its {rows} are the rows of data.train={source}",
                "held-out rows are not trained on",
                "name other rows, or leave data.eval out",
            )
        warnings += [*held_out.warnings, *_template_notes(held_out, template, "eval")]
        if isinstance(spec.data.eval, float):
            count, of = len(held_out.contents), len(held_out.contents) + len(train.contents)
            notes.append(f"data.eval={spec.data.eval:g}: {count} of {of} rows held out by their content")
        if shared := int(np.isin(np.array(held_out.contents), np.array(train.contents)).sum()):
            rows = format_row_count(held_out.contents, "row")
            warnings.append(f"data.eval: {shared} of {rows} also in data.train, so its loss is too low")
    return PreparedData(
        train=train.rows,
        eval=held_out.rows if held_out else None,
        dropped=train.dropped,
        dropped_eval=held_out.dropped if held_out else 0,
        pad_id=template.pad_id,
        fingerprint=train.fingerprint,
        notes=tuple(notes),
        warnings=tuple(dict.fromkeys(warnings)),
        trained_tokens=train.trained_tokens,
    )


def _template_notes(read: ReadPart, template: "Template", part: Part) -> tuple[str, ...]:
    keys, can = read.keys, template.can
    return keys.template_notes(f"data.{part}", names=can.names, specials=template.specials) if keys else ()
