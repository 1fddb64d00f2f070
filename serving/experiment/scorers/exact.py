"""Exact match, field F1, and the two forms that need no gold: a JSON schema and a regular expression."""

import unicodedata
from dataclasses import dataclass

import regex

from graftwork.answers.schema import AnswerSchema
from graftwork.answers.text import exactly, parse_object, tokens
from graftwork.data import Row
from graftwork.errors import DataError
from graftwork.metrics import FIELD_F1, Metric
from graftwork.serving.experiment.scorers.reply import GoldText, Reply
from graftwork.serving.experiment.scorers.spec import ExactSpec, RegexSpec

REGEX_TIMEOUT_S = 0.2
"""A pattern that backtracks for longer does not match: an answer may not hold up the endpoint."""


class Exact:
    """1 where the answer is one of the right texts."""

    needs_gold = True

    def __init__(self, spec: ExactSpec) -> None:
        self._gold, self._loose = GoldText(spec.field), spec.ignore_case
        how = "word for word, whatever the case and punctuation" if self._loose else "but for outer whitespace"
        self.metrics = (
            Metric(spec.name, "share of answers", "higher", "binary", f"The answer is a right text, {how}."),
        )

    def check(self, row: Row) -> None:
        self._gold.of(row.gold, row.answer, row.id)

    def score(self, reply: Reply) -> dict[str, float]:
        right = self._gold.of(reply.gold, reply.reference)
        return {self.metrics[0].name: float(any(self._form(reply.text) == self._form(text) for text in right))}

    def _form(self, text: str) -> object:
        return tokens(text) if self._loose else unicodedata.normalize("NFC", text).strip()


class FieldF1:
    """Harmonic mean of the share of the answer's fields that are right and the share of gold's that are found."""

    needs_gold = True
    metrics = (FIELD_F1,)

    def check(self, row: Row) -> None:
        if not row.gold:
            raise DataError(f"row {row.id!r}: gold", "missing or empty", "field_f1 needs an object of fields")

    def score(self, reply: Reply) -> dict[str, float]:
        answer, gold = parse_object(reply.text) or {}, reply.gold or {}
        right = sum(name in answer and exactly(answer[name], value) for name, value in gold.items())
        return {FIELD_F1.name: 2 * right / (len(answer) + len(gold))}


@dataclass(frozen=True)
class FollowsSchema:
    """1 where the answer is one JSON object that validates."""

    name: str
    schema: AnswerSchema
    needs_gold = False

    @property
    def metrics(self) -> tuple[Metric, ...]:
        meaning = "The answer is exactly one JSON object and validates against the schema."
        return (Metric(self.name, "share of answers", "higher", "binary", meaning),)

    def check(self, row: Row) -> None:
        """Any row will do."""

    def score(self, reply: Reply) -> dict[str, float]:
        answer = parse_object(reply.text)
        return {self.name: float(answer is not None and self.schema.holds(answer))}


class Matches:
    """1 where the answer matches a regular expression."""

    needs_gold = False

    def __init__(self, spec: RegexSpec) -> None:
        self._pattern = regex.compile(spec.pattern)
        self._match = self._pattern.fullmatch if spec.whole else self._pattern.search
        where = "The whole answer" if spec.whole else "A part of the answer"
        self.metrics = (
            Metric(spec.name, "share of answers", "higher", "binary", f"{where} matches `{spec.pattern}`."),
        )

    def check(self, row: Row) -> None:
        """Any row will do."""

    def score(self, reply: Reply) -> dict[str, float]:
        try:
            found = self._match(reply.text, timeout=REGEX_TIMEOUT_S) is not None
        except TimeoutError:
            found = False
        return {self.metrics[0].name: float(found)}
