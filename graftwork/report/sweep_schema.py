"""Schema of the sweep records: trials, key importance, heat map, early stops, Pareto front and finals."""

from collections.abc import Sequence
from typing import Literal

from graftwork.report.schema import Record

Plain = str | int | float | bool | None
SweepState = Literal["pending", "running", "finished", "stopped", "failed"]


class SweepKey(Record):
    """A key of the space. `values` of a choice, else a range."""

    name: str
    values: tuple[Plain, ...] = ()
    low: float | None = None
    high: float | None = None
    log: bool = False

    def holds(self, value: Plain) -> bool:
        """Return whether a value lies in the domain."""
        if self.values or self.low is None or self.high is None:
            return value in self.values
        return isinstance(value, int | float) and self.low <= value <= self.high


class SweepTrial(Record):
    """One trial."""

    id: str
    values: dict[str, Plain]
    losses: tuple[tuple[int, float], ...]
    """(optimizer step, held-out loss) at each report."""
    state: SweepState
    """stopped: by the scheduler, because others did better."""
    wall_s: float | None = None
    started_s: float | None = None
    """On the sweep's clock; None where that is not known."""
    error: str | None = None
    notes: tuple[str, ...] = ()
    metrics: dict[str, float] = {}
    repeat_of: str | None = None
    """The trial of the search that this one repeats with another seed."""

    @property
    def last_loss(self) -> float | None:
        """The last held-out loss."""
        return self.losses[-1][1] if self.losses else None

    @property
    def last_step(self) -> int:
        """The optimizer step of its last report."""
        return self.losses[-1][0] if self.losses else 0

    def loss_at(self, step: int) -> float | None:
        """The held-out loss reported at a step."""
        return dict(self.losses).get(step)


def in_space(keys: Sequence[SweepKey], trial: SweepTrial) -> bool:
    """A value of each key is known: a trial that was bred from others may have other keys."""
    return all(key.holds(trial.values.get(key.name)) for key in keys)


class KeyImportance(Record):
    """Share of the variation of the losses that a key accounts for, alone and together with others."""

    key: str
    value: float
    """Total Sobol index, 0 to 1."""
    low: float
    high: float


class ImportanceRecord(Record):
    """Importance of the keys by a fitted surface. `keys` is empty where the trials tell nothing."""

    step: int
    """Losses are those reported at this step."""
    n: int
    """Trials behind the fit."""
    diverged: int
    """Of them without a finite loss at that step: they count as the worst."""
    terms: int
    """Coefficients of the surface."""
    predicts: float | None
    """Share of the variation of a trial that was left out of the fit which the surface predicts; None: not fitted."""
    p_value: float | None
    """That shuffled losses are predicted as well; None: not fitted."""
    keys: tuple[KeyImportance, ...] = ()
    """The most important first."""
    silent: str | None = None
    """Why nothing can be told."""


class RateRow(Record):
    """One value of the row key: where along the column key the loss is lowest."""

    row: str
    best: float
    """The column's value with the lowest loss."""
    loss: float
    low: float
    """The best value lies between `low` and `high`, half a grid step around, where noise does not hide it."""
    high: float
    edge: Literal["low", "high", ""] = ""
    """The lowest loss stands at an edge of what was tried: the best may lie beyond."""
    vertex: float | None = None
    """Of the parabola through the best and its neighbours on the log axis; None at an edge."""
    n: int
    """Values of the column key behind it."""


class RatesRecord(Record):
    """Movement of the best value of the column key with the row key, such as the learning rate with the rank."""

    row_key: str
    column_key: str
    step: int
    rows: tuple[RateRow, ...]
    grid_step: float
    """Largest ratio between neighbouring values of the column key."""
    moves_by: float
    """Largest of the best values over the smallest."""
    verdict: Literal["hardly moves", "moves", "can't be told"]
    shared: float | None
    """The value that serves all rows best; None where none was tried in all."""
    shared_costs: float | None
    """Largest excess of its loss over that of a row's own best."""


