"""Formats of rows: detection, the common form, the rules of turns, and what becomes of each key that peers read."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from graftwork.datasets.examples import Example, iter_examples, purpose_keys
from graftwork.datasets.formats import FORMATS, Purpose
from graftwork.datasets.keys import PREFERENCE_LOSS, KeyCheck
from graftwork.errors import DataError
from graftwork.prompts.render import Message, ToolCall

USER: dict[str, Any] = {"role": "user", "content": "u"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "a"}
FUNCTION = {"name": "now", "description": "d", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "CET"}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "12:00"}
TURNS = (Message("user", "u"), Message("assistant", "a"))
CALL_TURNS = (
    Message("user", "u"),
    Message("assistant", "", tool_calls=(ToolCall("now", {"zone": "CET"}),)),
    Message("tool", "12:00"),
    Message("assistant", "a"),
)


def write(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def read(folder: Path, record: Any, purpose: Purpose = "conversations", keys: KeyCheck | None = None) -> Example:
    [example] = iter_examples(write(folder / "rows.jsonl", record), purpose, keys=keys)
    return example


def sharegpt(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"from": role, "value": text} for role, text in turns]


CONVERSATIONS: list[tuple[str, dict[str, Any]]] = [
    ("openai", {"messages": [USER, ANSWER]}),
    ("openai", {"messages": [{**USER, "content": [{"type": "text", "text": "u"}]}, ANSWER]}),
    ("trl", {"prompt": "u", "completion": "a"}),
    ("trl", {"prompt": [USER], "completion": [ANSWER]}),
    ("trl", {"prompt": [USER], "completion": "a"}),
    ("sharegpt", {"conversations": sharegpt(("human", "u"), ("gpt", "a"))}),
    ("sharegpt", {"conversations": [USER, ANSWER]}),
    ("alpaca", {"instruction": "u", "input": "", "output": "a"}),
]


@pytest.mark.parametrize(("name", "record"), CONVERSATIONS)
def test_every_format_gives_the_same_conversation(tmp_path: Path, name: str, record: dict[str, Any]) -> None:
    keys = purpose_keys("conversations")
    found = read(tmp_path, record, keys=keys)
    assert found.messages == TURNS
    assert list(keys.formats.values()) == [name]
    assert not keys.ignored
    assert {key for key in keys.used if "[]" not in key} == {key for key, value in record.items() if value}


def test_alpaca_joins_instruction_and_input_by_a_line_break_and_begins_with_its_history(tmp_path: Path) -> None:
    record = {"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["q", "r"]]}
    assert [(turn.role, turn.content) for turn in read(tmp_path, record).messages] == [
        ("system", "s"),
        ("user", "q"),
        ("assistant", "r"),
        ("user", "i\nx"),
        ("assistant", "o"),
    ]


CALLS: list[dict[str, Any]] = [
    {"messages": [USER, CALLING, RESULT, ANSWER], "tools": [TOOL]},
    {"messages": [USER, {**CALLING, "content": ""}, RESULT, ANSWER], "tools": json.dumps([TOOL])},
    {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "function_call": {"name": "now", "arguments": {"zone": "CET"}}},
            {"role": "function", "name": "now", "content": "12:00"},
            ANSWER,
        ],
        "functions": [FUNCTION],
    },
    {
        "conversations": sharegpt(
            ("human", "u"),
            ("function_call", json.dumps({"name": "now", "arguments": {"zone": "CET"}})),
            ("observation", "12:00"),
            ("gpt", "a"),
        ),
        "tools": json.dumps([FUNCTION]),
    },
    {"prompt": [USER], "completion": [CALLING, RESULT, ANSWER], "tools": [TOOL]},
]


@pytest.mark.parametrize("record", CALLS)
def test_calls_and_their_results_are_read_in_every_form(tmp_path: Path, record: dict[str, Any]) -> None:
    found = read(tmp_path, record)
    assert found.tools == (TOOL,)
    assert [(turn.role, turn.content) for turn in found.messages] == [(one.role, one.content) for one in CALL_TURNS]
    assert [[(call.name, call.arguments) for call in turn.tool_calls] for turn in found.messages] == [
        [],
        [("now", {"zone": "CET"})],
        [],
        [],
    ]
    assert all(turn.trained for turn in found.messages)


@pytest.mark.parametrize("save", ["parquet", "folder"])
def test_arguments_of_calls_in_arrow_have_no_keys_of_other_functions(tmp_path: Path, save: str) -> None:
    """Arrow fills objects of a list up to the same keys with null; a template would write them."""
    import datasets

    def row(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        return {"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}

    rows = datasets.Dataset.from_list([row("now", {"zone": "CET"}), row("add", {"a": 1, "b": 2})])
    uri = str(tmp_path / ("rows.parquet" if save == "parquet" else "rows"))
    rows.to_parquet(uri) if save == "parquet" else rows.save_to_disk(uri)
    filled = rows[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert filled == {"zone": "CET", "a": None, "b": None}, "the case that is tested"
    found = list(iter_examples(uri, "conversations"))
    assert [one.messages[1].tool_calls[0].arguments for one in found] == [{"zone": "CET"}, {"a": 1, "b": 2}]


def test_two_calls_of_a_turn_are_one_turn_in_sharegpt(tmp_path: Path) -> None:
    call = json.dumps({"name": "now", "arguments": {}})
    turns = sharegpt(("human", "u"), ("function_call", call), ("function_call", call), ("observation", "1"))
    record = {"conversations": [*turns, *sharegpt(("observation", "2"), ("gpt", "a"))]}
    found = read(tmp_path, record).messages
    assert [len(turn.tool_calls) for turn in found] == [0, 2, 0, 0, 0]


def test_weights_reasoning_and_modes_of_a_turn(tmp_path: Path) -> None:
    turns = [
        {"role": "developer", "content": "s"},
        {**USER, "name": "ann"},
        {**ANSWER, "weight": 0, "reasoning_content": "r"},
        USER,
        {**ANSWER, "reasoning": "r", "thinking_mode": "mask"},
        USER,
        {**ANSWER, "thinking": "r", "train": False},
        USER,
        {**ANSWER, "loss": True},
    ]
    found = read(tmp_path, {"messages": turns}).messages
    assert [turn.trained for turn in found] == [True, True, False, True, True, True, False, True, True]
    assert [turn.reasoning for turn in found] == [None, None, "r", None, "r", None, "r", None, None]
    assert (found[0].role, found[1].name, found[4].thinking) == ("developer", "ann", "mask")


def test_answers_of_a_prompt_are_not_learned_as_in_trl(tmp_path: Path) -> None:
    record = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}
    assert [turn.trained for turn in read(tmp_path, record).messages] == [True, False, True, True]


PAIRS: list[tuple[str, dict[str, Any]]] = [
    ("trl_preference", {"prompt": "u", "chosen": "a", "rejected": "b"}),
    ("trl_preference", {"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "b"}]}),
    ("trl_preference", {"messages": [USER], "chosen": ANSWER, "rejected": "b"}),
    ("trl_preference", {"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "b"}]}),
    ("trl_preference", {"prompt": "u", "chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "b"}]}),
    (
        "sharegpt_preference",
        {
            "conversations": sharegpt(("human", "u")),
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
    ),
    ("alpaca_preference", {"instruction": "u", "input": "", "chosen": "a", "rejected": "b"}),
    ("swift_preference", {"messages": [USER, ANSWER], "rejected_response": "b"}),
    ("swift_preference", {"messages": [USER, ANSWER], "rejected_messages": [USER, {**ANSWER, "content": "b"}]}),
    (
        "openai_preference",
        {
            "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [ANSWER],
            "non_preferred_output": [{**ANSWER, "content": "b"}],
        },
    ),
]


@pytest.mark.parametrize(("name", "record"), PAIRS)
def test_every_form_of_a_preference_gives_the_same_pair(tmp_path: Path, name: str, record: dict[str, Any]) -> None:
    keys = purpose_keys("pairs")
    found = read(tmp_path, record, "pairs", keys)
    assert (found.messages, found.chosen, found.rejected) == (TURNS[:1], TURNS[1], Message("assistant", "b"))
    assert list(keys.formats.values()) == [name]


@pytest.mark.parametrize(
    "record", [record for name, record in PAIRS if name == "trl_preference" and "messages" not in record]
)
def test_pairs_are_those_of_trl(tmp_path: Path, record: dict[str, Any]) -> None:
    """TRL 1.16's own functions bring a preference with an implicit prompt to the same turns."""
    from trl.data_utils import is_conversational, maybe_extract_prompt

    found = read(tmp_path, record, "pairs")
    theirs = maybe_extract_prompt(copy.deepcopy(record))
    if not is_conversational(theirs):
        theirs = {key: [{"role": "user" if key == "prompt" else "assistant", "content": theirs[key]}] for key in theirs}
    for key, turns in (("prompt", found.messages), ("chosen", [found.chosen]), ("rejected", [found.rejected])):
        assert [{"role": turn.role, "content": turn.content} for turn in turns if turn] == theirs[key]


