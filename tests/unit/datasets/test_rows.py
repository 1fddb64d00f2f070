"""Datasets: what is read, and what is refused, row by row."""

import json
from pathlib import Path
from typing import Any

import pytest

from graftwork.datasets.rows import fingerprint, read_passages, read_rows, read_text, render_row, resolve_prompt
from graftwork.errors import BaseModelError, DataError, StorageError
from graftwork.prompts.render import Message, Passage, Prompt, PromptSpec
from graftwork.prompts.template import Template
from tests.chat_templates import FAMILIES

QUESTION = {"role": "user", "content": "Which airport is ZPPP?"}
ANSWER = {"role": "assistant", "content": '{"icao":"ZPPP"}'}


def write(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def test_both_forms_of_a_row_are_read(tmp_path: Path) -> None:
    turns = {"messages": [{"role": "system", "content": ""}, QUESTION, ANSWER], "id": "a", "source": "kept out"}
    text = {"prompt": "q", "completion": "a", "doc_id": 7, "gold": {"x": 1, "y": None}, "given_fields": "x"}
    [first] = read_rows(write(tmp_path / "turns.jsonl", turns), need="train")
    [second] = read_rows(write(tmp_path / "text.jsonl", text), need="train")
    assert first.messages == (Message("system", ""), Message(**QUESTION), Message(**ANSWER))  # type: ignore[arg-type]
    assert (first.id, first.doc_id, first.gold, first.given_fields) == ("a", None, None, ())
    assert (second.id, second.doc_id, second.gold, second.given_fields) == ("1", "7", {"x": 1, "y": None}, ("x",))
    assert second.question == (Message("user", "q"),)
    assert second.answer == "a"


def test_limit_blank_lines_windows_lines_and_a_bom(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = json.dumps({"messages": [QUESTION, ANSWER]})
    path.write_bytes(b"\xef\xbb\xbf" + f"{row}\r\n\r\n{row}\r\nnot json\r\n".encode())
    assert [row.id for row in read_rows(str(path), need="train", limit=2)] == ["1", "3"]
    with pytest.raises(DataError, match="row 4: it is not JSON"):
        read_rows(str(path), need="train")


@pytest.mark.parametrize(
    ("record", "at", "found"),
    [
        ({"messages": []}, "row 2: messages", "an empty list"),
        ({"messages": "hello"}, "row 2: messages", "found a string"),
        ({"messages": ["hello"]}, r"row 2: messages\[0\]", "found a string"),
        ({"messages": [{"content": "x"}]}, r"row 2: messages\[0\].role", "the field is missing"),
        ({"messages": [QUESTION, {"role": "bot", "content": "x"}]}, r"row 2: messages\[1\].role", "found 'bot'"),
        ({"messages": [QUESTION, {"role": ["a"], "content": "x"}]}, r"row 2: messages\[1\].role", r"found \['a'\]"),
        ({"messages": [{"role": "user"}]}, r"row 2: messages\[0\].content", "the field is missing"),
        ({"messages": [{"role": "user", "content": None}]}, r"row 2: messages\[0\].content", "found null"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, r"row 2: messages\[0\].content", "surrogate"),
        ({"messages": [ANSWER]}, "row 2: messages", "no user turn"),
        ({"messages": [QUESTION, {"role": "system", "content": "x"}]}, r"row 2: messages\[1\].role", "'system'"),
        ({"messages": [QUESTION]}, "row 2: messages", "the last turn is the user's"),
        ({"messages": [QUESTION, ANSWER], "gold": 3}, "row 2: gold", "found a number"),
        (
            {"messages": [QUESTION, ANSWER], "gold": {"a": 1}, "given_fields": ["b"]},
            "row 2: given_fields",
            "gold has no 'b'",
        ),
        ({"messages": [QUESTION, ANSWER], "given_fields": [1]}, "row 2: given_fields", "found a list"),
        ({"messages": [QUESTION, ANSWER], "id": True}, "row 2: id", "found True"),
        ({"messages": [QUESTION, ANSWER], "id": "one"}, "row 2: id='one'", "row 1 has the same id"),
        ({"messages": [QUESTION, ANSWER], "doc_id": []}, "row 2: doc_id", "found a list"),
        ({"mesages": []}, "row 2", "no format that sft reads has the keys mesages"),
        ({"prompt": "q", "completion": "a"}, "row 2", "it is in the format trl, and .* row 1 in the format openai"),
        (["not an object"], "row 2", "found a list"),
    ],
)
def test_a_bad_row_is_named_with_field_and_rule(tmp_path: Path, record: Any, at: str, found: str) -> None:
    uri = write(tmp_path / "rows.jsonl", {"messages": [QUESTION, ANSWER], "id": "one"}, record)
    with pytest.raises(DataError, match=f"{at}.*: .*{found}") as caught:
        read_rows(uri, need="train")
    assert caught.value.rule
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("record", "at", "found"),
    [
        ({"prompt": "q"}, "row 2: completion", "the field is missing"),
        ({"prompt": ["q"], "completion": "a"}, r"row 2: prompt\[0\]", "found a string"),
        ({"prompt": "q", "completion": "  "}, "row 2: completion", "it is empty"),
        ({"completion": "a"}, "row 2: prompt", "the field is missing"),
        ({"prompt": "q", "completion": [QUESTION]}, r"row 2: completion\[0\].role", "found 'user'"),
    ],
)
def test_a_bad_prompt_or_completion_is_named(tmp_path: Path, record: Any, at: str, found: str) -> None:
    uri = write(tmp_path / "rows.jsonl", {"prompt": "q", "completion": "a", "id": "one"}, record)
    with pytest.raises(DataError, match=f"{at}: {found}"):
        read_rows(uri, need="train")


def test_the_nearest_field_is_suggested(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data.columns={messages: message}"):
        read_rows(write(tmp_path / "rows.jsonl", {"message": [QUESTION, ANSWER]}), need="train")


def test_a_row_to_be_scored_needs_its_gold(tmp_path: Path) -> None:
    uri = write(tmp_path / "rows.jsonl", {"messages": [QUESTION], "gold": {"icao": "ZPPP"}}, {"messages": [QUESTION]})
    assert read_rows(uri, need="eval", limit=1)[0].answer is None
    with pytest.raises(DataError, match="row 2: gold: the field is missing"):
        read_rows(uri, need="eval")


def test_a_row_to_be_scored_may_be_a_prompt_and_its_gold(tmp_path: Path) -> None:
    uri = write(tmp_path / "rows.jsonl", {"prompt": "Which airport?", "gold": {"icao": "ZPPP"}})
    row = read_rows(uri, need="eval")[0]
    assert [(turn.role, turn.content) for turn in row.messages] == [("user", "Which airport?")]
    assert (row.answer, row.gold) == (None, {"icao": "ZPPP"})
    with pytest.raises(DataError, match="row 1: completion: the field is missing"):
        read_rows(uri, need="train")


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_dataset_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="it has no rows"):
        read_rows(str(path), need="train")
    with pytest.raises(DataError, match="it has no rows"):
        read_passages(str(path))


def test_a_missing_file_and_one_that_is_not_text(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="absent.jsonl"):
        read_rows(str(tmp_path / "absent.jsonl"), need="train")
    (tmp_path / "binary.jsonl").write_bytes(b'{"a": 1}\n\xff\xfe')
    with pytest.raises(DataError, match="row 2: it is not UTF-8"):
        read_text(str(tmp_path / "binary.jsonl"))


def test_passages(tmp_path: Path) -> None:
    uri = write(tmp_path / "corpus.jsonl", {"id": "a", "text": "one"}, {"id": 2, "text": "two", "more": 1})
    assert read_passages(uri) == [Passage("a", "one"), Passage("2", "two")]
    for record, found in (
        ({"text": "x"}, "id: the field is missing"),
        ({"id": "a", "text": "x"}, "row 1 has the same"),
    ):
        bad = write(tmp_path / "bad.jsonl", {"id": "a", "text": "one"}, record)
        with pytest.raises(DataError, match=f"row 2: .*{found}"):
            read_passages(bad)


def test_fingerprint_is_of_the_content_and_its_order(tmp_path: Path) -> None:
    one, two = {"prompt": "q", "completion": "é"}, {"prompt": "r", "completion": "b", "gold": {"a": 1}}
    rows = read_rows(write(tmp_path / "a.jsonl", one, two), need="train")
    as_messages = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "é"}], "id": 1}
    first = read_rows(write(tmp_path / "b.jsonl", as_messages), need="train")
    assert fingerprint(rows) == fingerprint([*first, rows[1]])
    assert fingerprint(rows) != fingerprint(rows[::-1])
    assert fingerprint(rows) != fingerprint(read_rows(write(tmp_path / "c.jsonl", one, one), need="train"))


