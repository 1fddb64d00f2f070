"""Datasets: rows of conversations and passages of a corpus, checked row by row."""

import dataclasses
import difflib
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from graftwork.config import Spec, canonical_json
from graftwork.datasets.readers import (
    CONVERSATION,
    DOCUMENT,
    SHAREGPT,
    KeyCheck,
    kind_of,
    local_path,
    no_rows,
    other_format,
    read_records,
    reject_lone_surrogates,
    require_new,
)
from graftwork.errors import DataError
from graftwork.prompts.render import Message, Passage, Prompt, PromptSpec, Tool
from graftwork.storage.store import read_uri

Need = Literal["train", "eval", "prompt"]
"""Use of a row: to learn its answer, to score answers, or to be answered."""


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

    train: str
    """Rows: a file or folder (`graftwork.datasets.readers`: JSONL, CSV, Parquet), local or `s3://`, `recipe://` or `hf://`."""
    eval: str | None = None
    """Held-out rows of the same form; other ones than `train`."""
    train_rows: int | None = Field(default=None, ge=1)
    """Take the first so many rows; null takes all."""
    eval_rows: int | None = Field(default=None, ge=1)
    context: ContextSpec | None = None

    @field_validator("eval")
    @classmethod
    def _check_eval_is_not_train(cls, uri: str | None, info: ValidationInfo) -> str | None:
        if uri is not None and "train" in info.data and is_same_place(uri, info.data["train"]):
            raise ValueError("it is data.train; held-out rows are not trained on, so name other rows or leave it out")
        return uri


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

    @property
    def question(self) -> tuple[Message, ...]:
        """The conversation up to the last user turn."""
        return self.messages[:-1] if self.messages[-1].role == "assistant" else self.messages

    @property
    def answer(self) -> str | None:
        """The last assistant turn, where the row has one."""
        return self.messages[-1].content if self.messages[-1].role == "assistant" else None


def key_check(need: Need, also: Iterable[str] = ()) -> KeyCheck:
    """The check of the keys of conversations that are read for `need`. also: fields that the caller reads itself."""
    return KeyCheck(CONVERSATION.union(also), loss=need == "train")


def read_rows(uri: str, *, limit: int | None = None, need: Need, keys: KeyCheck | None = None) -> list[DatasetRow]:
    """As `iter_rows`, all at once."""
    return list(iter_rows(uri, limit=limit, need=need, keys=keys))


def iter_rows(uri: str, *, limit: int | None = None, need: Need, keys: KeyCheck | None = None) -> Iterator[DatasetRow]:
    """Rows in order, one after another: `{"messages": [...]}` or `{"prompt": "...", "completion": "..."}` a record.

    The dataset is all that `graftwork.datasets.readers` reads. `id` (else the row number), `doc_id`, `gold` and
    `given_fields`
    are read where present; `keys` (default: `key_check(need)`) rejects or counts every other key. `need="train"` wants
    a last assistant turn, `"eval"` a `gold` object; with `"prompt"` and `"eval"` a record needs no `completion`.
    Raises DataError that names the 1-based row, the field and the rule; StorageError.
    """
    seen: dict[str, int] = {}
    keys = keys or key_check(need)
    for number, record in itertools.islice(read_records(uri), limit):
        keys.check(record, f"{uri} row {number}")
        row = _row(record, f"{uri} row {number}", str(number), need)
        require_new(row.id, number, seen, uri)
        yield row
    if not seen:
        raise no_rows(uri)


def read_fields(uri: str, names: Sequence[str], *, limit: int | None = None) -> dict[str, tuple[str, ...]]:
    """Name -> the value in each row, as text, of a field of the row or else of its gold; the rows of `read_rows`.

    Raises DataError for a row that lacks one: a part of the questions can't be formed without it.
    """
    values: dict[str, list[str]] = {name: [] for name in names}
    for number, record in itertools.islice(read_records(uri), limit):
        gold: dict[str, Any] = record["gold"] if isinstance(record.get("gold"), dict) else {}
        for name in names:
            if name not in record and name not in gold:
                known = ", ".join(sorted({*record, *gold} - {"messages", "gold"}))
                raise DataError(
                    f"{uri} row {number}: {name}",
                    "the field is missing",
                    "every row has the fields that part or cluster the questions",
                    f"fields of this row: {known}",
                )
            values[name].append(_as_text(record.get(name, gold.get(name))))
    return {name: tuple(found) for name, found in values.items()}


def prompt_of(record: dict[str, Any], where: str) -> tuple[Message, ...]:
    """The conversation that a record's answers answer: `messages`, or `prompt` (turns, or the user's one).

    Raises DataError that names the row (`where`), the field and the rule.
    """
    field = "prompt" if "prompt" in record and "messages" not in record else "messages"
    if field == "prompt" and not isinstance(record["prompt"], list):
        return (Message("user", _string(record, "prompt", where)),)
    if field not in record:
        raise DataError(
            f"{where}: messages",
            f"the field is missing (found {', '.join(record) or 'no fields'})",
            "a row has `messages` or `prompt`, and its answers in other fields",
            "add the field",
        )
    messages = _messages({"messages": record[field]}, where, "prompt")
    if messages[-1].role != "user":
        raise DataError(
            f"{where}: {field}",
            f"the last turn is the {messages[-1].role}'s",
            "the answers stand in fields of their own, behind the user's last turn",
            f"take the last turn out of {field}",
        )
    return messages


