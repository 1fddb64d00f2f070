"""Datasets: rows of conversations and passages of a corpus, checked row by row."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from graftwork.config import Spec, canonical_json
from graftwork.datasets.examples import Example, content_hash, identity_of, iter_examples
from graftwork.datasets.formats import ROW_KEYS, Purpose
from graftwork.datasets.keys import DOCUMENT, KeyCheck, kind_of
from graftwork.datasets.readers import local_path, no_rows, read_records, require_new
from graftwork.datasets.sources import EvalSource, MixturePart, RowShape, RowSource, TrainSources
from graftwork.datasets.turns import require_text
from graftwork.errors import BaseModelError, DataError
from graftwork.prompts.render import (
    Message,
    Passage,
    Prompt,
    PromptSpec,
    Rendered,
    Thinking,
    Tool,
    render,
    training_rows,
)
from graftwork.prompts.template import Template
from graftwork.spec_errors import did_you_mean
from graftwork.storage.store import read_uri

Need = Literal["train", "eval", "prompt"]
"""Use of a row: to learn its answer, to score answers, or to be answered."""

_ROW_KEYS = frozenset({"doc_id", "gold", "given_fields"})
"""Keys of a conversation in every format, besides `id`."""


class ContextSpec(Spec):
    """Retrieved passages in the training rows, distractors among them (RAFT, arXiv 2403.10131)."""

    corpus: str
    """JSONL of passages (`id`, `text`): a path, `file://`, `s3://` or `recipe://NAME/corpus.jsonl`."""
    k: int = Field(default=3, ge=1, le=32)
    """Passages a row."""
    context_tokens: int | None = Field(default=None, ge=8)
    """Room for the passages in tokens, as the served retriever has it."""
    gold_rate: float = Field(default=1.0, ge=0, le=1)
    """Share of the rows with context whose gold passage is among the k."""
    plain_rate: float = Field(default=0.0, ge=0, le=1)
    """Share of the rows that get no context at all."""


class DataSpec(Spec):
    """Rows to learn from, and held-out rows."""

    train: TrainSources
    """Rows: a file or folder (`graftwork.datasets.readers`: JSONL, JSON, CSV, Parquet), local or `s3://`, `recipe://`
    or `hf://`; or several of them, each `{path: ..., weight: ...}`."""
    eval: EvalSource | None = None
    """Held-out rows of the same form, other ones than `train`; or a share of `train`, e.g. 0.1: the rows are split by
    the sha256 of their content without ids, so that equal rows are on one side, the same ones on every machine."""
    train_rows: int | None = Field(default=None, ge=1)
    """Take the first so many rows; null takes all."""
    eval_rows: int | None = Field(default=None, ge=1)
    columns: dict[str, str] = {}
    """Key of a row -> the file's column, e.g. `{prompt: question, completion: answer}`."""
    template: dict[str, str] = {}
    """Key of a row -> Jinja text over the file's columns, e.g. `{prompt: "Translate: {{ english }}"}`. `messages`,
    `tools` and other structured keys take JSON: `{{ column | tojson }}`."""
    thinking: Thinking = "keep"
    """Reasoning of the assistant's turns: learned (keep), in the text without loss (mask), or taken out (drop)."""
    context: ContextSpec | None = None

    @field_validator("train")
    @classmethod
    def _check_sources(cls, train: str | tuple[MixturePart, ...]) -> str | tuple[MixturePart, ...]:
        if isinstance(train, str):
            return train
        if not train:
            raise ValueError("it is an empty list; name one source or more")
        paths = [part.path for part in train]
        if len(set(paths)) < len(paths):
            raise ValueError(f"{max(paths, key=paths.count)} is named twice; give it one weight")
        if 0 < sum(part.weight is not None for part in train) < len(train):
            raise ValueError("some sources have a weight and some have none; give all of them a weight, or none")
        return train

    @field_validator("eval")
    @classmethod
    def _check_eval_is_not_train(cls, held_out: float | str | None, info: ValidationInfo) -> float | str | None:
        train = info.data.get("train", ())
        paths = [train] if isinstance(train, str) else [part.path for part in train]
        if isinstance(held_out, str) and any(is_same_place(held_out, path) for path in paths):
            raise ValueError("it is data.train; held-out rows are not trained on, so name other rows or leave it out")
        return held_out

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        if twice := sorted(self.columns.keys() & self.template.keys()):
            raise ValueError(f"{twice[0]} is in columns and in template; give it once")
        known = {"id", *_ROW_KEYS, *ROW_KEYS}
        for name, keys in (("columns", self.columns), ("template", self.template)):
            if unknown := sorted(keys.keys() - known):
                hint = did_you_mean(unknown[0], sorted(known))
                raise ValueError(
                    f"{name}.{unknown[0]} is no key of a row in any format" + (f"; {hint}" if hint else "")
                )
        if self.columns or self.template:
            RowShape(self.columns, self.template)
        return self

    def source(self, part: Literal["train", "eval"], seed: int) -> RowSource:
        """The rows of one dataset. seed: draws the training rows of a weighted mixture; held-out rows have one draw."""
        held_out = self.eval if part == "eval" else None
        if isinstance(held_out, str):
            return RowSource((MixturePart(path=held_out),), self.columns, self.template)
        parts = (MixturePart(path=self.train),) if isinstance(self.train, str) else self.train
        share = self.eval if isinstance(self.eval, float) else None
        return RowSource(parts, self.columns, self.template, share, part, seed if part == "train" else 0)


