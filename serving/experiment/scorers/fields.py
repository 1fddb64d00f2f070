"""form, facts, both and field_accuracy as a scorer."""

from graftwork.answers.fields import Key, score
from graftwork.answers.schema import AnswerSchema
from graftwork.data import Row
from graftwork.metrics import SCORES
from graftwork.serving.experiment.scorers.reply import Reply


class Fields:
    """Holds an answer against its row's gold object."""

    needs_gold = True
    metrics = SCORES

    def __init__(self, schema: AnswerSchema) -> None:
        self._schema = schema

    def check(self, row: Row) -> None:
        Key.of(row)

    def score(self, reply: Reply) -> dict[str, float]:
        found = score(reply.text, Key(reply.gold or {}, frozenset(reply.given_fields)), self._schema)
        return {metric.name: getattr(found, metric.name) for metric in SCORES}