@pytest.mark.parametrize(("label", "value"), [(True, True), (False, False), (1, True), ("False", False), ("0", False)])
@pytest.mark.parametrize("key", ["label", "kto_tag"])
def test_an_answer_with_a_label_is_read(tmp_path: Path, key: str, label: object, value: bool) -> None:
    for record in ({"prompt": "u", "completion": "a"}, {"messages": [USER, ANSWER]}):
        found = read(tmp_path, {**record, key: label}, "unpaired")
        assert (found.messages, found.label) == (TURNS, value)


def test_a_labelled_answer_cannot_be_left_out_of_the_loss(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 1: messages: the last turn has weight 0"):
        read(tmp_path, {"messages": [USER, {**ANSWER, "weight": 0}], "label": True}, "unpaired")


def turns(*added: Any) -> dict[str, Any]:
    return {"messages": [USER, *added]}


BAD: list[tuple[dict[str, Any], str, str]] = [
    (
        turns(CALLING, USER, ANSWER),
        r"messages\[1\].tool_calls",
        r"call of 'now': it has no result: it is followed by messages\[2\] of the user",
    ),
    (turns(CALLING, ANSWER), r"messages\[1\].tool_calls", "call of 'now': it has no result"),
    (
        turns({**CALLING, "tool_calls": [CALL, {**CALL, "id": "c2"}]}, RESULT, ANSWER),
        r"messages\[1\].tool_calls",
        "no re",
    ),
    (turns(RESULT, ANSWER), r"messages\[1\].tool_call_id", "no call before it is without a result"),
    (turns(CALLING, RESULT, RESULT, ANSWER), r"messages\[3\].tool_call_id", "no call before it is without a result"),
    (turns(CALLING, {**RESULT, "tool_call_id": "c9"}, ANSWER), r"messages\[2\].tool_call_id", "found 'c9'"),
    (
        turns({**ANSWER, "tool_calls": [{"function": {"name": "now", "arguments": "{zone"}}]}),
        r"messages\[1\].tool_calls\[0\].arguments",
        "it is not JSON",
    ),
    (
        turns({**ANSWER, "tool_calls": [{"function": {"name": "now", "arguments": "[1]"}}]}),
        r"messages\[1\].tool_calls\[0\].arguments",
        "found a list",
    ),
    (
        turns({**ANSWER, "tool_calls": [{"function": {"arguments": "{}"}}]}),
        r"messages\[1\].tool_calls\[0\].name",
        "the field is missing",
    ),
    (
        turns({**ANSWER, "tool_calls": [{"type": "custom", "custom": {}}]}),
        r"messages\[1\].tool_calls\[0\].type",
        "found 'custom'",
    ),
    ({"messages": [{**USER, "tool_calls": [CALL]}, ANSWER]}, r"messages\[0\].tool_calls", "in a turn of role user"),
    ({"messages": [{**USER, "reasoning_content": "r"}, ANSWER]}, r"messages\[0\].reasoning_content", "role user"),
    (turns({**ANSWER, "reasoning": "r", "thinking": "s"}), r"messages\[1\].thinking", "it differs from reasoning"),
    (turns({**ANSWER, "thinking_mode": "hide"}), r"messages\[1\].thinking_mode", "found 'hide'"),
    (turns({**ANSWER, "tool_call_id": "c1"}), r"messages\[1\].tool_call_id", "found in a turn of role assistant"),
    ({**turns(ANSWER), "tools": [{"type": "function"}]}, r"tools\[0\]", "it has no name"),
    ({**turns(ANSWER), "tools": "[{"}, "tools", "it is not JSON"),
    (
        {**turns(ANSWER), "tools": [{"type": "web_search", "function": FUNCTION}]},
        r"tools\[0\].type",
        "found 'web_search'",
    ),
    ({**turns(ANSWER), "tools": [TOOL], "functions": [FUNCTION]}, "functions", "found next to tools"),
    ({**turns(ANSWER), "chat_template_kwargs": "x"}, "chat_template_kwargs", "found a string"),
    ({"messages": [{"role": "system", "content": "s"}, USER, ANSWER], "system": "t"}, "system", "another system turn"),
    (
        {**turns({**CALLING, "tool_calls": [CALL, CALL]}), "parallel_tool_calls": False},
        "parallel_tool_calls",
        "several",
    ),
    ({"conversations": sharegpt(("human", "u"), ("function_call", "now()"))}, r"conversations\[1\].value", "not JSON"),
    ({"conversations": sharegpt(("narrator", "u"))}, r"conversations\[0\].from", "found 'narrator'"),
    ({"conversations": sharegpt(("human", ""), ("gpt", "a"))}, r"conversations\[0\].value", "it is empty"),
    ({"instruction": "i", "output": "o", "history": [["q"]]}, r"history\[0\]", "found a list"),
    ({"instruction": "i"}, "output", "the field is missing"),
    (turns(CALLING, RESULT), "messages", "the last turn is the tool's"),
]


@pytest.mark.parametrize(("record", "at", "found"), BAD)
def test_a_bad_turn_is_named_with_row_and_key(tmp_path: Path, record: dict[str, Any], at: str, found: str) -> None:
    with pytest.raises(DataError, match=rf"rows.jsonl row 1: {at}: .*{found}") as error:
        read(tmp_path, record)
    assert error.value.rule


@pytest.mark.parametrize(
    ("record", "purpose", "hint"),
    [
        ({"prompt": "u", "chosen": "a", "rejected": "b"}, "conversations", "trl_preference: set objective.kind=dpo"),
        ({"text": "t"}, "conversations", "text: set objective.kind=cpt"),
        ({"messages": [USER, ANSWER]}, "pairs", "openai: set objective.kind=sft"),
        ({"messages": [USER, ANSWER]}, "documents", "openai: set objective.kind=sft"),
        ({"question": "q", "answer": "a"}, "conversations", "data.columns={prompt: question, completion: answer}"),
        ({"query": "q", "response": "a"}, "conversations", "data.columns={prompt: query, completion: response}"),
        (
            {"system_prompt": "s", "question": "q", "response": "a"},
            "conversations",
            "data.columns={prompt: question, completion: response, system: system_prompt}",
        ),
        ({"Prompt": "q", "Completion": "a"}, "conversations", "data.columns={prompt: Prompt, completion: Completion}"),
        ({"conversation": [USER, ANSWER]}, "conversations", "data.columns={conversations: conversation}"),
        (
            {"query": "q", "response": "r", "history": []},
            "conversations",
            "data.columns={instruction: query, output: response}",
        ),
        ({"input_ids": [1], "labels": [1]}, "conversations", "rows of token ids"),
        ({"segments": [{"label": True, "text": "t"}]}, "conversations", "rows of token ids"),
        ({"a": 1}, "conversations", "data.columns"),
    ],
)
def test_a_row_of_another_purpose_names_the_objective(
    tmp_path: Path, record: dict[str, Any], purpose: Purpose, hint: str
) -> None:
    with pytest.raises(DataError, match="rows.jsonl row 1: no format that") as error:
        read(tmp_path, record, purpose)
    assert hint in error.value.hint


def test_a_missing_answer_names_the_columns(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 1: output: the field is missing") as error:
        read(tmp_path, {"instruction": "i", "context": "c", "response": "r"})
    assert error.value.hint == "set data.columns={output: response, input: context}"
    with pytest.raises(DataError, match="row 1: output: the field is missing") as error:
        read(tmp_path, {"instruction": "i", "said": "r"})
    assert "data.columns (columns: instruction, said)" in error.value.hint
    with pytest.raises(DataError, match="row 1: prompt: the field is missing") as error:
        read(tmp_path, {"question": "q", "accepted": "a", "rejected": "b"}, "pairs")
    assert error.value.hint == "set data.columns={prompt: question, chosen: accepted}"


SWIFT_CALLS = [{"role": "tool_call", "content": json.dumps({"name": "now", "arguments": {"zone": z}})} for z in "AB"]
SWIFT_RESULTS = [{"role": "tool_response", "content": text} for text in ("1:00", "2:00")]


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_calls_of_ms_swift_are_turns_of_their_own(tmp_path: Path, key: str) -> None:
    example = read(tmp_path, {key: [USER, *SWIFT_CALLS, *SWIFT_RESULTS, ANSWER], "tools": json.dumps([TOOL])})
    assert [turn.role for turn in example.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert [call.arguments for call in example.messages[1].tool_calls] == [{"zone": "A"}, {"zone": "B"}]


def test_a_label_next_to_plain_text_is_its_class(tmp_path: Path) -> None:
    keys = purpose_keys("documents")
    assert read(tmp_path, {"text": "t", "label": 0}, "documents", keys).text == "t"
    assert keys.ignored == {"label": 1}


@pytest.mark.parametrize(
    ("part", "hint"),
    [
        ({"type": "image_url", "image_url": {"url": "u"}}, "leave the row out"),
        ({"type": "tool_use", "id": "t", "name": "now", "input": {}}, "tool_calls"),
        ({"type": "thinking", "thinking": "t"}, "reasoning_content"),
    ],
)
def test_a_part_of_another_type_is_named(tmp_path: Path, part: dict[str, Any], hint: str) -> None:
    with pytest.raises(DataError, match=r"messages\[1\].content\[0\].type: found") as error:
        read(tmp_path, {"messages": [USER, {"role": "assistant", "content": [part]}]})
    assert hint in error.value.hint


def test_turns_as_text_name_the_template(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 1: messages: found a string") as error:
        read(tmp_path, {"messages": json.dumps([USER, ANSWER])})
    assert error.value.hint == """set data.template={messages: "{{ messages }}"}"""


def test_an_answer_before_the_first_question_is_not_learned(tmp_path: Path) -> None:
    keys = KeyCheck()
    found = read(tmp_path, {"messages": [ANSWER, USER, ANSWER], "system": "s"}, keys=keys)
    assert [turn.trained for turn in found.messages if turn.role == "assistant"] == [False, True]
    assert keys.note("rows") == ("rows: answers before the first question (in 1 row) are not learned",)
    keys = KeyCheck()
    read(tmp_path, {"messages": [{**ANSWER, "weight": 0}, USER, ANSWER]}, keys=keys)
    assert keys.note("rows") == (), "nothing was to be learned there"


def test_a_call_behind_the_text_of_an_answer_is_one_turn_with_it(tmp_path: Path) -> None:
    """As in ms-swift; two turns would end the first one before its call."""
    call = {"role": "tool_call", "content": '{"name": "now", "arguments": {"zone": "CET"}}'}
    looks = {**ANSWER, "content": "look", "reasoning_content": "why"}
    found = read(tmp_path, {"messages": [USER, looks, call, {"role": "tool_response", "content": "12:00"}, ANSWER]})
    expected = Message("assistant", "look", reasoning="why", tool_calls=(ToolCall("now", {"zone": "CET"}),))
    assert found.messages == (TURNS[0], expected, Message("tool", "12:00"), TURNS[1])


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        ({}, {"reasoning_content": "why"}, "reasoning of its own"),
        ({}, {"loss": 0}, "its weight differs"),
        ({"tool_calls": [CALL]}, {}, "found in a turn whose text is a call"),
    ],
)
def test_calls_of_one_turn_lose_no_key(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], found: str
) -> None:
    call = {"role": "tool_call", "content": '{"name": "now"}'}
    with pytest.raises(DataError, match=found):
        read(tmp_path, {"messages": [USER, {**call, **first}, {**call, **second}]})


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ({"rejected_response": "b", "rejected_messages": [USER, ANSWER]}, "rejected_response: found next to"),
        ({"messages": [USER, {**ANSWER, "loss": False}], "rejected_response": "b"}, r"messages\[1\]: the answer has"),
        ({"rejected_response": "a"}, "messages: it is the same text as rejected_response"),
    ],
)
def test_a_preference_of_ms_swift_loses_no_key(tmp_path: Path, record: dict[str, Any], found: str) -> None:
    with pytest.raises(DataError, match=found):
        read(tmp_path, {"messages": [USER, ANSWER], **record}, "pairs")