def is_same_place(a: str, b: str) -> bool:
    """True where two URIs of data name one file or folder, or one object."""
    if "://" in a.removeprefix("file://") or "://" in b.removeprefix("file://"):
        return a.rstrip("/") == b.rstrip("/")
    return len({os.path.realpath(os.path.expanduser(uri.removeprefix("file://"))) for uri in (a, b)}) == 1


@dataclass(frozen=True, slots=True)
class DatasetRow:
    """One conversation. `doc_id` is its gold passage, `gold` the right answer as an object.

    `given_fields` names the fields of `gold` that the question states.
    """

    id: str
    messages: tuple[Message, ...]
    doc_id: str | None = None
    gold: Mapping[str, Any] | None = None
    given_fields: tuple[str, ...] = ()
    tools: tuple[Tool, ...] = ()
    """Functions that the assistant may call."""
    template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Variables of the chat template, over those of the spec."""
    where: str = dataclasses.field(default="", compare=False)
    """The row in its file, for errors: `rows.jsonl row 2`. Of a row without a file `row ID`."""

    def __post_init__(self) -> None:
        if not self.where:
            object.__setattr__(self, "where", f"row {self.id}")

    @property
    def question(self) -> tuple[Message, ...]:
        """The conversation up to the last user turn."""
        return self.messages[:-1] if self.messages[-1].role == "assistant" else self.messages

    @property
    def answer(self) -> str | None:
        """The last assistant turn, where the row has one."""
        return self.messages[-1].content if self.messages[-1].role == "assistant" else None

    def content_hash(self) -> int:
        """As `Example.content_hash`."""
        return content_hash(self.messages, self.tools, self.template_kwargs)


def key_check(need: Need, also: Iterable[str] = ()) -> KeyCheck:
    """The check of the keys of conversations that are read for `need`. also: fields that the caller reads itself."""
    return KeyCheck(_ROW_KEYS.union(also), loss=need == "train")


def read_rows(
    source: str | RowSource, *, limit: int | None = None, need: Need, keys: KeyCheck | None = None
) -> list[DatasetRow]:
    """As `iter_rows`, all at once."""
    return list(iter_rows(source, limit=limit, need=need, keys=keys))


def iter_rows(
    source: str | RowSource, *, limit: int | None = None, need: Need, keys: KeyCheck | None = None
) -> Iterator[DatasetRow]:
    """Return the conversations of a source in order, one after another, in any format of `graftwork.datasets.formats`.

    `id` (else the row number), `doc_id`, `gold` and `given_fields` are read where present; `keys` (default:
    `key_check(need)`) rejects or counts every other key. `need="train"` wants a last assistant turn, `"eval"` a `gold`
    object; with `"prompt"` and `"eval"` a row needs no answer. Raises DataError that names the 1-based row, the field
    and the rule; StorageError.
    """
    purpose: Purpose = "conversations" if need == "train" else "prompts"
    for example in iter_examples(source, purpose, limit=limit, keys=keys or key_check(need)):
        yield _row(example, need)


def read_fields(
    source: str | RowSource, names: Sequence[str], *, limit: int | None = None
) -> dict[str, tuple[str, ...]]:
    """Name -> the value in each row, as text, of a field of the row or else of its gold; the rows of `read_rows`.

    Raises DataError for a row that lacks one: a part of the questions can't be formed without it.
    """
    values: dict[str, list[str]] = {name: [] for name in names}
    for example in iter_examples(source, "prompts", limit=limit, keys=key_check("prompt", names)):
        record = example.record
        gold: Mapping[str, Any] = record["gold"] if isinstance(record.get("gold"), dict) else {}
        for name in names:
            if name not in record and name not in gold:
                known = ", ".join(sorted({*record, *gold} - {"messages", "gold"}))
                raise DataError(
                    f"{example.where}: {name}",
                    "the field is missing",
                    "every row has the fields that part or cluster the questions",
                    f"fields of this row: {known}",
                )
            values[name].append(_as_text(record.get(name, gold.get(name))))
    return {name: tuple(found) for name, found in values.items()}


def read_passages(uri: str, keys: KeyCheck | None = None) -> list[Passage]:
    """Passages of a JSONL, `{"id": "...", "text": "..."}` a line, in order. Raises DataError, StorageError.

    keys: counts the keys that are not read (default: `passage_keys()`).
    """
    passages = []
    seen: dict[str, int] = {}
    keys = keys or passage_keys()
    for number, record in read_records(uri):
        where = f"{uri} row {number}"
        keys.check(record, where)
        text = require_text(record.get("text"), f"{where}: text", "text", "text" in record)
        passage = Passage(identity_of(record, where, None), text)
        require_new(passage.id, number, seen, uri)
        passages.append(passage)
    if not passages:
        raise no_rows(uri)
    return passages


def passage_keys(known: Iterable[str] = DOCUMENT) -> KeyCheck:
    """The count of the keys of passages: none is learned from, so none is rejected."""
    return KeyCheck(known, prompt=False, loss=False)


def fingerprint(rows: Iterable[DatasetRow]) -> str:
    """sha256 hex over the canonical rows, in order: equal rows, equal fingerprint, however they were written."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(canonical_json(_identifying(row)).encode() + b"\n")
    return digest.hexdigest()


