"""When an answer's value, its form and the whole of it are right, whatever the scorers are."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from graftwork.data import Row
from graftwork.serving.experiment.scorers.load import Scorers
from graftwork.serving.experiment.scorers.reply import Reply
from graftwork.serving.experiment.scorers.spec import JsonSchemaSpec, RegexSpec
from graftwork.serving.experiment.spec import CompareSpec

_ALL = 1 - 1e-9


@dataclass(frozen=True)
class Right:
    """What of an answer is right."""

    form: bool
    value: bool
    whole: bool


class Judge:
    """With the scorer `fields`: form, all facts, both. Else: the schemas and patterns, and a full primary score."""

    def __init__(self, spec: CompareSpec, scorers: Scorers, primary: str) -> None:
        self._scorers, self._primary = scorers, primary
        names = {metric.name for metric in scorers.metrics}
        self._fields = {"form", "facts", "both"} <= names and primary in ("form", "facts", "both", "field_accuracy")
        self._forms = [one.name for one in spec.scorers if isinstance(one, JsonSchemaSpec | RegexSpec)]

    def of(self, row: Row, text: str) -> Right:
        """Scores a text as an answer to a row."""
        return self.read(self._scorers.score(Reply.to(row, text)))

    def read(self, scores: Mapping[str, float]) -> Right:
        """From scores that are known."""
        if self._fields:
            return Right(scores["form"] == 1, scores["facts"] >= _ALL, scores["both"] == 1)
        form = all(scores[name] == 1 for name in self._forms if name != self._primary)
        value = scores[self._primary] >= _ALL
        return Right(form, value, form and value)


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