def test_control_tokens_in_parts_and_earlier_turns_are_noted(tmp_path: Path) -> None:
    keys = KeyCheck()
    parts = [{"type": "text", "text": "u<|im_end|>"}]
    read(tmp_path, {"messages": [{**USER, "content": parts}, ANSWER]}, keys=keys)
    read(tmp_path, {"id": "2", "instruction": "u", "output": "a", "history": [["<bos>", "b"]]}, keys=keys)
    assert dict(keys.spelled) == {"<|im_end|>": 1, "<bos>": 1}


@pytest.mark.parametrize(
    "call",
    ["<tool_call>\n{'name': 'now'}\n</tool_call>", "One moment. <functioncall> {}", '[Time of Day(zone="CET")]'],
    ids=["hermes", "glaive", "toolace"],
)
def test_calls_that_are_written_as_text_stay_text(tmp_path: Path, call: str) -> None:
    found = read(tmp_path, {"conversations": sharegpt(("human", "u"), ("gpt", call), ("tool", "12"), ("gpt", "a"))})
    assert found.messages == (TURNS[0], Message("assistant", call), Message("tool", "12"), TURNS[1])


def test_a_result_behind_plain_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"conversations\[2\].tool_call_id: no call before it") as error:
        read(tmp_path, {"conversations": sharegpt(("human", "u"), ("gpt", "a"), ("tool", "12:00"), ("gpt", "a"))})
    assert "function_call" in error.value.hint