def test_shots_are_read_from_their_rows(tmp_path: Path) -> None:
    uri = write(tmp_path / "rows.jsonl", *({"prompt": f"q{n}", "completion": f"a{n}"} for n in range(3)))
    prompt = resolve_prompt(PromptSpec(system="s", shots=2, few_shot_file=uri, context_header="Facts:"))
    assert prompt.shots == tuple((Message("user", f"q{n}"), Message("assistant", f"a{n}")) for n in range(2))
    assert (prompt.system, prompt.context_header) == ("s", "Facts:")
    assert resolve_prompt(PromptSpec()).shots == ()
    with pytest.raises(DataError, match="prompt.shots=4.*has 3 rows"):
        resolve_prompt(PromptSpec(shots=4, few_shot_file=uri))


def test_a_shot_is_one_question_and_one_answer(tmp_path: Path) -> None:
    uri = write(tmp_path / "rows.jsonl", {"messages": [QUESTION, ANSWER, QUESTION, ANSWER]})
    with pytest.raises(DataError, match="row 1 is not one of each"):
        resolve_prompt(PromptSpec(shots=1, few_shot_file=uri))


CALL = {"id": "call00001", "type": "function", "function": {"name": "find", "arguments": "{}"}}
CALLED = [QUESTION, {"role": "assistant", "content": "So:", "tool_calls": [CALL]}]
CALLED += [{"role": "tool", "tool_call_id": "call00001", "content": "r"}, ANSWER]
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize(
    ("family", "record", "found"),
    [
        ("llama3", {"messages": [QUESTION, ANSWER], "tools": TOOLS}, "chat template of .*it leaves functions out"),
        ("llama3", {"messages": CALLED}, "chat template of .*it leaves calls"),
        ("llama3_1", {"messages": CALLED, "tools": TOOLS}, r"messages\[1\]\.tool_calls: a turn with text and a call"),
        ("llama3", {"messages": [QUESTION, ANSWER | {"reasoning": "so"}]}, r"messages\[1\]\.reasoning_content: "),
        ("qwen3_5_nothink", {"messages": [QUESTION, ANSWER | {"reasoning": "so"}]}, r"chat .*answer of messages\[1\]"),
        ("gemma", {"messages": [{"role": "system", "content": "s"}, QUESTION, ANSWER]}, "conversation .*system, user"),
        ("qwen3", {"messages": [QUESTION, ANSWER], "chat_template_kwargs": {"no": 1}}, "chat_template_kwargs: no"),
    ],
)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_what_a_template_refuses_is_named_by_file_row_and_key(
    tmp_path: Path, family: str, record: dict[str, Any], found: str, system: str | None
) -> None:
    template = Template.load(FAMILIES[family].write(tmp_path / "base"))
    uri = write(tmp_path / "rows.jsonl", {"messages": [QUESTION, ANSWER]}, {"id": "second", **record})
    [_, row] = read_rows(uri, need="train")
    with pytest.raises((DataError, BaseModelError), match=f"rows.jsonl row 2: {found}") as caught:
        render_row(row, template, Prompt(system=system if family != "gemma" else None), (), "keep")
    assert caught.value.hint
