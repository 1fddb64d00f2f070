"""Formats of rows: one table of names and keys, detection, and the normalisation of each row to an `Example`.

Sources of the formats: OpenAI's fine-tuning guide (messages; input, preferred_output, non_preferred_output), TRL 1.16
(docs/source/dataset_formats.md: prompt, completion, chosen, rejected, label), ShareGPT and Alpaca as LLaMA-Factory's
`dataset_info.json` describes them (instruction and input are joined by a line break, in ms-swift too), ms-swift's guide
to custom datasets (rejected_response, rejected_messages).
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from graftwork.datasets.keys import KeyCheck, is_empty, is_number, kind_of
from graftwork.datasets.turns import TurnReader, check_turns, read_tools, require_text, turn_content
from graftwork.errors import DataError
from graftwork.prompts.render import Message, Tool

Purpose = Literal["conversations", "prompts", "pairs", "unpaired", "documents"]
"""Use of the rows: answers that are learned, questions, pairs of answers, answers with a label, or plain text."""


@dataclass(frozen=True)
class _FormatRow:
    """A row on its way to an example."""

    record: Mapping[str, Any]
    where: str
    keys: KeyCheck
    purpose: Purpose

    @property
    def reader(self) -> TurnReader:
        return TurnReader(self.where, self.keys)

    @property
    def context_reader(self) -> TurnReader:
        """Of turns that no loss falls on."""
        return TurnReader(self.where, self.keys, learned=False)

    def has(self, key: str) -> bool:
        return self.record.get(key) is not None

    def text(self, key: str, *, may_be_empty: bool = False) -> str:
        at = f"{self.where}: {key}"
        others = ", ".join(name for name in self.record if name != "id")
        hint = f"add it, or name its column in data.columns (columns: {others})"
        if key in (named := _other_names(self.record, (key, "input", "system"))):
            hint = _set_columns(named)
        value, given = self.record.get(key), key in self.record
        return require_text(value, at, key, given, may_be_empty=may_be_empty, hint=hint)


Parse = Callable[[_FormatRow], dict[str, Any]]
"""Returns the fields of an `Example` that hold the row's content."""


@dataclass(frozen=True)
class Format:
    """One row format. A row is in the format where it has one key of each group of `detect`."""

    name: str
    detect: tuple[tuple[str, ...], ...]
    keys: tuple[str, ...]
    """All keys that the format reads, besides `id`."""
    purposes: tuple[Purpose, ...]
    parse: Parse

    def matches(self, record: Mapping[str, Any]) -> bool:
        """Return whether a row has the keys of this format; null is as good as no key."""
        return all(any(record.get(key) is not None for key in group) for group in self.detect)


def _openai(row: _FormatRow) -> dict[str, Any]:
    messages = row.reader.turns(row.record["messages"], "messages")
    return _conversation(row, messages, "messages")


def _sharegpt(row: _FormatRow) -> dict[str, Any]:
    messages = row.reader.turns(row.record["conversations"], "conversations", sharegpt=True)
    return _conversation(row, messages, "conversations")


def _alpaca(row: _FormatRow) -> dict[str, Any]:
    turns = _alpaca_prompt(row)
    if row.has("output") or row.purpose != "prompts":
        turns = (*turns, Message("assistant", row.text("output")))
    return _conversation(row, turns, "instruction")


def _trl(row: _FormatRow) -> dict[str, Any]:
    turns = _prompt(row)
    if row.has("completion") or row.purpose != "prompts":
        turns = (*_unlearned(turns), *_completion(row, "completion"))
    return _conversation(row, turns, "prompt")


def _trl_pair(row: _FormatRow) -> dict[str, Any]:
    conversations = [row.record.get(key) for key in ("chosen", "rejected")]
    turns: tuple[Message, ...]
    if all(isinstance(one, list) and len(one) > 1 for one in conversations) and not isinstance(
        row.record.get("prompt", ""), list
    ):  # whole conversations; TRL then takes their common turns and no text of `prompt`
        row.keys.ignore(*(key for key in ("prompt", "messages") if row.has(key)))
        return _pair(row, *_common_turns(row, "chosen", "rejected"))
    if row.has("messages"):
        turns = row.context_reader.turns(row.record["messages"], "messages")
        row.keys.ignore(*(["prompt"] if row.has("prompt") else []))
    else:
        turns = _prompt(row)
    return _pair(row, turns, _answer(row, "chosen"), _answer(row, "rejected"))