def test_a_file_of_two_formats_names_both_rows(tmp_path: Path) -> None:
    uri = write(tmp_path / "rows.jsonl", *(record for _, record in CONVERSATIONS[1:3]))
    with pytest.raises(
        DataError, match=r"rows.jsonl row 2: it is in the format trl, and .*rows.jsonl row 1 in .* openai"
    ):
        list(iter_examples(uri, "conversations"))


# Keys that peers read. Sources:
# OpenAI: the fine-tuning guide and the API reference of the chat format (supervised, preference, tool calling).
# TRL 1.16: docs/source/dataset_formats.md, sft_trainer.py, dpo_trainer.py (columns), kto (label).
# Axolotl: docs/dataset-formats/{conversation,inst_tune,template_free}.qmd.
# LLaMA-Factory: src/llamafactory/data/parser.py, DatasetAttr.
# ms-swift: swift/llm/dataset/preprocessor/core.py, and its guide to custom datasets.
CHAT = {"messages": [USER, ANSWER]}
PAIR = {"prompt": "u", "chosen": "a", "rejected": "b"}
ROW_KEYS: list[tuple[Purpose, dict[str, Any], str, Any]] = [
    *(
        ("conversations", CHAT, key, value)
        for key, value in {
            "tools": [TOOL],
            "functions": [FUNCTION],
            "parallel_tool_calls": True,
            "chat_template_kwargs": {"enable_thinking": False},
            "system": "s",
            "prompt": "p",
            "completion": "c",
            "chosen": "x",
            "rejected": "y",
            "label": False,
            "kto_tag": False,
            "text": "t",
            "image": "x.png",
            "images": ["x.png"],
            "videos": ["x.mp4"],
            "audios": ["x.wav"],
            "objects": {"bbox": [[1, 2, 3, 4]]},
            "documents": [{"text": "t"}],
            "input_ids": [1],
            "labels": [1],
            "completion_mask": [1],
            "assistant_masks": [1],
            "segments": [{"label": True, "text": "t"}],
            "weight": 0.5,
            "loss_scale": 0.5,
            "conversations": sharegpt(("human", "x")),
            "instruction": "i",
            "input": "x",
            "output": "o",
            "history": [["q", "a"]],
            "query": "q",
            "response": "r",
            "rejected_response": "r",
            "rejected_messages": [USER],
            "positive_messages": [[USER]],
            "negative_messages": [[USER]],
            "solution": "s",
            "channel": "c",
            "enable_thinking": False,
            "reasoning_content": "r",
        }.items()
    ),
    *(
        ("conversations", {"instruction": "i", "output": "o"}, key, value)
        for key, value in {
            "input": "x",
            "system": "s",
            "history": [["q", "a"]],
            "tools": [TOOL],
            "images": ["x"],
        }.items()
    ),
    *(
        ("conversations", {"conversations": sharegpt(("human", "u"), ("gpt", "a"))}, key, value)
        for key, value in {"system": "s", "tools": json.dumps([FUNCTION]), "images": ["x"], "audios": ["x"]}.items()
    ),
    *(
        ("pairs", PAIR, key, value)
        for key, value in {
            "tools": [TOOL],
            "chat_template_kwargs": {"a": 1},
            "system": "s",
            "images": ["x"],
            "margin": 0.5,
            "ref_chosen_logps": -1.0,
            "ref_rejected_logps": -1.0,
            "score_chosen": 5,
            "weight": 0.5,
        }.items()
    ),
    ("unpaired", {**CHAT, "label": True}, "label", False),
    ("unpaired", {"prompt": "u", "completion": "a", "kto_tag": True}, "kto_tag", False),
    ("documents", {"text": "t"}, "text", "other"),
    ("documents", {"text": "t"}, "meta", {"url": "u"}),
]
TURN_KEYS: list[tuple[int, str, Any]] = [
    *(
        (1, key, value)
        for key, value in {
            "content": [{"type": "text", "text": "b"}],
            "weight": 0,
            "loss": False,
            "loss_scale": 0,
            "train": False,
            "training": False,
            "train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}],
            "reasoning_content": "r",
            "reasoning": "r",
            "thinking": "r",
            "tool_calls": [CALL],
            "function_call": {"name": "now", "arguments": "{}"},
            "refusal": "no",
            "audio": {"id": "x"},
            "name": "n",
            "images": ["x"],
            "timestamp": 1,
        }.items()
    ),
    *(
        (0, key, value)
        for key, value in {
            "content": [{"type": "image_url", "image_url": {"url": "u"}}],
            "name": "n",
            "train": True,
            "tool_call_id": "c1",
            "images": ["x"],
            "annotations": [1],
        }.items()
    ),
]


