"""What the log of an online experiment said: byte-identical JSON for the same log and rules.

Differences are in the metric's unit, of `log` metrics in that of the logarithm. Instants in Unix seconds (UTC).
"""

from typing import Literal

from graftwork.report.record import Record


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


class OnlineContrast(Record):
    """An arm minus the control. The interval holds at every n at once, so at every look."""

    arm: str
    control: str
    n: int
    estimate: float | None
    low: float
    high: float
    level: float
    e_value: float
    """Largest evidence so far against no difference; 1 / (1 - level) decides."""
    verdict: Literal["better", "worse", "equivalent", "undecided"]
    n_needed: int | None
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
    """What happened to the experiment."""

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