def _sharegpt_pair(row: _FormatRow) -> dict[str, Any]:
    turns = row.context_reader.turns(row.record["conversations"], "conversations", sharegpt=True)
    answers = (_answer(row, key, sharegpt=True) for key in ("chosen", "rejected"))
    return _pair(row, turns, *answers, label="conversations")


def _alpaca_pair(row: _FormatRow) -> dict[str, Any]:
    answers = (_answer(row, key) for key in ("chosen", "rejected"))
    return _pair(row, _alpaca_prompt(row), *answers, label="instruction")


def _swift_pair(row: _FormatRow) -> dict[str, Any]:
    if row.has("rejected_messages"):
        if row.has("rejected_response"):
            at, rule = f"{row.where}: rejected_response", "a row has one rejected answer"
            raise DataError(at, "found next to rejected_messages", rule, "keep one of them")
        return _pair(row, *_common_turns(row, "messages", "rejected_messages"))
    turns = row.reader.turns(row.record["messages"], "messages")
    return _pair(row, turns[:-1], _require_answer(row, "messages", turns), _answer(row, "rejected_response"))


def _openai_pair(row: _FormatRow) -> dict[str, Any]:
    given = row.record["input"]
    if not isinstance(given, dict):
        raise DataError(f"{row.where}: input", f"found {kind_of(given)}", "input is an object with messages")
    row.keys.ignore(*(f"input.{key}" for key in given.keys() - {"messages", "tools", "parallel_tool_calls"}))
    inner = replace(row, record={**row.record, **given})
    turns = row.context_reader.turns(given.get("messages"), "input.messages")
    answers = (_answer(row, key) for key in ("preferred_output", "non_preferred_output"))
    return _pair(inner, turns, *answers, label="input.messages")


def _text(row: _FormatRow) -> dict[str, Any]:
    return {"text": row.text("text")}


_CHAT = ("tools", "functions", "parallel_tool_calls", "chat_template_kwargs", "system")
_CONVERSATION: tuple[Purpose, ...] = ("conversations", "prompts", "unpaired")
LABELS = ("label", "kto_tag")
"""TRL's and LLaMA-Factory's name of the verdict on an answer."""

FORMATS = (
    Format(
        "openai_preference",
        (("preferred_output",), ("non_preferred_output",), ("input",)),
        _CHAT,
        ("pairs",),
        _openai_pair,
    ),
    Format("sharegpt_preference", (("conversations",), ("chosen",), ("rejected",)), _CHAT, ("pairs",), _sharegpt_pair),
    Format(
        "alpaca_preference",
        (("instruction",), ("chosen",), ("rejected",)),
        ("input", "history", *_CHAT),
        ("pairs",),
        _alpaca_pair,
    ),
    Format(
        "swift_preference", (("messages",), ("rejected_response", "rejected_messages")), _CHAT, ("pairs",), _swift_pair
    ),
    Format("trl_preference", (("chosen", "rejected"),), ("prompt", "messages", *_CHAT), ("pairs",), _trl_pair),
    Format("openai", (("messages",),), _CHAT, _CONVERSATION, _openai),
    Format("sharegpt", (("conversations",),), _CHAT, _CONVERSATION, _sharegpt),
    Format("alpaca", (("instruction",),), ("input", "output", "history", *_CHAT), _CONVERSATION, _alpaca),
    Format("trl", (("prompt", "completion"),), _CHAT, _CONVERSATION, _trl),
    Format("text", (("text",),), (), ("documents",), _text),
)
"""In the order of detection: a row is in the first format that serves the purpose and whose keys it has."""

ROW_KEYS = frozenset({*LABELS, *(key for one in FORMATS for key in (*one.keys, *(k for ks in one.detect for k in ks)))})
"""Keys that some format reads, besides `id`."""
_OBJECTIVES: dict[Purpose, str] = {
    "conversations": "sft",
    "pairs": "dpo, orpo, cpo or reward",
    "unpaired": "kto",
    "documents": "cpt",
    "prompts": "grpo",
}
_SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("question", "query", "problem", "input", "user"),
    "completion": ("answer", "response", "solution", "output", "assistant"),
    "instruction": ("query", "question"),
    "output": ("response", "answer"),
    "input": ("context",),
    "system": ("system_prompt",),
    "chosen": ("accepted",),
}
"""Names that columns of datasets often have instead, for a hint."""
_ALONE = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"))
"""Keys that make a row to learn from."""