def outcome(folder: Path, purpose: Purpose, base: dict[str, Any], changed: dict[str, Any], name: str) -> str:
    """used: the text, the mask or the label differs; rejected: by row and key; ignored: counted and reported."""
    more = PREFERENCE_LOSS if purpose == "pairs" else ()
    keys = KeyCheck(prompt=purpose != "documents", more=more)
    before = read(folder, base, purpose)
    try:
        after = read(folder, changed, purpose, keys)
    except DataError as error:
        return "rejected" if "rows.jsonl row 1: " in error.subject else "lost"
    fields = ("messages", "tools", "template_kwargs", "chosen", "rejected", "label", "text")
    if any(getattr(before, field) != getattr(after, field) for field in fields):
        return "used"
    return "ignored" if name in keys.ignored and name in keys.note("data")[0] else "lost"


@pytest.mark.parametrize(("purpose", "base", "key", "value"), ROW_KEYS)
def test_no_key_of_a_row_that_a_peer_reads_is_lost(
    tmp_path: Path, purpose: Purpose, base: dict[str, Any], key: str, value: Any
) -> None:
    assert outcome(tmp_path, purpose, base, {**base, key: value}, key) != "lost"


@pytest.mark.parametrize(("at", "key", "value"), TURN_KEYS)
def test_no_key_of_a_turn_that_a_peer_reads_is_lost(tmp_path: Path, at: int, key: str, value: Any) -> None:
    changed = [dict(turn) for turn in (USER, ANSWER, USER, ANSWER)]
    base = {"messages": copy.deepcopy(changed)}
    changed[at][key] = value
    if key in ("tool_calls", "function_call"):
        changed.insert(at + 1, {"role": "tool", "content": "12:00"})
    assert outcome(tmp_path, "conversations", base, {"messages": changed}, f"messages[].{key}") != "lost"


