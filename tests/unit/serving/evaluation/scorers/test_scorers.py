"""What counts as form, as facts and as both."""

import json
from pathlib import Path
from typing import Any

import pytest

from graftwork.datasets.rows import DatasetRow
from graftwork.errors import ConfigError, DataError
from graftwork.prompts.render import Message
from graftwork.scoring import AnswerSchema, GoldAnswer, exactly, parse_object, score, tokens

GOLD = {"icao": "KMIA", "iata": "MIA", "name": "Miami International Airport", "city": "São Paulo", "elevation_ft": 1026}
SCHEMA = AnswerSchema(
    {
        "type": "object",
        "additionalProperties": False,
        "required": list(GOLD),
        "properties": {name: {"type": "number" if name == "elevation_ft" else "string"} for name in GOLD},
    }
)
KEY = GoldAnswer(GOLD, frozenset({"icao"}))


def answer(**changes: Any) -> str:
    return json.dumps({**GOLD, **changes}, ensure_ascii=False)


def test_the_gold_answer_is_wholly_right() -> None:
    for text in (answer(), f" \n{answer()}\t", json.dumps(GOLD, indent=2), answer(elevation_ft=1026.0)):
        found = score(text, KEY, SCHEMA)
        assert (found.form, found.facts, found.both, found.field_accuracy) == (1, 1, 1, 1)


@pytest.mark.parametrize(
    "text",
    [
        f"```json\n{answer()}\n```",
        f"Here is the card: {answer()}",
        f"{answer()} Anything else?",
        f"{answer()}{answer()}",
        f"[{answer()}]",
        answer()[:-1],
        answer().replace('"', "'"),
        answer().replace("}", ', "icao": "KMIA"}'),
        '"KMIA"',
        "null",
        "",
        "[" * 100_000,
    ],
)
def test_form_wants_exactly_one_object(text: str) -> None:
    found = score(text, KEY, SCHEMA)
    assert (found.form, found.both, found.field_accuracy) == (0, 0, 0)
    assert parse_object(text) is None


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_what_only_python_calls_json_is_none(constant: str) -> None:
    assert parse_object(f'{{"elevation_ft": {constant}}}') is None


def test_an_object_outside_the_schema_has_facts_but_no_form() -> None:
    found = score(answer(runway="08L"), KEY, SCHEMA)
    assert (found.form, found.facts, found.both, found.field_accuracy, found.is_json) == (0, 1, 0, 0, True)


def test_one_wrong_field_costs_both_and_its_share() -> None:
    found = score(answer(city="Rio"), KEY, SCHEMA)
    assert (found.form, found.facts, found.both) == (1, 0.75, 0)
    assert found.field_accuracy == pytest.approx(4 / 5)


def test_both_is_exact_where_facts_are_lenient() -> None:
    found = score(answer(city="sao paulo"), KEY, SCHEMA)
    assert (found.facts, found.both) == (1, 0)


def test_the_field_that_the_question_gives_away_is_no_fact() -> None:
    assert score('{"icao": "KMIA"}', KEY, SCHEMA).facts == 0
    assert score("The ICAO code is KMIA.", KEY, SCHEMA).facts == 0


def test_a_value_at_the_wrong_key_is_no_fact_in_an_object() -> None:
    assert score('{"city": "MIA", "iata": "Sao Paulo"}', KEY, SCHEMA).facts == 0


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("It is Miami International Airport (MIA), São Paulo, at 1,026 ft.", 1.0),
        ("miami INTERNATIONAL airport; sao paulo; mia; 1026ft", 1.0),
        ("Miami Airport", 0.0),
        ("MIAMI is at 10260 ft", 0.0),
        ("Elevation: 1026.0", 0.25),
        ("-1026 or 1026.5 ft", 0.0),
        ("International Miami Airport", 0.0),
    ],
)
def test_prose_is_searched_for_whole_tokens(text: str, facts: float) -> None:
    assert score(text, KEY, SCHEMA).facts == facts


def test_tokens_are_comparable() -> None:
    assert tokens("Ōsaka O'Hare 2,459ft v120.0.6099 13.0 -3") == (
        "osaka",
        "o",
        "hare",
        "2459",
        "ft",
        "v120.0.6099",
        "13",
        "-3",
    )


@pytest.mark.parametrize(
    ("found", "gold", "equal"),
    [
        ("a ", "a", True),
        ("A", "a", False),
        ("e\u0301", "é", True),
        (13.0, 13, True),
        ("13", 13, False),
        (True, 1, False),
        (None, None, True),
        ([1, 2], [1, 2], True),
        ({"a": 1}, {"a": 2}, False),
    ],
)
def test_exactly(found: object, gold: object, equal: bool) -> None:
    assert exactly(found, gold) is equal


def test_null_gold_is_nothing_to_find_but_must_be_null() -> None:
    gold = {"icao": "KMIA", "iata": None, "city": "Miami"}
    key, schema = GoldAnswer(gold, frozenset({"icao"})), AnswerSchema({"type": "object"})
    assert key.wanted == ("city",)
    assert score(json.dumps(gold), key, schema).both == 1
    assert score(json.dumps({**gold, "iata": "XXX"}), key, schema).both == 0


def test_nested_gold_is_found_leaf_by_leaf() -> None:
    key = GoldAnswer({"os": {"name": "Android", "version": "14"}, "tags": ["mobile", "tablet"]}, frozenset())
    schema = AnswerSchema({"type": "object"})
    assert score("An Android 14 tablet, mobile", key, schema).facts == 1
    assert score("Android, mobile and tablet", key, schema).facts == 0.5
    assert score('{"os": {"version": "14", "name": "android"}}', key, schema).facts == 0.5


def row(gold: dict[str, Any] | None, asked: tuple[str, ...] = ()) -> DatasetRow:
    return DatasetRow("r1", (Message("user", "?"),), gold=gold, given_fields=asked)


def test_a_row_without_gold_is_refused() -> None:
    with pytest.raises(DataError, match=r"row 'r1': gold: missing or empty"):
        GoldAnswer.from_row(row(None))


def test_a_row_with_nothing_to_find_is_refused() -> None:
    with pytest.raises(DataError, match="every field is null or given away"):
        GoldAnswer.from_row(row({"icao": "KMIA", "iata": None}, asked=("icao",)))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"type": 3}, "it is no JSON schema"),
        ({"$ref": "http://127.0.0.1:9/other.json"}, "nothing is fetched"),
        ({"properties": {"a": {"$ref": "#/$defs/missing"}}}, "which is not in it"),
    ],
)
def test_a_schema_that_cannot_stand_alone_is_refused(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AnswerSchema(tree)


def test_a_schema_may_refer_to_itself() -> None:
    schema = AnswerSchema({"$defs": {"n": {"type": "integer"}}, "properties": {"a": {"$ref": "#/$defs/n"}}})
    assert schema.holds({"a": 1})
    assert not schema.holds({"a": "1"})


def test_a_schema_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text('{"type": "object", "required": ["a"]}')
    assert not AnswerSchema.load(str(path)).holds({})
    path.write_text("{")
    with pytest.raises(ConfigError, match="it is not JSON"):
        AnswerSchema.load(str(path))