def _identifying(row: DatasetRow) -> dict[str, Any]:
    """Fields of a row that decide its fingerprint. The order of keys in functions and arguments decides the text."""
    found: dict[str, Any] = {
        "id": row.id,
        "messages": [_identifying_turn(message) for message in row.messages],
        "doc_id": row.doc_id,
        "gold": row.gold,
        "given_fields": row.given_fields,
    }
    if row.tools:
        found["tools"] = [json.dumps(tool) for tool in row.tools]
    if row.template_kwargs:
        found["template_kwargs"] = json.dumps(dict(row.template_kwargs))
    return found


def _identifying_turn(message: Message) -> dict[str, Any]:
    found = {
        name: getattr(message, name)
        for name, default in _TURN_DEFAULTS.items()
        if default is dataclasses.MISSING or getattr(message, name) != default
    }
    if message.tool_calls:
        found["tool_calls"] = [[call.name, json.dumps(call.arguments), call.id] for call in message.tool_calls]
    return found


_TURN_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Message)}


def render_row(
    row: DatasetRow, template: Template, prompt: Prompt, passages: Sequence[Passage], thinking: Thinking
) -> list[Rendered]:
    """Return the training rows of a conversation: one, or one a learned turn.

    Raises DataError and BaseModelError that name the row.
    """
    as_row = partial(render, prompt=prompt, tools=row.tools, template_kwargs=row.template_kwargs)
    as_row = partial(as_row, context=passages, thinking=thinking, generate=False)
    with naming(row):
        parts = training_rows(
            row.messages, template, prompt=prompt, tools=row.tools, template_kwargs=row.template_kwargs
        )
        return [as_row(messages, template) for messages in parts]


def render_question(
    row: DatasetRow, template: Template, prompt: Prompt, passages: Sequence[Passage], thinking: Thinking
) -> Rendered:
    """Return the prompt that asks for the last answer of a row. Raises as `render_row` does."""
    with naming(row):
        return render(
            row.question,
            template,
            prompt=prompt,
            context=passages,
            tools=row.tools,
            template_kwargs=row.template_kwargs,
            thinking=thinking,
            generate=True,
        )


