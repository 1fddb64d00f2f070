"""Report of a dataset as training reads it: formats, keys, lengths, duplicates, and tokens with their loss mask."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from graftwork import config
from graftwork.base.load import prompt_template
from graftwork.datasets.examples import iter_examples, purpose_keys
from graftwork.datasets.formats import LABELS, Purpose, detect
from graftwork.datasets.sources import RowSource
from graftwork.errors import DataError
from graftwork.training.objectives.protocol import Part
from graftwork.training.objectives.rows import PackedRows, ReadPart, TokenRows, data_of
from graftwork.training.spec import TrainSpec

if TYPE_CHECKING:
    from graftwork.prompts.template import Template

QUANTILES = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
LONGEST = 1 << 20
"""Row length that no spec limits."""
_OBJECTIVE_OF: dict[Purpose, str] = {"pairs": "dpo", "unpaired": "kto", "conversations": "sft", "documents": "cpt"}
"""Objective of a file without a spec, by the first purpose that has a format for its first row."""


@dataclass(frozen=True)
class ShownToken:
    """One token: its id, the text that it adds to the row, and whether it is a target of the loss."""

    id: int
    text: str
    trained: bool


@dataclass(frozen=True)
class ShownRow:
    """One sequence of a row as the model sees it. side: `chosen` or `rejected` of a pair, `prompts` of an RL row."""

    id: str
    side: str | None
    tokens: tuple[ShownToken, ...]


@dataclass(frozen=True)
class SequenceLengths:
    """Tokens of the sequences of a dataset, those longer than `max_length` included."""

    sequences: int
    total: int
    trained: int
    """Tokens that are targets of the loss, of the sequences that fit."""
    too_long: int
    """Rows longer than `max_length`."""
    max_length: int | None
    quantiles: dict[str, int]
    histogram: dict[str, int]
    """Sequences by length; a bin is named by its largest length."""


@dataclass(frozen=True)
class DatasetReport:
    """What a training run reads from one dataset."""

    source: str
    objective: str
    format: str
    files: dict[str, str]
    """Format of each file."""
    count: int
    """Rows that are read, those that are too long included."""
    used: dict[str, int]
    """Rows by key that is read; a key of a turn is `messages[].KEY`."""
    ignored: dict[str, int]
    duplicates: int
    """Rows whose content came before."""
    eval: dict[str, int] | None
    """Of the held-out rows: `rows`, and `overlap`, those whose content is among the training rows."""
    tokens: SequenceLengths | None
    """Null without a base."""
    notes: tuple[str, ...]
    rows: tuple[ShownRow, ...]


def spec_of_file(path: str, base: str, sets: Sequence[str] = ()) -> TrainSpec:
    """A spec with the defaults of the objective that the file's first row is for, and no limit of length.

    sets: `key=value` changes of the spec; with any of `data` the objective is sft unless one names it.
    """
    of_data = any(one.startswith("data.") for one in sets)
    kind = "sft" if of_data else _OBJECTIVE_OF[purpose_of(path)]
    tree: dict[str, Any] = {"name": "data", "base": base, "data": {"train": path}, "objective": {"kind": kind}}
    tree["max_length"] = LONGEST if kind != "cpt" else 2048
    return config.validate(TrainSpec, config.with_sets(tree, sets), where="--set")


def purpose_of(path: str) -> Purpose:
    """Purpose of the rows of a file, by its first row. Raises DataError for an unknown format."""
    for _, record, where in RowSource.of(path).records(RowSource.of(path).parts[0]):
        for purpose in _OBJECTIVE_OF:
            if purpose == "unpaired" and not any(isinstance(record.get(key), bool) for key in LABELS):
                continue
            with contextlib.suppress(DataError):
                detect(record, purpose, where)
                return purpose
        detect(record, "conversations", where)
    return "conversations"  # without rows, which reading reports


def report_without_base(path: str) -> DatasetReport:
    """Report on a file's format, keys and duplicates alone."""
    purpose = purpose_of(path)
    keys = purpose_keys(purpose)
    contents = [example.content_hash() for example in iter_examples(path, purpose, keys=keys)]
    read = ReadPart(TokenRows.from_pairs([]), 0, "", keys=keys)
    note = "no base is given: add --base BASE or --spec FILE to see tokens and ignored keys of the run"
    return _report(path, _OBJECTIVE_OF[purpose], read, len(contents), _duplicates(contents), None, None, (note,), ())