def answer_of(record: dict[str, Any], field: str, where: str) -> str:
    """An answer of a record: text, the assistant's turn, or a list of that one turn. Raises DataError."""
    value = record.get(field)
    turns = value if isinstance(value, list) else [value]
    if not isinstance(value, dict | list):
        return _string(record, field, where)
    if len(turns) != 1:
        raise DataError(
            f"{where}: {field}",
            f"found {len(turns)} turns",
            f"{field} is one answer: text, or one turn of the assistant",
            "keep what comes before it in `messages`",
        )
    turn = _message(turns[0], f"{where}: {field}")
    if turn.role != "assistant":
        raise DataError(f"{where}: {field}.role", f"found {turn.role!r}", "an answer is the assistant's turn")
    return turn.content


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
        passage = Passage(_identity(record, where, None), _string(record, "text", where))
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


def resolve_prompt(spec: PromptSpec, keys: KeyCheck | None = None) -> Prompt:
    """Read the worked examples of a prompt. keys: as in `iter_rows`.

    Raises DataError where there are too few, StorageError.
    """
    if not spec.shots or spec.few_shot_file is None:
        return Prompt(spec.system, (), spec.context_header, spec.citations)
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
    return Prompt(spec.system, shots, spec.context_header, spec.citations)


def read_text(uri: str) -> str:
    """Text behind a path, `file://`, `s3://` or `recipe://NAME/FILE`. Raises DataError, StorageError."""
    content = local_path(uri).read_bytes() if uri.startswith("recipe://") else read_uri(uri)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{uri} row {row}", f"it is not UTF-8 ({error.reason})", "data files are UTF-8") from error


def _row(record: dict[str, Any], where: str, default_id: str, need: Need) -> DatasetRow:
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
    row = DatasetRow(
        id=_identity(record, where, default_id),
        messages=_messages(record, where, need),
        doc_id=None if doc_id is None else str(doc_id),
        gold=gold,
        given_fields=tuple(given_fields),
    )
    if need == "train" and row.messages[-1].role != "assistant":
        raise DataError(
            f"{where}: messages",
            "the last turn is the user's",
            "a row to learn from ends with the assistant's turn",
            "add the answer as the last turn",
        )
    if need == "eval" and row.gold is None:
        raise DataError(
            f"{where}: gold",
            "the field is missing",
            "a row to be scored carries the right answer",
            "add `gold`, the answer as a JSON object",
        )
    return row


def _messages(record: dict[str, Any], where: str, need: Need) -> tuple[Message, ...]:
    if "messages" not in record:
        if "prompt" not in record and "completion" not in record:
            if (error := other_format(record, where)) is not None:
                raise error
            near = difflib.get_close_matches("messages", list(record), n=1, cutoff=0.6)
            raise DataError(
                f"{where}: messages",
                f"the field is missing (found {', '.join(record) or 'no fields'})",
                "a row has `messages`, or `prompt` and `completion`",
                f"rename {near[0]!r} to 'messages'" if near else "add the field",
            )
        if isinstance(record.get("prompt"), list):
            raise DataError(
                f"{where}: prompt",
                "found a list (TRL's conversational form)",
                "prompt and completion are text",
                "write the turns of both as one list, `messages`",
            )
        asked = Message("user", _string(record, "prompt", where))
        if need != "train" and "completion" not in record:
            return (asked,)
        return asked, Message("assistant", _string(record, "completion", where))
    turns = record["messages"]
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else kind_of(turns)
        raise DataError(f"{where}: messages", f"found {found}", "messages is a list of turns with role and content")
    messages = tuple(_message(turn, f"{where}: messages[{index}]") for index, turn in enumerate(turns))
    if not any(message.role == "user" for message in messages):
        raise DataError(f"{where}: messages", "it has no user turn", "a conversation has at least one user turn")
    for index, message in enumerate(messages):
        if message.role == "system" and index:
            raise DataError(f"{where}: messages[{index}].role", "found 'system'", "a system turn comes first, once")
    return messages


_TOOL_TURN = "leave rows with tool turns out: calls of tools and their results are not supported"
_ROLES = {
    "developer": "rename the role to 'system': it is OpenAI's newer name of the first turn",
    "tool": _TOOL_TURN,
    "function": _TOOL_TURN,
    "ipython": _TOOL_TURN,
    "human": "rename the role to 'user'",
    "gpt": "rename the role to 'assistant'",
    "model": "rename the role to 'assistant'",
    "bot": "rename the role to 'assistant'",
}


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise DataError(where, f"found {kind_of(turn)}", "a turn is an object with role and content")
    role = turn.get("role")
    if role not in ("system", "user", "assistant"):
        found = "the field is missing" if "role" not in turn else f"found {role!r}"
        move = SHAREGPT if "from" in turn else _ROLES.get(role, "") if isinstance(role, str) else ""
        raise DataError(f"{where}.role", found, "role is one of system, user, assistant", move)
    if isinstance(turn.get("content"), list):
        raise DataError(
            f"{where}.content",
            "found a list (OpenAI's content parts)",
            "content is one string; images and audio are not supported",
            "join the text parts to one string",
        )
    return Message(role, _string(turn, "content", where + ".", may_be_empty=role == "system"))


def _identity(record: dict[str, Any], where: str, default: str | None) -> str:
    value = record.get("id", default)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        found = "the field is missing" if "id" not in record else f"found {value!r}"
        raise DataError(f"{where}: id", found, "an id is a string or a whole number")
    return str(value)


def _string(record: dict[str, Any], field: str, where: str, may_be_empty: bool = False) -> str:
    value = record.get(field)
    at = where + field if where.endswith(".") else f"{where}: {field}"
    if not isinstance(value, str):
        found = "the field is missing" if field not in record else f"found {kind_of(value)}"
        raise DataError(at, found, f"{field} is a string")
    if not value.strip() and not may_be_empty:
        raise DataError(at, "it is empty", f"{field} holds text")
    reject_lone_surrogates(value, at)
    return value


def _as_text(value: object) -> str:
    if isinstance(value, list):
        return "+".join(_as_text(item) for item in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