@contextlib.contextmanager
def naming(row: DatasetRow | Example) -> Iterator[None]:
    """Name the row and its file in the errors of the block."""
    try:
        yield
    except (DataError, BaseModelError) as error:
        raise type(error)(f"{row.where}: {error.subject}", error.problem, error.rule, error.hint) from error


def prompt_content(prompt: Prompt) -> dict[str, Any]:
    """Return all that a prompt puts into the text, for a digest: older prompts keep theirs."""
    content: dict[str, Any] = {
        "system": prompt.system,
        "shots": [[_identifying_turn(message) for message in shot] for shot in prompt.shots],
        "context_header": prompt.context_header,
        "citations": prompt.citations,
    }
    if prompt.tools:
        content["tools"] = [json.dumps(tool) for tool in prompt.tools]
    if prompt.template_kwargs:
        content["chat_template_kwargs"] = dict(prompt.template_kwargs)
    return content


def resolve_prompt(spec: PromptSpec, keys: KeyCheck | None = None) -> Prompt:
    """Read the worked examples of a prompt. keys: as in `iter_rows`.

    Raises DataError where there are too few, StorageError.
    """
    tools = tuple(json.loads(text) for text in spec.tools)
    bare = Prompt(spec.system, (), spec.context_header, spec.citations, tools, spec.chat_template_kwargs)
    if not spec.shots or spec.few_shot_file is None:
        return bare
    rows = read_rows(spec.few_shot_file, limit=spec.shots, need="train", keys=keys)
    if len(rows) < spec.shots:
        raise DataError(
            f"prompt.shots={spec.shots}",
            f"{spec.few_shot_file} has {len(rows)} rows",
            "a shot is a row",
            "ask for fewer shots",
        )
    for row in rows:
        if [m.role for m in row.messages] != ["user", "assistant"]:
            raise DataError(
                f"prompt.few_shot_file={spec.few_shot_file}",
                f"row {row.id} is not one of each",
                "a shot is a user turn and an assistant turn",
                "take other rows",
            )
    shots = tuple((row.messages[0], row.messages[1]) for row in rows)
    return dataclasses.replace(bare, shots=shots)


def read_text(uri: str) -> str:
    """Text behind a path, `file://`, `s3://` or `recipe://NAME/FILE`. Raises DataError, StorageError."""
    content = local_path(uri).read_bytes() if uri.startswith("recipe://") else read_uri(uri)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{uri} row {row}", f"it is not UTF-8 ({error.reason})", "data files are UTF-8") from error


def _row(example: Example, need: Need) -> DatasetRow:
    record, where = example.record, example.where
    gold = record.get("gold")
    if gold is not None and not isinstance(gold, dict):
        raise DataError(f"{where}: gold", f"found {kind_of(gold)}", "gold is the right answer as a JSON object")
    given_fields = record.get("given_fields") or []
    given_fields = [given_fields] if isinstance(given_fields, str) else given_fields
    if not isinstance(given_fields, list) or not all(isinstance(field, str) for field in given_fields):
        raise DataError(
            f"{where}: given_fields",
            f"found {kind_of(given_fields)}",
            "given_fields lists the fields of gold that the question states",
        )
    if unknown := [field for field in given_fields if field not in (gold or {})]:
        raise DataError(f"{where}: given_fields", f"gold has no {unknown[0]!r}", "given_fields names fields of gold")
    doc_id = record.get("doc_id")
    if doc_id is not None and not isinstance(doc_id, str | int):
        raise DataError(f"{where}: doc_id", f"found {kind_of(doc_id)}", "doc_id is the id of a passage")
    if need == "eval" and gold is None:
        raise DataError(
            f"{where}: gold",
            "the field is missing",
            "a row to be scored carries the right answer",
            "add `gold`, the answer as a JSON object",
        )
    return DatasetRow(
        id=example.id,
        messages=example.messages,
        doc_id=None if doc_id is None else str(doc_id),
        gold=gold,
        given_fields=tuple(given_fields),
        tools=example.tools,
        template_kwargs=example.template_kwargs,
        where=example.where,
    )


def _as_text(value: object) -> str:
    if isinstance(value, list):
        return "+".join(_as_text(item) for item in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
