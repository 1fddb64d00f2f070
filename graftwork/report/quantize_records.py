"""What `quantize` measured: a base at several precisions."""

from graftwork.metrics import Distribution
from graftwork.report.record import Record
from graftwork.report.records import Difference, Score


class PrecisionArm(Record):
    """One arm at one precision."""

    arm: str
    adapter_version: str | None
    perplexity: float
    scores: dict[str, Score]
    cut: int
    """Answers cut by `max_new_tokens`."""
    failed: int
    """Requests that failed; each counts as a wrong answer."""
    tokens_per_s: dict[int, Distribution]
    """Requests at once -> rounds of decoding."""
    merge_loss: float | None
    """Share of the adapter's delta that requantising after a merge would lose (nf4 only)."""


class PrecisionFacts(Record):
    """What was found of a base at one precision, in a process of its own."""

    precision: str
    machine: str
    """CPU, cores and GPUs that the times were taken on."""
    reason: str
    """The dtype and the form of the weights, and why."""
    caveat: str
    """What makes it a poor fit for this machine; empty where nothing does."""
    stored_bytes: int
    """Weights as a file holds them."""
    resident_bytes: int
    """Weights as they lie in memory."""
    predicted_bytes: int | None
    """What `graftwork.memory` predicts for `stored_bytes`; None for shapes that it does not cover."""
    peak_rss_bytes: int
    """Of the whole process: Python, libraries, loading, keys and values, steps."""
    load_s: float


class PrecisionRow(PrecisionFacts):
    """One precision in the report."""

    good_enough: bool
    why: str
    arms: tuple[PrecisionArm, ...]


class QuantizeReport(Record):
    """The result of `quantize`."""

    name: str
    base_digest: str
    reference: str
    metric: str
    margin: float
    min_speed: float
    alpha: float
    seed: int
    n: int
    """Questions."""
    data_fingerprint: str
    text: str
    """What perplexity was taken on, and how."""
    precisions: tuple[PrecisionRow, ...]
    differences: tuple[Difference, ...]
    """Every arm at every other precision (`PRECISION/ARM`) against itself at the reference, for each metric."""
    recommended: str
    sentence: str
    notes: tuple[str, ...]
