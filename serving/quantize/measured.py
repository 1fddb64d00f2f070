"""What one process measures of one precision: the record that it leaves in the run's folder."""

from graftwork.report.quantize_records import PrecisionFacts
from graftwork.report.record import Record
from graftwork.serving.quantize.spec import Precision


class AnswerText(Record):
    """An answer's text. `cut`: the token limit ended it. `error`: the engine failed on it; it counts as wrong."""

    text: str
    cut: bool = False
    error: str | None = None


class MeasuredArm(Record):
    """One arm at one precision."""

    arm: str
    adapter_version: str | None
    nats: float
    """Mean negative log-likelihood of a token of the text."""
    tokens: int
    """Tokens scored."""
    answers: tuple[AnswerText, ...]
    """In the order of the questions."""
    tokens_per_s: dict[int, tuple[float, ...]]
    """Requests at once -> one value a round."""
    merge_loss: float | None
    """What requantising after a merge would lose of the adapter's delta (nf4 with an adapter only)."""


class PrecisionResult(PrecisionFacts):
    """One precision, measured in a process of its own."""

    precision: Precision
    base_digest: str
    material: str
    """`Material.digest`: of the questions, the arms with their adapter versions, and the text."""
    arms: tuple[MeasuredArm, ...]
