"""What a run gained and lost; what more examples bring; what another base brings."""

from typing import Literal

from graftwork.report.record import Record
from graftwork.report.records import MetricInfo, Verdict


class Level(Record):
    """A mean with its interval."""

    value: float
    low: float
    high: float


class PairedTest(Record):
    """One side minus another, paired by question."""

    n: int
    """Independent units: questions, or clusters of them."""
    questions: int
    value: float
    low: float
    high: float
    interval: str
    """`newcombe-10` for shares, `bca` for graded metrics and measures, `cluster-bca` for clusters."""
    test: str
    """`mcnemar-exact`, `sign-flip`, `cluster-sign-flip`."""
    p_value: float
    detects: float
    """Smallest true difference that n units find with 80% power."""


class Change(Record):
    """One metric of a part, the base before and the trained model after."""

    part: str
    group: str
    """Of the part's questions; empty for all."""
    metric: str
    before: Level
    after: Level
    test: PairedTest
    """After minus before."""
    p_adjusted: float | None
    """Holm over the `family`. None: shown beside, without a verdict."""
    verdict: Verdict | None
    signature: str


class GeneratedText(Record):
    """What was written to one prompt."""

    part: str
    prompt: str
    before: str
    after: str
    held_before: bool
    held_after: bool


class OutcomesReport(Record):
    """A run's outcomes."""

    alpha: float
    family: int
    changes: tuple[Change, ...]
    metrics: tuple[MetricInfo, ...]
    written: tuple[GeneratedText, ...]
    """The answers to instructions and held-out rows that changed from right to wrong or back, some of each."""
    notes: tuple[str, ...] = ()


class CurvePoint(Record):
    """One run on the first so many rows."""

    rows: int
    run_id: str
    adapter: str
    reused: bool
    loss: Level
    """Held-out nats a token of the right answers, mean over the questions."""
    score: Level
    steps: int


class CurveStep(Record):
    """From one size to the next."""

    rows: int
    before: int
    loss: PairedTest
    score: PairedTest
    p_adjusted: float
    """Of the loss; Holm over the steps."""
    verdict: Verdict


class CurveReport(Record):
    """Sample efficiency: metric and held-out loss against examples."""

    name: str
    metric: str
    alpha: float
    n: int
    """Held-out questions."""
    points: tuple[CurvePoint, ...]
    steps: tuple[CurveStep, ...]
    sentence: str
    signature: str


class Rebased(Record):
    """One task on the old base and on the new one."""

    alias: str
    metric: str
    old_adapter: str
    new_adapter: str
    old: Level
    new: Level
    test: PairedTest
    """New minus old."""
    p_adjusted: float
    """Benjamini-Hochberg over the tasks."""
    outcome: Literal["gains", "loses", "undecided"]
    reused: bool
    """The new run had been trained before."""
    promote: str
    """The command that moves the alias."""
    signature: str


class RebaseReport(Record):
    """Every task side by side. Nothing is promoted."""

    old_bases: tuple[str, ...]
    new_base: str
    alpha: float
    tasks: tuple[Rebased, ...]
    metrics: tuple[MetricInfo, ...]
    sentence: str