@pytest.mark.parametrize(("at", "key", "value"), TURN_KEYS)
def test_no_key_of_a_sharegpt_turn_is_lost(tmp_path: Path, at: int, key: str, value: Any) -> None:
    base = {"conversations": sharegpt(("human", "u"), ("gpt", "a"), ("human", "u"), ("gpt", "a"))}
    changed = copy.deepcopy(base)
    changed["conversations"][at][key] = value
    assert outcome(tmp_path, "conversations", base, changed, f"conversations[].{key}") != "lost"


@pytest.mark.parametrize(("key", "value"), [(key, value) for at, key, value in TURN_KEYS if at == 1])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_no_key_of_an_answer_of_a_pair_is_lost(tmp_path: Path, side: str, key: str, value: Any) -> None:
    base = {"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "c"}]}
    changed = copy.deepcopy(base)
    changed[side][0][key] = value
    assert outcome(tmp_path, "pairs", base, changed, f"{side}[].{key}") != "lost"


@pytest.mark.parametrize(
    ("key", "value"), [("tools", [TOOL]), ("parallel_tool_calls", True), ("temperature", 1), ("model", "m")]
)
def test_no_key_of_the_input_of_a_preference_is_lost(tmp_path: Path, key: str, value: Any) -> None:
    base = PAIRS[-1][1] | {"input": {"messages": [USER]}}
    changed = {**base, "input": {"messages": [USER], key: value}}
    name = key if key == "parallel_tool_calls" else f"input.{key}"
    assert outcome(tmp_path, "pairs", base, changed, name) == ("used" if key == "tools" else "ignored")


def test_the_outcomes_are_of_all_three_kinds(tmp_path: Path) -> None:
    """The check above tells them apart: a key that is read, one that is refused, one that is reported."""
    found = {
        key: outcome(tmp_path, "conversations", CHAT, {**CHAT, key: value}, key)
        for _, base, key, value in ROW_KEYS
        if base is CHAT
    }
    assert found["tools"] == found["chat_template_kwargs"] == found["system"] == "used"
    assert found["images"] == found["weight"] == found["label"] == "rejected"
    assert found["parallel_tool_calls"] == found["prompt"] == found["channel"] == "ignored"


def test_the_examples_of_the_guide_are_read(tmp_path: Path) -> None:
    guide = Path(__file__, "../../../../docs/data.md").resolve().read_text(encoding="utf-8")
    seen: set[str] = set()
    for block in re.findall(r"```json\n(.*?)```", guide, re.DOTALL):
        records = [json.loads(line) for line in block.splitlines()]
        for purpose in ("pairs", "unpaired", "conversations", "documents"):
            keys = purpose_keys(purpose)
            try:
                examples = list(iter_examples(write(tmp_path / "rows.jsonl", *records), purpose, keys=keys))
            except DataError:
                continue
            assert len(examples) == len(records)
            assert not keys.ignored
            seen.update(keys.formats.values())
            break
        else:
            raise AssertionError(f"no purpose reads {block}")
    assert seen >= {"openai", "trl", "sharegpt", "alpaca", "trl_preference", "openai_preference", "text"}
    assert all(f"`{one.name}`" in guide for one in FORMATS)


def test_each_purpose_has_a_format() -> None:
    for purpose in ("conversations", "prompts", "pairs", "unpaired", "documents"):
        assert any(purpose in one.purposes for one in FORMATS)
