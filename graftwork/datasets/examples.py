"""Examples: every row of a source in one form, whatever its format, split and mixed as the source says."""

import hashlib
import heapq
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from graftwork.config import canonical_json
from graftwork.datasets.formats import Format, Purpose, detect, normalise
from graftwork.datasets.keys import KeyCheck
from graftwork.datasets.readers import no_rows, require_new
from graftwork.datasets.sources import MixturePart, RowSource
from graftwork.datasets.turns import turn_content
from graftwork.errors import DataError
from graftwork.prompts.render import Message, Tool


@dataclass(frozen=True, slots=True)
class Example:
    """One row in the form that every format is brought to. Which fields are set depends on the purpose."""

    where: str
    """The row in its file, for errors: `rows.jsonl row 2`."""
    number: int
    """1-based row of its file."""
    id: str
    record: Mapping[str, Any]
    """The row as it was written, with `data.columns` and `data.template` applied."""
    messages: tuple[Message, ...] = ()
    """The conversation; of a pair, the turns before the two answers."""
    tools: tuple[Tool, ...] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    chosen: Message | None = None
    rejected: Message | None = None
    label: bool | None = None
    text: str | None = None

    def content_hash(self) -> int:
        """63 bits of the sha256 of what is read and learned: equal rows, equal number, on every machine.

        The ids of the row and of its calls, and the turns' weights, are left out.
        """
        answers = [None if one is None else turn_content(one) for one in (self.chosen, self.rejected)]
        more = (
            [answers, self.label, self.text] if (answers, self.label, self.text) != ([None, None], None, None) else None
        )
        return content_hash(self.messages, self.tools, self.template_kwargs, more)


def content_hash(
    messages: tuple[Message, ...], tools: tuple[Tool, ...], template_kwargs: Mapping[str, Any], more: Any = None
) -> int:
    """As `Example.content_hash`, of the parts of a row."""
    content = [[turn_content(one) for one in messages], list(tools), dict(template_kwargs), more]
    return int.from_bytes(hashlib.sha256(canonical_json(content).encode()).digest()[:8]) >> 1


def purpose_keys(purpose: Purpose) -> KeyCheck:
    """The check of the keys of rows that are read for a purpose."""
    return KeyCheck(prompt=purpose != "documents", loss=purpose != "prompts")


def iter_examples(
    source: str | RowSource, purpose: Purpose, *, limit: int | None = None, keys: KeyCheck | None = None
) -> Iterator[Example]:
    """Return the rows of a source in order, one after another, each checked and brought to one form.

    Rows of several sources without weights follow each other; with weights they alternate, as `MixturePart` says. The
    ids of several sources are `NUMBER_OF_SOURCE:ID`. keys (default: `purpose_keys`) rejects or counts other keys.
    Raises DataError that names the 1-based row, the key and the rule (a row of another format than the first of its
    file, an id that came before, no rows at all); StorageError.
    """
    source, keys = RowSource.of(source), keys or purpose_keys(purpose)
    if source.weights and source.side == "train":
        found = _mixed(source, purpose, keys)
    else:
        found = itertools.chain.from_iterable(_side(source, part, purpose, keys) for part in source.parts)
    number = 0
    for number, example in enumerate(itertools.islice(found, limit), start=1):
        require_new(example.id, number if len(source.parts) > 1 else example.number, keys.ids, str(source))
        yield example
    if not number:
        raise _nothing(source)


def _side(source: RowSource, part: MixturePart, purpose: Purpose, keys: KeyCheck) -> Iterator[Example]:
    """The rows of one file or folder that are on the source's side of the split."""
    prefix = f"{source.parts.index(part) + 1}:" if len(source.parts) > 1 else ""
    first: tuple[Format, str] | None = None
    for number, record, where in source.records(part):
        form = detect(record, purpose, where)
        if first is None:
            first = form, where
            keys.formats[part.path] = form.name
        elif form is not first[0]:
            raise DataError(
                where,
                f"it is in the format {form.name}, and {first[1]} in the format {first[0].name}",
                "the rows of a file have one format",
                "write them into two files, and name both in data.train",
            )
        fields = normalise(form, record, where, purpose, keys)
        example = Example(where, number, prefix + identity_of(record, where, str(number)), record, **fields)
        if source.share is None or not source.holds_out(example.content_hash()):
            keys.finish()
            yield example


def identity_of(record: Mapping[str, Any], where: str, default: str | None) -> str:
    """The id of a row. Raises DataError for one that is no text and no whole number."""
    value = record.get("id", default)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        found = "the field is missing" if "id" not in record else f"found {value!r}"
        raise DataError(f"{where}: id", found, "an id is a string or a whole number")
    return str(value)


def _mixed(source: RowSource, purpose: Purpose, keys: KeyCheck) -> Iterator[Example]:
    """Each source's share of the rows, evenly alternating; which rows of a source are taken, the seed decides."""
    there = [sum(1 for _ in _side(source, part, purpose, keys.fresh())) for part in source.parts]
    total = min(count / weight for count, weight in zip(there, source.weights, strict=True))
    taken = [int(total * weight + 1e-6) for weight in source.weights]
    for part, count, rows in zip(source.parts, taken, there, strict=True):
        if not count:
            raise DataError(
                f"data.train: {part.path}",
                f"its weight {part.weight:g} is less than one of the {int(total)} rows",
                "each source of a mixture gives a row or more",
                "raise its weight, or leave the source out",
            )
        keys.taken[part.path] = count, rows

    def draw(number: int) -> Iterator[tuple[float, int, Example]]:
        order = sorted(range(there[number]), key=lambda row: _rank(source.seed, number, row))
        wanted, place = set(order[: taken[number]]), 0
        for row, example in enumerate(_side(source, source.parts[number], purpose, keys)):
            if row in wanted:
                yield (place + 0.5) / taken[number], number, example
                place += 1

    for _, _, example in heapq.merge(*map(draw, range(len(source.parts))), key=lambda item: item[:2]):
        yield example


def _rank(seed: int, source: int, row: int) -> bytes:
    return hashlib.sha256(f"{seed} {source} {row}".encode()).digest()


def _nothing(source: RowSource) -> DataError:
    if source.share is None:
        return no_rows(str(source))
    side = "held out" if source.side == "eval" else "left to train on"
    return DataError(
        f"data.eval={source.share:g}",
        f"no row of {source} is {side}",
        "the rows are split by the hash of their content",
        "raise the share, name a file in data.eval, or add rows",
    )
