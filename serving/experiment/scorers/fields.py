"""form, facts, both and field_accuracy as a scorer."""

from graftwork.answers.fields import GoldAnswer, score
from graftwork.answers.schema import AnswerSchema
from graftwork.data import DatasetRow
from graftwork.metrics import SCORES
from graftwork.serving.experiment.scorers.reply import ModelReply


class FieldsScorer:
    """Holds an answer against its row's gold object."""

    needs_gold = True
    metrics = SCORES

    def __init__(self, schema: AnswerSchema) -> None:
        self._schema = schema

    def check(self, row: DatasetRow) -> None:
        GoldAnswer.from_row(row)

    def score(self, reply: ModelReply) -> dict[str, float]:
        found = score(reply.text, GoldAnswer(reply.gold or {}, frozenset(reply.given_fields)), self._schema)
        return {metric.name: getattr(found, metric.name) for metric in SCORES}