def detect(record: Mapping[str, Any], purpose: Purpose, where: str) -> Format:
    """The format of a row. Raises DataError where none of the purpose's has its keys."""
    for one in FORMATS:
        if purpose in one.purposes and one.matches(record):
            return one
    raise _unknown(record, purpose, where)


def normalise(form: Format, record: Mapping[str, Any], where: str, purpose: Purpose, keys: KeyCheck) -> dict[str, Any]:
    """Check the keys of a row and return the fields of its `Example` that hold its content.

    Raises DataError that names the row and the key.
    """
    known = {"id", *form.keys, *(key for group in form.detect for key in group)}
    known |= set(LABELS) if purpose == "unpaired" else set()
    keys.begin(record, where, frozenset(known))
    row = _FormatRow(record, where, keys, purpose)
    if form.name == "trl" and not row.has("completion") and purpose != "prompts" and row.has("chosen"):
        raise _unknown(record, purpose, where)
    fields = form.parse(row)
    return {**fields, "label": _label(row)} if purpose == "unpaired" else fields


def _conversation(row: _FormatRow, messages: tuple[Message, ...], label: str) -> dict[str, Any]:
    check_turns(messages, row.where, label)
    if row.purpose == "conversations":
        messages = _without_opening(row, messages)
    messages, tools = _with_system(row, messages), _tools(row)
    last = messages[-1].role
    if row.purpose in ("conversations", "unpaired") and last != "assistant":
        raise DataError(
            f"{row.where}: {label}",
            f"the last turn is the {last}'s",
            "a row to learn from ends with the assistant's turn",
            "add the answer as the last turn",
        )
    if row.purpose == "unpaired" and not messages[-1].trained:
        at, rule = f"{row.where}: {label}", "the last turn is the answer that has the label"
        raise DataError(at, "the last turn has weight 0", rule, "remove the weight")
    if row.purpose == "conversations" and not any(one.trained for one in messages if one.role == "assistant"):
        raise DataError(
            f"{row.where}: {label}",
            "every turn of the assistant has weight 0",
            "a row to learn from has a turn that is learned",
            "leave the row out, or give one turn the weight 1",
        )
    return {"messages": messages, "tools": tools, "template_kwargs": _template_kwargs(row, messages)}


def _pair(
    row: _FormatRow, turns: tuple[Message, ...], chosen: Message, rejected: Message, *, label: str = ""
) -> dict[str, Any]:
    label = label or ("messages" if row.has("messages") else "prompt")
    check_turns(turns, row.where, label)
    messages, tools = _with_system(row, turns), _tools(row)
    if messages[-1].role not in ("user", "tool"):
        raise DataError(
            f"{row.where}: {label}",
            f"the last turn is the {messages[-1].role}'s",
            "the answers are in fields of their own, after the user's last turn",
            f"take the last turn out of {label}",
        )
    if turn_content(chosen) == turn_content(rejected):
        shown = chosen.content if len(chosen.content) <= 60 else chosen.content[:57] + "..."
        names = (("preferred_output", "non_preferred_output"), ("chosen", "rejected"))
        swift = (("messages", "rejected_messages"), ("messages", "rejected_response"))
        better, worse = next(pair for pair in (*names, *swift) if row.has(pair[1]))
        raise DataError(
            f"{row.where}: {better}",
            f"it is the same text as {worse} ({shown!r})",
            "a preference is between two answers",
            "take the row out, or correct one of the answers",
        )
    fields = {"messages": _unlearned(messages), "chosen": chosen, "rejected": rejected, "tools": tools}
    return {**fields, "template_kwargs": _template_kwargs(row, messages)}


def _prompt(row: _FormatRow) -> tuple[Message, ...]:
    value = row.record.get("prompt")
    if isinstance(value, list):
        return row.context_reader.turns(value, "prompt")
    if value is None and row.purpose == "pairs":
        named = _other_names(row.record, ("prompt", "chosen", "rejected"))
        raise DataError(
            f"{row.where}: prompt",
            f"the field is missing (found {', '.join(row.record)})",
            "a preference has `prompt` or `messages`, or whole conversations as `chosen` and `rejected`",
            _set_columns(named) if "prompt" in named else "add the field, or name its column in data.columns",
        )
    return (Message("user", row.text("prompt")),)


