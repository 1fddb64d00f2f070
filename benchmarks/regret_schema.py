"""Record of "LoRA Without Regret" (Schulman et al. 2025) compared with recorded grids of learning rates."""

from typing import Literal

from graftwork.report.schema import Record
from graftwork.report.sweep_schema import RateRow, RatesRecord


class RatePoint(Record):
    """The loss at the end at one learning rate."""

    rate: float
    mean: float
    low: float
    high: float
    """Lowest and highest of the seeds."""
    n: int
    """Seeds."""


class RateCurve(Record):
    """One rank, or all weights."""

    name: str
    rank: int | None
    """None: all weights are trained."""
    points: tuple[RatePoint, ...]
    best: RateRow
    """By the mean over the seeds."""
    best_by_seed: tuple[float, ...]


class Gap(Record):
    """LoRA minus all weights, each at its best rate, paired by seed."""

    rank: int
    difference: float
    low: float
    high: float
    """95%, Student's t."""
    n: int


class RegretTask(Record):
    """One task's grid."""

    name: str
    steps: int
    rows: int
    """Held-out rows behind each loss."""
    curves: tuple[RateCurve, ...]
    rates: RatesRecord | None
    """Whether the best rate moves with the rank."""
    gaps: tuple[Gap, ...] = ()
    ratio: float | None = None
    """Best rate of LoRA (geometric mean over the ranks) over that of all weights: lowest points of the parabolas."""
    ratio_low: float | None = None
    ratio_high: float | None = None
    """Half a step of each grid around."""


class RegretClaim(Record):
    """A published pattern and whether it shows here."""

    says: str
    task: str
    here: str
    outcome: Literal["reproduced", "not reproduced", "undecided"]


class RegretReport(Record):
    """The table and the plot."""

    published: str
    differs: tuple[str, ...]
    base: str
    tasks: tuple[RegretTask, ...]
    claims: tuple[RegretClaim, ...]