def report_on(spec: TrainSpec, part: Part = "train", rows: int = 3) -> DatasetReport:
    """Report on one dataset of a run, with the tokens of its first `rows` rows. Raises as `prepare` does.

    The dataset is read by the run's objective, as it is before training.
    """
    template = prompt_template(spec.base)
    read = spec.objective.read(spec, template, part)
    held_out = None
    if spec.data.eval is not None and part == "train":
        other = spec.objective.read(spec, template, "eval")
        overlap = int(np.isin(np.array(other.contents), np.array(read.contents)).sum())
        held_out = {"rows": len(other.contents), "overlap": overlap}
    whole = read
    if read.dropped:
        longest = spec.model_copy(update={"max_length": LONGEST, "on_overlong": "drop"})
        whole = spec.objective.read(longest, template, part)
    counts = _count(read, whole, spec.max_length)
    shown = tuple(_shown(read, template, rows))
    name, keys = f"data.{part}", read.keys
    more = (
        (*keys.mixture_note(name), *keys.template_notes(name, names=template.can.names, specials=template.specials))
        if keys
        else ()
    )
    notes = (*read.notes, *more, *read.warnings)
    source = str(data_of(spec, part)[0])
    count, duplicates = len(read.contents), _duplicates(read.contents)
    return _report(source, spec.objective.kind, read, count, duplicates, held_out, counts, notes, shown)


def _report(
    source: str,
    objective: str,
    read: ReadPart,
    count: int,
    duplicates: int,
    held_out: dict[str, int] | None,
    tokens: SequenceLengths | None,
    notes: tuple[str, ...],
    rows: tuple[ShownRow, ...],
) -> DatasetReport:
    keys = read.keys
    files = dict(keys.formats) if keys else {}
    return DatasetReport(
        source=source,
        objective=objective,
        format=", ".join(dict.fromkeys(files.values())) or "text files",
        files=files,
        count=count,
        used=_by_count(keys.used) if keys else {},
        ignored=_by_count(keys.ignored) if keys else {},
        duplicates=duplicates,
        eval=held_out,
        tokens=tokens,
        notes=notes,
        rows=rows,
    )


def _by_count(keys: Counter[str]) -> dict[str, int]:
    return dict(sorted(keys.items(), key=lambda item: (-item[1], item[0])))


def token_texts(ids: Sequence[int], template: Template) -> list[str]:
    """The text that each token adds to those before it; empty for a token that ends inside a character."""
    texts: list[str] = []
    before, done = 0, 0  # tokens [before, done) are the context of the next text
    for end in range(1, len(ids) + 1):
        context = template.decode(ids[before:done], skip_special=False)
        text = template.decode(ids[before:end], skip_special=False)
        if text.endswith("\ufffd") and end < len(ids):
            texts.append("")
            continue
        texts.append(text[len(context) :])
        before, done = done, end
    return texts


def _sides(rows: Any, name: str | None = None) -> Iterator[tuple[str | None, TokenRows]]:
    """The sets of token rows in a set of rows, with the name of the field that holds each."""
    if isinstance(rows, PackedRows):
        yield name, rows.documents
    elif isinstance(rows, TokenRows):
        yield name, rows
    elif is_dataclass(rows):
        for field in fields(rows):
            inner = getattr(rows, field.name)
            if isinstance(inner, TokenRows | PackedRows) or hasattr(inner, "rows"):
                yield from _sides(inner, name if field.name == "rows" else field.name)


def _shown(read: ReadPart, template: Template, rows: int) -> Iterator[ShownRow]:
    """The sequences of the first rows. A row that was dropped has none."""
    sides = list(_sides(read.rows))
    ids = list(read.keys.ids) if read.keys else []
    for index in range(max((len(side) for _, side in sides), default=0)):
        number = read.numbers[index] if read.numbers else index + 1
        if number > rows:
            return
        for name, side in sides:
            tokens, trained = (part.tolist() for part in side.row(index))
            texts = token_texts(tokens, template)
            shown = tuple(ShownToken(*one) for one in zip(tokens, texts, trained, strict=True))
            yield ShownRow(ids[number - 1] if number <= len(ids) else str(number), name, shown)


def _count(read: ReadPart, whole: ReadPart, max_length: int) -> SequenceLengths:
    lengths = np.concatenate([side.lengths_N for _, side in _sides(whole.rows)])
    trained = sum(int(side.trained_T.sum()) for _, side in _sides(read.rows))
    limit = max_length if max_length < LONGEST else None
    quantiles = {name: int(np.quantile(lengths, at, method="higher")) for name, at in QUANTILES.items()}
    ends = 1 << np.arange(4, max(int(lengths.max()) - 1, 16).bit_length() + 1)
    counts, _ = np.histogram(lengths, bins=[0, *(ends + 0.5)])
    histogram = {str(end): int(count) for end, count in zip(ends, counts, strict=True)}
    return SequenceLengths(len(lengths), int(lengths.sum()), trained, read.dropped, limit, quantiles, histogram)


def _duplicates(contents: Sequence[int]) -> int:
    return len(contents) - len(set(contents))