def _completion(row: _FormatRow, key: str) -> tuple[Message, ...]:
    """Turns of the answer: text, or turns of the assistant and results of its calls."""
    value = row.record.get(key)
    if not isinstance(value, list | dict):
        return (Message("assistant", row.text(key)),)
    turns = row.reader.turns(value if isinstance(value, list) else [value], key)
    for index, turn in enumerate(turns):
        if turn.role not in ("assistant", "tool"):
            raise DataError(
                f"{row.where}: {key}[{index}].role",
                f"found {turn.role!r}",
                f"{key} is the answer: turns of the assistant, and results of its calls",
                "write the whole conversation as `messages`",
            )
    return turns


def _answer(row: _FormatRow, key: str, *, sharegpt: bool = False) -> Message:
    """An answer of a pair: text, the assistant's turn, or a list of that one turn."""
    value = row.record.get(key)
    turns = value if isinstance(value, list) else [value]
    if not isinstance(value, dict | list):
        return Message("assistant", row.text(key))
    if len(turns) != 1:
        raise DataError(
            f"{row.where}: {key}",
            f"found {len(turns)} turns",
            f"{key} is one answer: text, or one turn of the assistant",
            "keep what comes before it in `messages`",
        )
    at = f"{key}[0]" if isinstance(value, list) else key
    turn = row.reader.turn(turns[0], at, key, sharegpt=sharegpt)
    if turn.role != "assistant":
        raise DataError(f"{row.where}: {key}.role", f"found {turn.role!r}", "an answer is the assistant's turn")
    if not turn.trained:
        raise DataError(f"{row.where}: {at}.weight", "found 0", "both answers of a pair are compared", "remove the key")
    return turn


def _common_turns(row: _FormatRow, better: str, worse: str) -> tuple[tuple[Message, ...], Message, Message]:
    """The turns that the whole conversations of two keys begin with, and the last turn of each."""
    chosen, rejected = (row.reader.turns(row.record[key], key) for key in (better, worse))
    if [turn_content(one) for one in chosen[:-1]] != [turn_content(one) for one in rejected[:-1]]:
        raise DataError(
            f"{row.where}: {worse}",
            f"its turns differ from those of {better} before the last one",
            "two conversations of a pair differ in their last turn",
            "end both at the first answer that differs",
        )
    return chosen[:-1], _require_answer(row, better, chosen), _require_answer(row, worse, rejected)


def _require_answer(row: _FormatRow, key: str, turns: tuple[Message, ...]) -> Message:
    """The last turn. Raises DataError where it is not the assistant's."""
    if turns[-1].role != "assistant":
        raise DataError(f"{row.where}: {key}", f"it ends with the {turns[-1].role}'s turn", "it ends with an answer")
    if not turns[-1].trained:
        at, rule = f"{row.where}: {key}[{len(turns) - 1}]", "both answers of a pair are compared"
        raise DataError(at, "the answer has weight 0", rule, "remove the key")
    return turns[-1]


def _alpaca_prompt(row: _FormatRow) -> tuple[Message, ...]:
    """Earlier turns of `history`, and the instruction with its input on a line below."""
    turns: list[Message] = []
    history = row.record.get("history") or []
    if not isinstance(history, list):
        raise DataError(f"{row.where}: history", f"found {kind_of(history)}", "history is a list of [question, answer]")
    for index, pair in enumerate(history):
        at = f"{row.where}: history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(at, f"found {kind_of(pair)}", "history is a list of [question, answer]")
        asked, answered = (require_text(one, f"{at}[{n}]", "history", True) for n, one in enumerate(pair))
        turns += [Message("user", asked), Message("assistant", answered)]
    question = row.text("instruction")
    if not is_empty(row.record.get("input")):
        question += "\n" + row.text("input", may_be_empty=True)
    return (*turns, Message("user", question))


