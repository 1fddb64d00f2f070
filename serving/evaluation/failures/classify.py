"""Classification of failed answers by cause, and correctness of value and form under any scorers."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from graftwork import stats
from graftwork.datasets.rows import DatasetRow
from graftwork.metrics import CONTAINS, signature
from graftwork.report.schema import Share
from graftwork.scoring import GoldText, TextMatch
from graftwork.serving.evaluation.scorers.json_answer import JsonSchemaSpec
from graftwork.serving.evaluation.scorers.load import Scorers
from graftwork.serving.evaluation.scorers.protocol import ModelReply
from graftwork.serving.evaluation.scorers.text_match import ExactSpec, QaSpec, RegexSpec
from graftwork.serving.evaluation.spec import CompareSpec

# Rule from the probes of one failed answer to its causes.
#
# | value | context | the probes say | cause |
# |---|---|---|---|
# | right | any | form or style is wrong | form |
# | wrong | gold passage was in it | right with the gold passage alone, or known without any context | distraction |
# | wrong | gold passage was in it | wrong with the gold passage alone as well | use of context |
# | wrong | none, or without gold | the same question was right before the adapter | forgetting |
# | wrong | none | right with the gold passage | information |
# | wrong | without gold | right with the gold passage | retrieval |
# | wrong | without gold | wrong even with the gold passage, known without context | distraction |
# | wrong | none, or without gold | wrong even with the gold passage | use of context |
#
# A wrong value in a wrong form has two causes, the value's and form. What cannot be probed (no gold passage known) is
# `unknown`, never guessed.


Cause = Literal["retrieval", "information", "form", "use_of_context", "distraction", "forgetting", "unknown"]
CAUSES: tuple[Cause, ...] = get_args(Cause)


@dataclass(frozen=True)
class ProbeEvidence:
    """Of one failed answer. None: not probed, or the probe failed."""

    form_right: bool | None
    """None: no scorer tells it from the value."""
    value_right: bool
    """Every fact asked for is in the answer, whatever its form."""
    retrieves: bool
    """The arm has a retriever."""
    gold_retrieved: bool | None = None
    """The gold passage was among those in the prompt."""
    oracle_right: bool | None = None
    """The value is right when the gold passage is the only context."""
    grammar_right: bool | None = None
    """Wholly right once repaired, or under the answer's grammar (with the gold passage where the value was wrong)."""
    closed_book: bool | None = None
    """Without context the gold answer is likelier than every distractor."""
    right_before: bool | None = None
    """The base without the adapter had the value right."""


def classify(found: ProbeEvidence) -> tuple[Cause, ...]:
    """The value's cause, if it is wrong, and `form`, if it is what else is wrong."""
    value = () if found.value_right else (_why_wrong(found),)
    return (*value, "form") if found.value_right or found.form_right is False else value


def _why_wrong(found: ProbeEvidence) -> Cause:
    if found.retrieves and found.gold_retrieved:
        return "distraction" if found.oracle_right or found.closed_book else "use_of_context"
    if found.right_before:
        return "forgetting"
    if found.oracle_right:
        return "retrieval" if found.retrieves else "information"
    if found.retrieves and found.closed_book:
        return "distraction"
    return "unknown" if found.oracle_right is None else "use_of_context"


_ALL = 1 - 1e-9


@dataclass(frozen=True)
class Correctness:
    """Correctness of an answer: form, value, and both."""

    form: bool | None
    """None: it cannot be told apart from the value."""
    value: bool
    whole: bool


class CorrectnessCheck:
    """Form and facts of an answer, by the scorers of the spec.

    | scorer of the primary metric | facts (`value`) | form |
    |---|---|---|
    | fields | every wanted field | one JSON object that the schema allows |
    | qa, exact | the answer contains a right text (`TextMatch`) | it has a full score; not known without the facts |
    | another | a full score | not known |

    The primary metric `contains` needs the facts alone. A scorer json_schema or regex adds its check to the form.
    """

    def __init__(self, spec: CompareSpec, scorers: Scorers, primary: str) -> None:
        self._scorers, self.primary = scorers, primary
        names = {metric.name for metric in scorers.metrics}
        self._fields = {"form", "facts", "both"} <= names and primary in ("form", "facts", "both", "field_accuracy")
        self._forms = [
            one.name for one in spec.scorers if isinstance(one, JsonSchemaSpec | RegexSpec) and one.name != primary
        ]
        texts = [one for one in spec.scorers if isinstance(one, QaSpec | ExactSpec) and primary in one.metric_names]
        self.references = GoldText(texts[0].field) if texts else None
        """Location of the right texts of rows; None where answers are not texts."""

    @property
    def splits(self) -> bool:
        """The scorers tell a wrong form from wrong facts."""
        return self._fields or bool(self._forms) or (self.references is not None and self.primary != CONTAINS.name)

    def check(self, row: DatasetRow, text: str) -> Correctness:
        """Scores a text as an answer to a row."""
        scores = self._scorers.score(ModelReply.to(row, text))
        if self._fields:
            return Correctness(scores["form"] == 1, scores["facts"] >= _ALL, scores["both"] == 1)
        full = scores[self.primary] >= _ALL
        value = full or (
            self.references is not None
            and TextMatch.compare(text, self.references.find_texts(row.gold, row.answer)).contains
        )
        form = True if full else None
        if self._forms:
            form = all(scores[name] == 1 for name in self._forms)
        if value and not full:
            form = False
        return Correctness(form, value, full and bool(form))


def repaired(text: str) -> str | None:
    """The first whole JSON object in a text, without what stands around it (a code fence, prose); None: there is none.

    Nothing is guessed: quotes, commas and cut ends stay as they are.
    """
    start = text.find("{")
    if start < 0:
        return None
    try:
        _, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return text[start:end]


# Shares of failures with their intervals, and the questions that an open share needs.


State = Literal["matters", "dismissed", "open"]
_MOST = 1_000_000


def share(name: str, count: int, n: int, alpha: float, recipe: Mapping[str, object]) -> Share:
    """`count` of at least one."""
    found = stats.wilson(count, n, alpha)
    signed = signature(name, n, {**recipe, "ci": "wilson", "alpha": f"{alpha:g}"})
    return Share(count=count, n=n, value=count / n, low=found.low, high=found.high, signature=signed)


def state(found: Share, limit: float) -> State:
    """Return whether the share is shown to be at least the limit, or below it."""
    if found.low >= limit:
        return "matters"
    return "dismissed" if found.high < limit else "open"


def n_to_settle(value: float, limit: float, alpha: float) -> int | None:
    """Failures at which a share like this one lies wholly on one side of the limit. None: it is too near for that."""
    low, high = 1, 2
    while not _is_decided(value, high, limit, alpha):
        low, high = high, 2 * high
        if high > _MOST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _is_decided(value, middle, limit, alpha) else (middle, high)
    return high


def _is_decided(value: float, n: int, limit: float, alpha: float) -> bool:
    found = stats.wilson(math.floor(value * n + 0.5), n, alpha)
    return found.low >= limit or found.high < limit
