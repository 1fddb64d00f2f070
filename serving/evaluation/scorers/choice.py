"""Scorer `choice`: multiple choice by log probability, without generated text."""

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from graftwork.config import Spec
from graftwork.datasets.rows import DatasetRow
from graftwork.errors import DataError
from graftwork.metrics import Metric
from graftwork.scoring import AnswerSchema
from graftwork.serving.evaluation.scorers.protocol import MetricName, ModelReply, Scorer


class ChoiceSpec(Spec):
    """The likeliest of given options is the right one. Costs a prefill an option, and no decoding."""

    kind: Literal["choice"]
    needs_gold: ClassVar[bool] = True
    name: MetricName = "choice"
    field: str = "answer"
    """Field of gold with the right option's text."""
    options: tuple[str, ...] = ()
    """The options of every row."""
    options_field: str | None = None
    """Field of gold with the row's own options."""
    per_token: bool = True
    """Compare by log probability per token, so that a long option is not the worse for it."""

    @model_validator(mode="after")
    def _has_options(self) -> Self:
        if bool(self.options) == (self.options_field is not None):
            raise ValueError("choice needs options or options_field, one of the two")
        return self

    @property
    def metric_names(self) -> tuple[str, ...]:
        return (self.name,)

    def build(self, schema: AnswerSchema | None) -> Scorer:
        """Return the scorer of this key."""
        return ChoiceScorer(self)


class ChoiceScorer:
    """1 where the right option is the likeliest. Asks the endpoint for likelihoods: see `options`."""

    def __init__(self, spec: ChoiceSpec) -> None:
        self._spec = spec
        how = "per token" if spec.per_token else "as a whole"
        meaning = f"The right option is the likeliest {how}, given the arm's prompt; nothing is generated for it."
        self.metrics = (Metric(spec.name, "share of answers", "higher", "binary", meaning),)

    @property
    def name(self) -> str:
        """Key of its likelihoods in a reply."""
        return self._spec.name

    def check(self, row: DatasetRow) -> None:
        self.right(row)

    def options(self, row: DatasetRow) -> tuple[str, ...]:
        """The texts that are scored. Raises DataError: fewer than two, or one twice."""
        found = (row.gold or {}).get(self._spec.options_field) if self._spec.options_field else self._spec.options
        texts = [str(one) for one in found] if isinstance(found, list | tuple) else []
        if len(texts) < 2 or len(set(texts)) != len(texts) or not all(text.strip() for text in texts):
            raise DataError(
                f"row {row.id!r}: options",
                f"found {found!r}",
                "a choice has two or more different texts",
                "set the scorer's options, or its options_field",
            )
        return tuple(texts)

    def right(self, row: DatasetRow) -> int:
        """Number of the right option. Raises DataError where gold names none."""
        wanted, options = (row.gold or {}).get(self._spec.field), self.options(row)
        if str(wanted) not in options:
            raise DataError(
                f"row {row.id!r}: gold.{self._spec.field}",
                f"found {wanted!r}",
                f"it is one of the options {list(options)}",
                "fix the row",
            )
        return options.index(str(wanted))

    def score(self, reply: ModelReply) -> dict[str, float]:
        scored = reply.likelihoods.get(self.name)
        if scored is None or reply.row is None:
            return {self.name: 0.0}
        return {self.name: float(self._find_likeliest(scored) == self.right(reply.row))}

    def _find_likeliest(self, scored: Sequence[tuple[float, int]]) -> int:
        values = [logprob / max(1, tokens) if self._spec.per_token else logprob for logprob, tokens in scored]
        return values.index(max(values))
