"""Bounds of numbers in a schema: what the grammar accepts satisfies them, with jsonschema as the independent oracle."""

import itertools
import json
import random
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from graftwork.serving.engine.grammar import GrammarError, GrammarText, _definition

LETTERS = [chr(code) for code in range(33, 127)]
Schema = dict[str, Any]
Accepts = Callable[[Schema, str], bool]


@pytest.fixture(scope="module")
def accepts() -> Accepts:
    """Whether the grammar of a schema takes a text whole; one token a character."""
    vocabulary = {"<eos>": 0} | {letter: number + 1 for number, letter in enumerate(LETTERS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    table = LLTokenizer(tokenizer.to_str(), eos_token=0)

    def accepted(schema: Schema, text: str) -> bool:
        matcher = LLMatcher(table, _definition(GrammarText("json_schema", json.dumps(schema))), log_level=0)
        if matcher.is_error():
            return False
        ids = [vocabulary[letter] for letter in text]
        return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())

    return accepted


def near(bounds: list[Decimal]) -> Iterator[str]:
    """Each bound, its neighbours by powers of ten, and other ways to write them."""
    for bound, power, sign in itertools.product([*bounds, Decimal(0)], range(5), (-1, 0, 1)):
        plain = format(bound + sign * Decimal(10) ** -power, "f")
        yield from (plain, f"{plain}0" if "." in plain else f"{plain}.0", plain.rstrip("0").rstrip(".") or "0")
    yield "-0"


def forms(low: Schema, high: Schema) -> list[Schema]:
    """One interval in the ways that a schema can say it."""
    return [
        {"type": "number", **low, **high},
        {"type": "integer", **low, **high},
        {"type": "number", "multipleOf": 0.5, **low, **high},
        {"allOf": [{"type": "number", **low}, high]},
        {"$ref": "#/$defs/low", **high, "$defs": {"low": {"type": "number", **low}}},
        {"type": "number", **low, "anyOf": [high, {"maximum": -1000}]},
        {"type": "number", "allOf": [{"anyOf": [low]}, {"oneOf": [high]}]},
    ]


@pytest.mark.parametrize("seed", range(4))
def test_what_a_grammar_takes_satisfies_the_schema(accepts: Accepts, seed: int) -> None:
    draw, refused, taken = random.Random(seed), 0, 0
    for _ in range(25):
        low = Decimal(draw.choice(["-3", "-2.5", "-1", "-0.5", "0", "0.25", "1", "2", "7.5", "11"]))
        high = low + Decimal(draw.choice(["0.01", "0.1", "0.5", "0.999", "1", "1.5", "3"]))
        lower = {draw.choice(["minimum", "exclusiveMinimum"]): float(low) if "." in str(low) else int(low)}
        upper = {draw.choice(["maximum", "exclusiveMaximum"]): float(high) if "." in str(high) else int(high)}
        schema = draw.choice(forms(lower, upper))
        oracle = jsonschema.Draft202012Validator(json.loads(json.dumps(schema), parse_float=Decimal))
        for text in set(near([low, high])):
            try:
                found = accepts(schema, text)
            except GrammarError:
                refused += 1
                break
            taken += found
            assert not found or oracle.is_valid(json.loads(text, parse_float=Decimal)), (schema, text)
    assert refused <= 15
    assert taken > 100


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        ({"exclusiveMinimum": 0, "maximum": 0.5}, "0"),
        ({"exclusiveMinimum": 2, "exclusiveMaximum": 2.5}, "2"),
        ({"minimum": -0.5, "exclusiveMaximum": 0}, "-0"),
        ({"minimum": -5.5, "exclusiveMaximum": -5}, "-5"),
    ],
)
def test_an_open_end_that_the_library_lets_through_is_refused(accepts: Accepts, bounds: Schema, text: str) -> None:
    for schema in ({"type": "object", "properties": {"x": [*forms(bounds, {})][n]}} for n in (0, 3, 4, 5, 6)):
        with pytest.raises(GrammarError, match="can't be enforced"):
            accepts(schema, text)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        {"type": "number", "exclusiveMinimum": 0, "minimum": 0.1, "maximum": 0.5},
        {"type": "integer", "exclusiveMinimum": 0, "maximum": 0.5 + 1},
        {"type": "number", "exclusiveMinimum": -1, "maximum": -0.5},
        {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "number", "maximum": 0.5}]},
        {"type": "object", "properties": {"low": {"exclusiveMinimum": 0}, "high": {"maximum": 0.5}}},
    ],
)
def test_bounds_that_hold_are_not_refused(schema: Schema) -> None:
    _definition(GrammarText("json_schema", json.dumps(schema)))


def test_many_references_to_many_schemas_end_soon() -> None:
    big = {"allOf": [{"minimum": n} for n in range(5_000)]}
    schema = {"$defs": {"big": big}, "anyOf": [{"items": {"$ref": "#/$defs/big"}} for _ in range(5_000)]}
    with pytest.raises(GrammarError, match="too many schemas"):
        _definition(GrammarText("json_schema", json.dumps(schema)))
