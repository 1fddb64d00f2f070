"""The built-in rewards: plain functions of an answer and its row. Pure; each may stand in a process pool.

A row that no answer can be held against raises DataError, whatever the answer.
"""

import functools
import json
from collections.abc import Mapping
from typing import Any

from graftwork.answers.exact import GoldText, matches, same_text
from graftwork.answers.fields import field_f1 as f1_of_fields
from graftwork.answers.fields import right_fields
from graftwork.answers.schema import AnswerSchema
from graftwork.answers.text import parse_object
from graftwork.data import DatasetRow
from graftwork.errors import DataError


def json_object(answer: str, row: DatasetRow) -> float:
    """1 where the answer is exactly one JSON object."""
    return float(parse_object(answer) is not None)


def json_schema(answer: str, row: DatasetRow, *, schema: str) -> float:
    """1 where the answer is one JSON object that validates. schema: the JSON text."""
    found = parse_object(answer)
    return float(found is not None and _schema(schema).holds(found))


def form(answer: str, row: DatasetRow) -> float:
    """Share of gold's fields that the answer has with a value of gold's JSON type; 0 where it has other fields."""
    gold, found = _gold(row), parse_object(answer)
    if found is None or not found.keys() <= gold.keys():
        return 0.0
    return sum(name in found and _kind(found[name]) == _kind(value) for name, value in gold.items()) / len(gold)


def field_accuracy(answer: str, row: DatasetRow, *, schema: str | None = None) -> float:
    """Share of gold's fields that the answer has with exactly gold's value; 0 where it does not validate."""
    gold, found = _gold(row), parse_object(answer)
    if found is None or (schema is not None and not _schema(schema).holds(found)):
        return 0.0
    return right_fields(found, gold) / len(gold)


def field_f1(answer: str, row: DatasetRow) -> float:
    """F1 of the answer's fields against gold's."""
    return f1_of_fields(parse_object(answer) or {}, _gold(row))


def exact(answer: str, row: DatasetRow, *, field: str | None = None, ignore_case: bool = False) -> float:
    """1 where the answer is one of the right texts."""
    right = GoldText(field).find_texts(row.gold, row.answer, row.id)
    return float(any(same_text(answer, text, ignore_case=ignore_case) for text in right))


def regex(answer: str, row: DatasetRow, *, pattern: str, whole: bool = True) -> float:
    """1 where the answer, or a part of it, matches."""
    return float(matches(answer, pattern, whole=whole))


def length(answer: str, row: DatasetRow, *, max_chars: int) -> float:
    """0 up to `max_chars`, then falling evenly to -1 at twice as many."""
    return -min(1.0, max(0, len(answer) - max_chars) / max_chars)


def _gold(row: DatasetRow) -> Mapping[str, Any]:
    if not row.gold:
        raise DataError(f"row {row.id!r}: gold", "missing or empty", "this reward holds the answer against an object "
                        "of fields", "add `gold`, or reward by json or json_schema")  # fmt: skip
    return row.gold


def _kind(value: object) -> type:
    return float if isinstance(value, int) and not isinstance(value, bool) else type(value)


@functools.lru_cache(maxsize=16)
def _schema(text: str) -> AnswerSchema:
    return AnswerSchema(json.loads(text))