def _with_system(row: _FormatRow, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns with the system turn of the key `system`, where the row has one."""
    if is_empty(row.record.get("system")):
        return messages
    system = Message("system", row.text("system"))
    if messages[0].role in ("system", "developer"):
        if messages[0].content == system.content:
            return messages
        raise DataError(f"{row.where}: system", "the turns begin with another system turn", "a row has one", "keep one")
    return (system, *messages)


def _tools(row: _FormatRow) -> tuple[Tool, ...]:
    tools = read_tools(row.record.get("tools"), row.where, "tools")
    functions = read_tools(row.record.get("functions"), row.where, "functions")
    if tools and functions:
        raise DataError(f"{row.where}: functions", "found next to tools", "functions is the older name", "keep tools")
    return tools or functions


def _template_kwargs(row: _FormatRow, messages: tuple[Message, ...]) -> Mapping[str, Any]:
    """The row's variables of the chat template. `parallel_tool_calls: false` is checked against the calls."""
    if row.has("parallel_tool_calls"):
        if row.record["parallel_tool_calls"] is False and any(len(one.tool_calls) > 1 for one in messages):
            raise DataError(
                f"{row.where}: parallel_tool_calls",
                "found false, and a turn has several calls",
                "without parallel calls a turn has one",
                "set it to true, or split the turn",
            )
        row.keys.ignore("parallel_tool_calls")  # no chat template reads it
    value = row.record.get("chat_template_kwargs")
    if is_empty(value):
        return {}
    if not isinstance(value, dict):
        raise DataError(f"{row.where}: chat_template_kwargs", f"found {kind_of(value)}", "it is an object of variables")
    return {key: one for key, one in value.items() if one is not None}  # Parquet fills absent keys with null


def _label(row: _FormatRow) -> bool:
    given = [key for key in LABELS if row.has(key)]
    if not given:
        raise DataError(
            f"{row.where}: label",
            "the field is missing",
            "an answer has a label: true for a good one, false for a bad one",
            "add the field, or name its column in data.columns",
        )
    value = row.record[given[0]]
    if not (is_number(value, 0) or is_number(value, 1)):
        raise DataError(
            f"{row.where}: {given[0]}",
            f"found {value!r}",
            "a label is true or false",
            "write true for a good answer, false for a bad one",
        )
    return is_number(value, 1)


def _without_opening(row: _FormatRow, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns with no loss on answers before the first question, which are counted."""
    asked = next(place for place, one in enumerate(messages) if one.role == "user")
    if any(one.role == "assistant" and one.trained for one in messages[:asked]):
        row.keys.opening()
    return (*_unlearned(messages[:asked]), *messages[asked:])


def _unlearned(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns of a prompt: TRL puts no loss on them, answers among them included."""
    return tuple(replace(one, trained=False) if one.role == "assistant" else one for one in messages)


def _other_names(record: Mapping[str, Any], keys: Sequence[str]) -> dict[str, str]:
    """Columns that seem to hold missing keys: key -> column."""
    found = {}
    for key in keys:
        names = [name for name in _SYNONYMS.get(key, ()) if name in record]
        names += difflib.get_close_matches(key, [name for name in record if name not in ROW_KEYS], n=1, cutoff=0.8)
        if names and key not in record:
            found[key] = names[0]
    return found


def _set_columns(names: Mapping[str, str]) -> str:
    return f"set data.columns={{{', '.join(f'{key}: {column}' for key, column in names.items())}}}"


def _unknown(record: Mapping[str, Any], purpose: Purpose, where: str) -> DataError:
    """The error of a row in none of the purpose's formats, with the objective or the key that would read it."""
    wanted = [one for one in FORMATS if purpose in one.purposes]
    forms = "; ".join(" and ".join("|".join(group) for group in one.detect) for one in wanted)
    found = f"no format that {_OBJECTIVES[purpose]} reads has the keys {', '.join(record) or 'none'}"
    other = next((one for one in FORMATS if one.matches(record) and (one not in wanted)), None)
    ways = [keys for keys in _ALONE if {**record, **_other_names(record, keys)}.keys() >= {*keys}]
    hint = "name the columns in data.columns, or write data.template"
    if other is not None:
        hint = f"the row is in the format {other.name}: set objective.kind={_OBJECTIVES[other.purposes[0]]}"
    elif ways:
        hint = _set_columns(_other_names(record, (*ways[-1 if "history" in record else 0], "system")))
    elif "input_ids" in record or "segments" in record:
        hint = "rows of token ids and of segments are not read: write the turns or the text of the rows"
    return DataError(where, found, f"formats by their keys: {forms}", hint)
