"""Conversations: rendered by `chat.render`, retrieved passages among them where `data.context` asks for them."""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any

from graftwork import chat, data, retrieval
from graftwork.chat import Passage, Prompt, Template
from graftwork.config import canonical_json
from graftwork.data import DatasetRow
from graftwork.row_keys import KeyCheck
from graftwork.training.objective_spec import SftSpec
from graftwork.training.rows.answered import answered, groups_of
from graftwork.training.rows.kept import RowWriter, kept_rows
from graftwork.training.rows.packed import pack_rows
from graftwork.training.rows.part import Part, ReadPart, noted, nothing_left, read_prompt, too_long
from graftwork.training.spec import TrainSpec

FORM = 2
"""Counted up when the same rows are rendered otherwise than before."""

Context = Callable[[DatasetRow], tuple[Passage, ...]]


def read(spec: TrainSpec, template: Template, part: Part) -> ReadPart:
    """The rows that fit, as ids and loss masks. Raises DataError, StorageError.

    All rows are read and checked each time; they are rendered once, until something changes that decides the outcome.
    """
    uri, limit = (spec.data.train, spec.data.train_rows) if part == "train" else (spec.data.eval, spec.data.eval_rows)
    assert isinstance(spec.objective, SftSpec)
    assert uri is not None, "asked for a part that the spec has"

    answers = spec.objective.answers if part == "eval" else None
    by = answers.by if answers is not None else ()

    def rows() -> Iterator[DatasetRow]:
        return data.iter_rows(uri, limit=limit, need="train", keys=data.key_check("train", by))

    keys, contents = data.key_check("train", by), array("q")
    checked = data.iter_rows(uri, limit=limit, need="train", keys=keys)
    fingerprint = data.fingerprint(noted(checked, contents))
    prompt, shots = read_prompt(spec, part)
    warnings = (*keys.note(f"data.{part}"), *shots)
    seed = spec.seed if part == "train" else spec.seed + 1

    def render(writer: RowWriter) -> dict[str, Any]:
        context = retrieval.training_context(spec.data.context, seed) if spec.data.context else _no_context
        return _render(spec, template, prompt, rows(), context, writer)

    passages = data.passage_keys()
    found, about = kept_rows(_key(spec, template, prompt, fingerprint, seed, passages), render)
    warnings += passages.note("data.context.corpus") if part == "train" else ()
    if about["too_long"] and spec.on_overlong == "refuse":
        raise too_long(spec, part, *about["too_long"][0])
    if not len(found):
        raise nothing_left(spec, part, about["dropped"])
    notes = _notes(about["left_out"], spec)
    if answers is not None:
        names = answers.by
        groups = groups_of(data.read_fields(uri, names, limit=limit), about["numbers"]) if names else ()
        return ReadPart(answered(found, groups), about["dropped"], fingerprint, notes, (), warnings, contents)
    packs, packing = pack_rows(found, spec.objective.packing, spec.max_length)
    return ReadPart(packs, about["dropped"], fingerprint, (*notes, *packing), (), warnings, contents)


def _render(
    spec: TrainSpec, template: Template, prompt: Prompt, rows: Iterable[DatasetRow], context: Context, writer: RowWriter
) -> dict[str, Any]:
    """Every row that fits to the writer, and what was left out: `too_long` names the first as (number, id, tokens).

    Where answers are generated, `numbers` says of which of the rows (from 1) each written one is.
    """
    room = spec.data.context.context_tokens if spec.data.context else None
    left_out, dropped = 0, 0
    first: list[tuple[int, str, int]] = []
    numbers: list[int] = []
    for number, row in enumerate(rows, start=1):
        passages, without = chat.fit_passages(context(row), template, prompt, room)
        left_out += len(without)
        for messages in chat.training_rows(row.messages, template):
            rendered = chat.render(messages, template, prompt=prompt, context=passages, generate=False)
            if len(rendered.ids) <= spec.max_length:
                writer.add(rendered.ids, rendered.loss_mask)
                numbers += [number] if _numbered(spec) else []
                continue
            dropped += 1
            first = first or [(number, row.id, len(rendered.ids))]
    return {"dropped": dropped, "left_out": left_out, "too_long": first, "numbers": numbers}


def _numbered(spec: TrainSpec) -> bool:
    return isinstance(spec.objective, SftSpec) and spec.objective.answers is not None


def _key(spec: TrainSpec, template: Template, prompt: Prompt, fingerprint: str, seed: int, keys: KeyCheck) -> str:
    """32 hex digits over everything that decides the rendered rows. keys: counts ignored keys of the corpus."""
    context = None
    if spec.data.context is not None:
        passages = [asdict(passage) for passage in data.read_passages(spec.data.context.corpus, keys)]
        chosen = spec.data.context.model_dump(mode="json", exclude={"corpus"})
        context = {**chosen, "seed": seed, "corpus": hashlib.sha256(canonical_json(passages).encode()).hexdigest()}
    decides = {
        "form": FORM, "rows": fingerprint, "template": template.digest, "tokenizer": template.tokenizer_digest,
        "date": str(template.date),
        "prompt": asdict(prompt), "max_length": spec.max_length, "context": context, "numbered": _numbered(spec),
    }  # fmt: skip
    return hashlib.sha256(canonical_json(decides).encode()).hexdigest()[:32]


def _no_context(_: DatasetRow) -> tuple[Passage, ...]:
    return ()


def _notes(left_out: int, spec: TrainSpec) -> tuple[str, ...]:
    if not left_out or spec.data.context is None:
        return ()
    room = spec.data.context.context_tokens
    return (f"{left_out} passages left out (no room in data.context.context_tokens={room})",)
