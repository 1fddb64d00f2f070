"""Scorers of text answers: `exact` (equal to a right text), `qa` (SQuAD's scores), `regex` (matches a pattern)."""

from typing import ClassVar, Literal

from graftwork.config import Spec
from graftwork.datasets.rows import DatasetRow
from graftwork.metrics import CONTAINS, EM, F1, Metric
from graftwork.scoring import AnswerSchema, GoldText, Pattern, TextMatch, matches, same_text
from graftwork.serving.evaluation.scorers.protocol import MetricName, ModelReply, ScoreFunction, Scorer


class ExactSpec(Spec):
    """The answer is the gold text."""

    kind: Literal["exact"]
    needs_gold: ClassVar[bool] = True
    name: MetricName = "exact"
    field: str | None = None
    """Field of gold with the right text, or several of them; null takes the last assistant turn, else gold's only
    field."""
    ignore_case: bool = False
    """Compare words alone: case, accents, punctuation and the way a number is written do not count."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        return (self.name,)

    def build(self, schema: AnswerSchema | None) -> Scorer:
        """Return the scorer of this key."""
        return ExactScorer(self)


class ExactScorer:
    """1 where the answer is one of the right texts."""

    def __init__(self, spec: ExactSpec) -> None:
        self._gold, self._loose = GoldText(spec.field), spec.ignore_case
        how = "word for word, whatever the case and punctuation" if self._loose else "but for outer whitespace"
        self.metrics = (
            Metric(spec.name, "share of answers", "higher", "binary", f"The answer is a right text, {how}."),
        )

    @property
    def name(self) -> str:
        """Name of its metric."""
        return self.metrics[0].name

    def compare(self, text: str, row: DatasetRow) -> TextMatch:
        """Compare a text with the row's right texts as the scorer qa does."""
        return TextMatch.compare(text, self._gold.find_texts(row.gold, row.answer, row.id))

    def check(self, row: DatasetRow) -> None:
        self._gold.find_texts(row.gold, row.answer, row.id)

    def score(self, reply: ModelReply) -> dict[str, float]:
        right = self._gold.find_texts(reply.gold, reply.reference)
        found = any(same_text(reply.text, text, ignore_case=self._loose) for text in right)
        return {self.name: float(found)}


class QaSpec(Spec):
    """em, f1, contains: a short text answer against one or more right texts, as SQuAD does it."""

    kind: Literal["qa"]
    needs_gold: ClassVar[bool] = True
    field: str | None = None
    """As for exact: a list in gold gives several right texts, and the best match counts."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        return ("em", "f1", "contains")

    def build(self, schema: AnswerSchema | None) -> Scorer:
        """Return SQuAD's exact match and F1, and containment; the best over the row's right texts."""
        gold = GoldText(self.field)

        def score(reply: ModelReply) -> dict[str, float]:
            found = TextMatch.compare(reply.text, gold.find_texts(reply.gold, reply.reference))
            return {EM.name: float(found.em), F1.name: found.f1, CONTAINS.name: float(found.contains)}

        return ScoreFunction((EM, F1, CONTAINS), score, lambda row: gold.find_texts(row.gold, row.answer, row.id))


class RegexSpec(Spec):
    """The answer matches a regular expression. Needs no gold."""

    kind: Literal["regex"]
    needs_gold: ClassVar[bool] = False
    name: MetricName = "regex"
    pattern: Pattern
    """Python's syntax."""
    whole: bool = True
    """It matches the whole answer, not only somewhere in it."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        return (self.name,)

    def build(self, schema: AnswerSchema | None) -> Scorer:
        """Return 1 where the answer matches."""
        where = "The whole answer" if self.whole else "A part of the answer"
        metric = Metric(self.name, "share of answers", "higher", "binary", f"{where} matches `{self.pattern}`.")
        return ScoreFunction(
            (metric,), lambda reply: {metric.name: float(matches(reply.text, self.pattern, whole=self.whole))}
        )
