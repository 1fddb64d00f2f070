"""When an answer's value, its form and the whole of it are right, whatever the scorers are."""

import json
from dataclasses import dataclass

from graftwork.answers.exact import GoldText, TextMatch
from graftwork.data import DatasetRow
from graftwork.metrics import CONTAINS
from graftwork.serving.experiment.scorers.load import Scorers
from graftwork.serving.experiment.scorers.reply import ModelReply
from graftwork.serving.experiment.scorers.spec import ExactSpec, JsonSchemaSpec, QaSpec, RegexSpec
from graftwork.serving.experiment.spec import CompareSpec

_ALL = 1 - 1e-9


@dataclass(frozen=True)
class Correctness:
    """What of an answer is right."""

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
        """Where the right texts of rows are; None where answers are not texts."""

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