class HeatCell(Record):
    """The trials of one cell."""

    row: int
    column: int
    loss: float | None
    """The lowest at the last step; None: none got there."""
    reached: int
    """The furthest step of its trials."""
    last: float | None
    """The lowest loss there."""
    n: int
    best_of_row: bool = False


class HeatRecord(Record):
    """Two keys, and the lowest loss of each pair of their values."""

    row_key: str
    column_key: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[HeatCell, ...]
    rates: RatesRecord | None = None


class RungRecord(Record):
    """A step at which trials were stopped, and how far the order of the losses there is that at the end."""

    step: int
    stopped: int
    finished: int
    """Trials that ran to their end and reported at this step."""
    tau: float | None
    """Kendall's tau-b between their losses here and at the end; None for fewer than 3."""
    reversed_pairs: int
    pairs: int
    """Pairs of finished trials, and those of them whose order turned until the end."""


class StoppedTrial(Record):
    """Loss that a stopped trial had to make up to win."""

    id: str
    step: int
    gap: float
    """Its loss minus the winner's, at its last step."""
    caught_up: int
    """Finished trials that caught up by as much on the winner from that step to the end."""
    n: int
    """Finished trials but the winner that reported there."""


class StopsRecord(Record):
    """Early stops: what they saved and what they may have lost."""

    stopped: int
    saved_steps: int
    all_steps: int
    """Steps of all trials, had each run to its end (failed ones as far as they came)."""
    saved_s: float | None
    """By the mean pace of the trials; None where no time is known."""
    rungs: tuple[RungRecord, ...]
    closest: tuple[StoppedTrial, ...]
    """Of the stopped trials, those that were closest to the winner."""
    regret: float | None
    """Possible gain of loss had a stopped trial caught up as far as any finished one did; None: unknown."""


class FrontPoint(Record):
    """A trial by several objectives."""

    id: str
    values: tuple[float, ...]
    on_front: bool


class FrontRecord(Record):
    """Trials by several objectives; those on the front are worse than no other in all of them."""

    objectives: tuple[str, ...]
    points: tuple[FrontPoint, ...]


class FinalistRecord(Record):
    """A finalist's runs, one a seed, and its distance from the lowest mean."""

    id: str
    values: dict[str, Plain]
    losses: tuple[float, ...]
    mean: float
    difference: float | None
    """Its mean loss minus the lowest one, paired by seed; None for the lowest itself."""
    low: float | None
    high: float | None
    p_adjusted: float | None
    beaten: bool


class FinalsRecord(Record):
    """The best trials of the search, run again with other seeds."""

    alpha: float
    verdict: str
    """Decision of the finals, with figures."""
    finalists: tuple[FinalistRecord, ...]
    notes: tuple[str, ...] = ()


class SweepRecord(Record):
    """A sweep and its choice."""

    name: str
    trials: tuple[SweepTrial, ...]
    best_id: str | None
    """None where no trial ran to its end."""
    rows: int
    """Held-out rows behind each loss."""
    seed: int = 0
    reused: bool = False
    state: Literal["finished", "interrupted", "failed"] = "finished"
    error: str | None = None
    steps: int = 0
    """Of a trial that is not stopped; 0: not reported."""
    keys: tuple[SweepKey, ...] = ()
    settings: str = ""
    """`--set key=value ...` of the best trial."""
    sampler: str = ""
    rule: str = ""
    scheduler: str = ""
    at_once: int = 1
    cpus: float = 1.0
    """Of a trial."""
    gpus: float = 0.0
    wall_s: float | None = None
    importance: ImportanceRecord | None = None
    heat: HeatRecord | None = None
    stops: StopsRecord | None = None
    front: FrontRecord | None = None
    finals: FinalsRecord | None = None

    def took_s(self, trial: SweepTrial) -> float:
        """Seconds of a trial; of one that was running when the sweep was interrupted, up to then."""
        if trial.state == "running" and trial.started_s is not None and self.wall_s is not None:
            return max(self.wall_s - trial.started_s, 0.0)
        return trial.wall_s or 0.0

    @property
    def best(self) -> SweepTrial | None:
        """The chosen trial."""
        return next((trial for trial in self.trials if trial.id == self.best_id), None)
