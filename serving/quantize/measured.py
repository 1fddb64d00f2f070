"""What one process measures of one precision: the record that it leaves in the run's folder."""

from pydantic import BaseModel, ConfigDict

from graftwork.serving.quantize.spec import Precision


class Measurement(BaseModel):
    """Base of these records: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Said(Measurement):
    """An answer's text. `cut`: the token limit ended it. `error`: the engine failed on it; it counts as wrong."""

    text: str
    cut: bool = False
    error: str | None = None


class MeasuredArm(Measurement):
    """One arm at one precision."""

    arm: str
    adapter_version: str | None
    nats: float
    """Mean negative log-likelihood of a token of the text."""
    tokens: int
    """Tokens scored."""
    answers: tuple[Said, ...]
    """In the order of the questions."""
    tokens_per_s: dict[int, tuple[float, ...]]
    """Requests at once -> one value a round."""
    merge_loss: float | None
    """What requantising after a merge would lose of the adapter's delta (nf4 with an adapter only)."""


class Measured(Measurement):
    """One precision, measured in a process of its own."""

    precision: Precision
    base_digest: str
    material: str
    """`Material.digest`: of the questions, the arms with their adapter versions, and the text."""
    machine: str
    """CPU, cores and GPUs that the times were taken on."""
    reason: str
    """The dtype and the form of the weights, and why."""
    caveat: str
    """What makes this precision a poor fit for this machine; empty where nothing does."""
    stored_bytes: int
    resident_bytes: int
    predicted_bytes: int | None
    """What `graftwork.memory` predicts for `stored_bytes`; None for shapes that it does not cover."""
    peak_rss_bytes: int
    """Of the whole process: Python, libraries, loading, keys and values, steps."""
    load_s: float
    arms: tuple[MeasuredArm, ...]
