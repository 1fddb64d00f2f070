"""Report records of evaluations before and after training, live experiments, rebases and quantization runs."""

from typing import Literal

from graftwork.metrics import Distribution
from graftwork.report.schema import Difference, MetricInfo, Record, Score, Verdict

# Live experiments: byte-identical JSON for the same log and rules.
#
# Differences are in the metric's unit, of `log` metrics in that of the logarithm. Instants in Unix seconds (UTC).


class OnlineArm(Record):
    """One arm. A unit (user, session or request) counts once, with the arm of its first assignment."""

    name: str
    weight: float | None
    """Planned at the end; None in a shadow, where every arm answers every request."""
    units: int
    """Units assigned to it."""
    counted: int
    """Units whose outcome is fixed, and that of all units assigned before them."""
    scored: int
    """Counted units with a score of their own."""
    mean: float | None
    """Plain mean over counted units. Contrasts are weighted by chances and are not differences of these means."""
    answers: int
    """Answers, those of one unit within ten minutes once."""
    errors: int
    cut: bool
    signature: str


class OnlinePoint(Record):
    """The evidence after n units."""

    n: int
    estimate: float
    low: float
    high: float


class ContrastState(Record):
    """An arm minus the control. The interval holds at every n at once, so at every look."""

    arm: str
    control: str
    n: int
    """Units (or pairs, in a shadow) that tell about it."""
    estimate: float | None
    low: float
    high: float
    """Confidence sequence at `level`."""
    level: float
    e_value: float
    """Largest evidence so far against no difference; 1 / (1 - level) decides."""
    verdict: Verdict
    """On the arm against the control. `undecided` while anything blocks conclusions."""
    n_needed: int | None
    """Units that would decide, when undecided."""


class OnlineContrast(ContrastState):
    """A contrast with its history."""

    sentence: str
    path: tuple[OnlinePoint, ...]
    """At about 4 % steps of n."""
    signature: str


class OnlineGuardrail(Record):
    """One bound on one arm."""

    arm: str
    kind: str
    says: str
    """The bound in words."""
    n: int
    value: float | None
    limit: float
    e_value: float
    bound: float
    """The e-value that cuts."""
    broken_at: int | None
    signature: str


class OnlineEvent(Record):
    """Events of the experiment."""

    at: float
    event: str
    detail: str


class ExperimentReport(Record):
    """The verdict on an online experiment."""

    name: str
    mode: Literal["split", "shadow"]
    metric: str
    kind: Literal["bounded", "unbounded", "log"]
    better: Literal["higher", "lower"]
    control: str
    alpha: float
    margin: float
    window_s: float
    deadline_s: float
    rows: int
    first_at: float | None
    last_at: float | None
    arms: tuple[OnlineArm, ...]
    contrasts: tuple[OnlineContrast, ...]
    guardrails: tuple[OnlineGuardrail, ...]
    srm_e_value: float
    srm_bound: float
    blocked: str | None
    """Why no conclusion may be drawn."""
    cut: tuple[str, ...]
    left_out: dict[str, int]
    """Rows that count for nothing, by reason."""
    events: tuple[OnlineEvent, ...]
    notes: tuple[str, ...]
    sentence: str


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
    """Texts written to one prompt."""

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
    """One run on the first N rows."""

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


# Quantization: a base at several precisions.


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
    """Measurements of a base at one precision, in a process of its own."""

    precision: str
    machine: str
    """CPU, cores and GPUs that the times were taken on."""
    reason: str
    """The dtype and the form of the weights, and why."""
    caveat: str
    """Reason why it fits this machine badly; empty where there is none."""
    stored_bytes: int
    """Weights as a file holds them."""
    resident_bytes: int
    """Weights as they lie in memory."""
    predicted_bytes: int | None
    """Prediction of `graftwork.planning.memory` for `stored_bytes`; None for shapes that it does not cover."""
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
    """Text of the perplexity, and its windows."""
    precisions: tuple[PrecisionRow, ...]
    differences: tuple[Difference, ...]
    """Every arm at every other precision (`PRECISION/ARM`) against itself at the reference, for each metric."""
    recommended: str
    sentence: str
    notes: tuple[str, ...]
