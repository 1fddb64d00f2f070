"""Record of a study's result."""

from typing import Literal

from graftwork.report.schema import ArmKind, MetricInfo, Record


class StudyScore(Record):
    """One metric of one arm of a measure, with its interval."""

    arm: str
    kind: ArmKind
    metric: str
    group: str
    """Of the measure's questions; empty for all."""
    value: float
    low: float
    high: float
    level: float
    method: str
    """`wilson` for shares of answers, `bca` for graded metrics, `bca-units` for units of several questions."""
    n: int
    """Independent units."""
    signature: str


class StudyMeasure(Record):
    """All arms on the same questions."""

    name: str
    kind: str
    questions: int
    units: int
    unit: str
    by: str | None
    metrics: tuple[MetricInfo, ...]
    scores: tuple[StudyScore, ...]
    failed: int
    """Requests that failed; each counts as a wrong answer."""
    data_fingerprint: str


class StudyClaim(Record):
    """A published pattern, and arm `a` minus arm `b` here, paired by unit."""

    statement: str
    a: str
    b: str
    metric: str
    measure: str
    of: str | None
    than_of: str | None
    """The value is (a - b within `of`) minus (a - b within this group), unpaired."""
    expect: Literal["higher", "lower", "not lower"]
    value: float
    low: float
    high: float
    level: float
    n: int
    n_than_of: int | None
    test: str
    """`mcnemar-exact`, `sign-flip`, or `welch` for two groups."""
    p_value: float
    p_adjusted: float
    """After Holm over the study's claims."""
    family: int
    detects: float
    """Smallest true difference that is found with 80% power at alpha / family."""
    outcome: Literal["reproduced", "not reproduced", "undecided"]


class StudyAdapter(Record):
    """An adapter that the study trained, or found trained."""

    name: str
    version: str
    method: str
    rows: int
    steps: int
    tokens: int
    loss: float
    """Of the last step, nats a trained token."""


class StudyReport(Record):
    """The result of `study`: byte-identical JSON for the same answers and seed."""

    name: str
    title: str
    paper: str
    deviations: tuple[str, ...]
    base: str
    base_digest: str
    alpha: float
    equivalence_margin: float
    seed: int
    adapters: tuple[StudyAdapter, ...]
    measures: tuple[StudyMeasure, ...]
    claims: tuple[StudyClaim, ...]
    sentence: str
