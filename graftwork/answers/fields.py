"""Answers against a gold object: `form`, `facts`, `both`, `field_accuracy`, each within 0..1. No judge, no network.

Facts are looked for at their key when the answer is a JSON object, else anywhere in the text. Looking anywhere flatters
arms that answer in prose: a number may stand there for another reason. So `facts` compares what arms know, and only
`both` says whether an answer can be used.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from graftwork.answers.schema import AnswerSchema
from graftwork.answers.text import exactly, leaves, parse_object, tokens
from graftwork.data import DatasetRow
from graftwork.errors import DataError

EMPTY: tuple[object, ...] = (None, "", [], {})
"""Gold values with nothing to be found: `facts` leaves them out, for a text that lacks a value says nothing of it."""


@dataclass(frozen=True)
class FieldScores:
    """One answer, scored."""

    form: float
    facts: float
    both: float
    field_accuracy: float
    is_json: bool
    """The answer is one JSON object, valid against the schema or not."""


@dataclass(frozen=True)
class GoldAnswer:
    """The gold answer of one question. `given` are the fields that the question itself gives away."""

    gold: Mapping[str, Any]
    given: frozenset[str]

    @classmethod
    def from_row(cls, row: DatasetRow) -> "GoldAnswer":
        """From an evaluation row. Raises DataError where there is nothing to be found."""
        if not row.gold:
            raise DataError(f"row {row.id!r}: gold", "missing or empty", "a compared row has a gold object of fields")
        key = cls(row.gold, frozenset(row.given_fields))
        if not key.wanted:
            found = f"every field is null or given away by the question (given_fields: {sorted(key.given)})"
            raise DataError(f"row {row.id!r}: gold", found, "facts need at least one field to be found")
        return key

    @cached_property
    def wanted(self) -> tuple[str, ...]:
        """Fields whose value is to be found: neither given away nor null or empty."""
        return tuple(name for name, value in self.gold.items() if name not in self.given and value not in EMPTY)


def score(text: str, key: GoldAnswer, schema: AnswerSchema | None) -> FieldScores:
    """The scores of one answer. An answer that is not one JSON object fails form, both and field_accuracy.

    Without a schema any JSON object has the right form.
    """
    answer = parse_object(text)
    form = answer is not None and (schema is None or schema.holds(answer))
    right = right_fields(answer or {}, key.gold)
    accuracy = right / len(key.gold) if form else 0.0
    return FieldScores(
        float(form), _facts(text, answer, key), float(form and right == len(key.gold)), accuracy, answer is not None
    )


def _facts(text: str, answer: Mapping[str, Any] | None, key: GoldAnswer) -> float:
    if answer is not None:
        found = sum(_same_tokens(answer.get(name), key.gold[name]) for name in key.wanted)
    else:
        words = tokens(text)
        found = sum(all(_within(tokens(leaf), words) for leaf in leaves(key.gold[name])) for name in key.wanted)
    return found / len(key.wanted)


def _same_tokens(found: object, gold: object) -> bool:
    return [tokens(leaf) for leaf in leaves(found)] == [tokens(leaf) for leaf in leaves(gold)]


def _within(part: Sequence[str], whole: Sequence[str]) -> bool:
    """Whether the tokens stand in the text, next to each other and in order."""
    n = len(part)
    return n > 0 and any(tuple(whole[i : i + n]) == tuple(part) for i in range(len(whole) - n + 1))


def right_fields(answer: Mapping[str, Any], gold: Mapping[str, Any]) -> int:
    """How many fields of gold the answer has with exactly gold's value."""
    return sum(name in answer and exactly(answer[name], value) for name, value in gold.items())


def field_f1(answer: Mapping[str, Any], gold: Mapping[str, Any]) -> float:
    """Harmonic mean of the share of the answer's fields that are right and the share of gold's that are found."""
    return 2 * right_fields(answer, gold) / (len(answer) + len(gold))
