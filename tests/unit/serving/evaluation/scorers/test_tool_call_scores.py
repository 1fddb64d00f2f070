"""Scorer `tool_calls`: valid, names, arguments, order, each falling alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from graftwork.datasets.rows import DatasetRow, read_rows
from graftwork.errors import DataError
from graftwork.prompts.render import Message, ToolCall
from graftwork.recipes.airport_tools import tools
from graftwork.serving.evaluation.scorers.load import load_scorers
from graftwork.serving.evaluation.scorers.protocol import ModelReply
from graftwork.serving.evaluation.scorers.tool_calls import ToolCallsSpec

SCORERS = load_scorers([ToolCallsSpec(kind="tool_calls")])
RIGHT: list[dict[str, Any]] = [
    {"name": "airport_by_icao", "arguments": {"icao": "KJFK"}},
    {"name": "search_airport", "arguments": {"name": "Heathrow", "city": "London"}},
]
LONDON = {"name": "search_airport", "arguments": {"city": "London", "name": "Heathrow"}}


def row_of(gold: Any = RIGHT, given: bool = True) -> DatasetRow:
    messages: tuple[Message, ...] = (Message("user", "Which one is higher?"),)
    if not given:
        calls = tuple(ToolCall(call["name"], call["arguments"]) for call in RIGHT)
        messages += (Message("assistant", "", tool_calls=calls),)
    return DatasetRow("r1", messages, gold={"tool_calls": gold} if given else None, tools=tuple(tools()))


def scores(calls: list[Any], row: DatasetRow | None = None) -> list[float]:
    text = "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)
    found = SCORERS.score(ModelReply.to(row or row_of(), text))
    return [found[name] for name in ("call_valid", "call_names", "call_arguments", "call_order")]


@pytest.mark.parametrize("given", [True, False], ids=["gold", "the row's last turn"])
def test_each_score_falls_for_its_own_reason(given: bool) -> None:
    row = row_of(given=given)
    assert scores([RIGHT[0], LONDON], row) == [1, 1, 1, 1], "the order of keys is no difference"
    assert scores([LONDON, RIGHT[0]], row) == [1, 1, 1, 0]
    assert scores([{**RIGHT[0], "arguments": {"icao": "EGLL"}}, LONDON], row) == [1, 1, 0, 0]
    assert scores([{"name": "airport_by_iata", "arguments": {"iata": "JFK"}}, LONDON], row) == [1, 0, 0, 0]
    assert scores([{"name": "airport_by_icao", "arguments": {"icao": 7}}, LONDON], row) == [0, 1, 0, 0]
    assert scores([{"name": "fly", "arguments": {}}], row) == [0, 0, 0, 0]
    assert scores([RIGHT[0]], row) == [1, 0, 0, 0], "one of two"
    assert scores([*RIGHT, RIGHT[0]], row) == [1, 0, 0, 0], "one too many"
    assert scores([], row) == [0, 0, 0, 0]
    assert SCORERS.score(ModelReply.to(row, "<tool_call>\n{'name'")) == dict.fromkeys(SCORERS.failed_scores(), 0)


def test_a_row_without_a_right_call_wants_none() -> None:
    row = row_of([])
    assert [*SCORERS.score(ModelReply.to(row, "It lies in Lagos.")).values()] == [1, 1, 1, 1]
    assert scores(RIGHT, row) == [0, 0, 0, 0]


def test_rows_that_cannot_be_scored_are_refused() -> None:
    for row, found in (
        (DatasetRow("r2", (Message("user", "?"),), gold={"tool_calls": []}), "row 'r2': tools"),
        (DatasetRow("r3", (Message("user", "?"),), gold={"a": 1}, tools=tuple(tools())), "gold.tool_calls"),
        (row_of([{"name": "airport_by_icao"}]), "a call is an object with a name and arguments"),
        (row_of("airport_by_icao"), "a call is an object"),
    ):
        with pytest.raises(DataError, match=found):
            SCORERS.check([row])


def test_the_recipes_rows_are_scored_by_their_own_calls(tmp_path: Path) -> None:
    rows = read_rows("recipe://airport-tools/eval.jsonl", need="eval")
    SCORERS.check(rows)
    sizes = set()
    for row in rows:
        assert row.gold is not None
        sizes.add(len(row.gold["tool_calls"]))
        assert scores(row.gold["tool_calls"], row) == [1, 1, 1, 1]
    assert sizes == {1, 2}
    assert len(rows) == 150


def test_schemas_are_read_before_answers_are_paid_for() -> None:
    wrong = {"type": "function", "function": {"name": "f", "parameters": {"type": "dict", "properties": {}}}}
    row = DatasetRow("r4", (Message("user", "?"),), gold={"tool_calls": []}, tools=(wrong,))
    with pytest.raises(DataError, match="row 'r4': tools: parameters of 'f'"):
        SCORERS.check([row])


def test_degenerate_answers_are_wrong_and_no_error() -> None:
    for text in (
        "[" * 3000,
        "<tool_call>" + '{"name":' * 2000,
        '<tool_call>\n{"name": "f", "arguments": ' + "[" * 3000,
    ):
        assert set(SCORERS.score(ModelReply.to(row_of(), text)).values()) == {0}
