"""Simulate splits whose arms differ in latency, from log rows through the monitor's own `Units` and sequential tests.

One unit is drawn each second. Rows are in the order of writing and end with the last draw, as in the log of a running
experiment, so units in flight at the end have no outcome. `Units` turns each run's rows into observations; the tests
then take all runs at once, as in `online_runs`. The peer takes the same units in the order in which their scores come.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.online_runs import NEVER, Followed, Stops, first, share
from graftwork.serving.experiment.online.log_columns import LogColumns
from graftwork.serving.experiment.online.rules import OnlineRules
from graftwork.serving.experiment.online.units import Units
from graftwork.stats import Floats
from graftwork.stats.aipw import SplitScores
from graftwork.stats.sample_ratio import SampleRatio

_STEP = 100
_SRM_BOUND = 1000.0
_LAST = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Slow:
    """A split of two arms on a score of 0 or 1, one of which answers later."""

    ratio: float
    """Latency of the treated arm, to the control's."""
    in_flight: float
    """Units in flight, on average."""
    chance: float = 0.5
    treated: float = 0.9
    control: float = 0.9
    units: int = 1000
    failed: float = 0.0
    """Share of answers that fail, after their latency."""
    lost: float = 0.0
    """Share of answers that never come."""
    rated: float | None = None
    """Share of units that get feedback, within 0..50 s of a control's answer, 50..300 s of a treated one's. None: the
    score comes with the answer."""

    @property
    def name(self) -> str:
        """The case in a few words."""
        other = [f"{self.chance:g} treated"] * (self.chance != 0.5)
        other += [f"{self.failed:.0%} fail, {self.lost:.0%} lost"] * (self.failed + self.lost > 0)
        other += [] if self.rated is None else [f"feedback for {self.rated:.0%}"]
        return ", ".join([f"latency 1 to {self.ratio:g}, {self.in_flight:g} in flight", *other])

    @property
    def latencies_s(self) -> tuple[float, float]:
        """Means of the control and the treated arm."""
        control = self.in_flight / (self.chance * self.ratio + 1 - self.chance)
        return control, control * self.ratio

    @property
    def rules(self) -> OnlineRules:
        """A deadline beyond nearly every answer and all feedback after it."""
        deadline = 2 * max(self.latencies_s) + (300 if self.rated is not None else 0)
        weights = {"base": 1 - self.chance, "rag": self.chance}
        return OnlineRules(("base", "rag"), "base", "right", weights, deadline_s=deadline)


@dataclass
class Alarms:
    """First unit of each run at which a test crossed its bound: entered by draws, and as their scores come."""

    found: Stops
    """The arms differ."""
    split: Stops
    """Units, or those with a score, do not fall to the arms as planned."""
    found_as_scored: Stops
    split_as_scored: Stops
    steps: int


def latency_runs(case: Slow, runs: int, seed: int) -> Alarms:
    """Follow some runs of one case."""
    rng = np.random.default_rng(seed)
    drawn: list[Observed] = []
    counted: list[Observed] = []
    as_scored: list[Observed] = []
    for _ in range(runs):
        one, rows = log_of(case, rng)
        entered = Units(case.rules).read(rows)
        drawn.append(Observed(np.array(entered.ratio_arm) == 1, np.zeros(0)))
        scored = np.array(entered.scored, dtype=np.bool_)
        counted.append(Observed(np.array(entered.arm) == 1, np.array(entered.score), scored))
        as_scored.append(one)
    whole = min(len(one.treated) for one in counted)
    with_score = [Observed(one.treated[one.scored], one.outcomes[one.scored]) for one in counted]
    split = np.minimum(_ratio(case, drawn), _ratio(case, with_score))
    return Alarms(_found(case, counted), split, _found(case, as_scored), _ratio(case, as_scored), whole)


class Observed:
    """Units of one run in the order in which they enter."""

    def __init__(self, treated: NDArray[np.bool_], outcomes: Floats, scored: NDArray[np.bool_] | None = None) -> None:
        self.treated, self.outcomes = treated, outcomes
        self.scored = np.ones(len(treated), dtype=np.bool_) if scored is None else scored


def log_of(case: Slow, rng: np.random.Generator) -> tuple[Observed, LogColumns]:
    """Draw one run: its units in the order in which their scores come, and its log."""
    n, at = case.units, np.arange(case.units, dtype=np.float64)
    treated = rng.random(n) < case.chance
    latency = rng.gamma(20, 1 / 20, n) * np.where(treated, case.latencies_s[1], case.latencies_s[0])
    fate = rng.random(n)
    lost, failed = fate < case.lost, (fate >= case.lost) & (fate < case.lost + case.failed)
    right = (rng.random(n) < np.where(treated, case.treated, case.control)).astype(np.float64)
    right[failed | lost] = 0.0
    answered, scored_at = at + latency, at + latency
    rated = ~lost
    if case.rated is not None:
        rated = ~lost & ~failed & (rng.random(n) < case.rated)
        scored_at = answered + rng.random(n) * np.where(treated, 250.0, 50.0) + np.where(treated, 50.0, 0.0)
    with_answer = right if case.rated is None else np.full(n, np.nan)
    parts = [
        ("assignment", at, np.ones(n, dtype=np.bool_), np.full(n, np.nan)),
        ("answer", answered, ~lost, with_answer),
    ]
    if case.rated is not None:
        parts.append(("score", scored_at, rated, right))
    log = _log(case, parts, treated, failed)
    come = np.nonzero(rated & (scored_at <= at[-1]))[0]
    come = come[np.argsort(scored_at[come], kind="stable")]
    return Observed(treated[come], right[come]), log


def _log(
    case: Slow,
    parts: list[tuple[str, Floats, NDArray[np.bool_], Floats]],
    treated: NDArray[np.bool_],
    failed: NDArray[np.bool_],
) -> LogColumns:
    """Rows of (kind, time, which units have it, score), by time up to the last draw."""
    n = case.units
    which = np.concatenate([np.nonzero(there & (when <= n - 1))[0] for _, when, there, _ in parts])
    kinds = np.concatenate([[kind] * int(np.sum(there & (when <= n - 1))) for kind, when, there, _ in parts])
    times = np.concatenate([when[there & (when <= n - 1)] for _, when, there, _ in parts])
    scores = np.concatenate([score[there & (when <= n - 1)] for _, when, there, score in parts])
    order = np.argsort(times, kind="stable")
    which, kinds, count = which[order], kinds[order].tolist(), len(order)
    ids = [f"{number:x}" for number in which.tolist()]
    arms = np.where(treated, "rag", "base")[which].tolist()
    chances = np.where(treated, case.chance, 1 - case.chance)[which].tolist()
    broken = [kind == "answer" and bad for kind, bad in zip(kinds, failed[which].tolist(), strict=True)]
    same = [False] * count
    return LogColumns(
        kind=kinds, role=["primary"] * count, arm=arms, unit=ids, request_id=ids, at=times[order].tolist(),
        probability=chances, failed=broken, cold=same, empty=same, event=[None] * count, detail=[None] * count,
        numbers={"right": scores[order]},
    )  # fmt: skip


def _found(case: Slow, runs: list[Observed]) -> Stops:
    treated, outcomes, lengths = _side_by_side(runs)
    scores, followed = SplitScores((len(runs),)), Followed(len(runs), 0.0)
    for start in range(0, len(treated), _STEP):
        part = treated[start : start + _STEP]
        followed.take(scores.update(part, outcomes[start : start + _STEP], np.full(part.shape, case.chance)))
    return np.where(followed.stops <= lengths, followed.stops, NEVER)


def _ratio(case: Slow, runs: list[Observed]) -> Stops:
    treated, _, lengths = _side_by_side(runs)
    plan = np.array([case.chance, 1 - case.chance])
    test, stops = SampleRatio(plan, (len(runs),)), np.full(len(runs), NEVER)
    for start in range(0, len(treated), _STEP):
        arms = np.where(treated[start : start + _STEP], 0, 1).astype(np.intp)
        capital = test.update(arms, np.broadcast_to(plan, (*arms.shape, 2)))
        stops = np.minimum(stops, first(capital >= _SRM_BOUND, start))
    return np.where(stops <= lengths, stops, NEVER)


def _side_by_side(runs: list[Observed]) -> tuple[NDArray[np.bool_], Floats, NDArray[np.int64]]:
    """(treated, outcomes, lengths), runs along the second axis; what fills up shorter ones lies past their length."""
    lengths = np.array([len(one.treated) for one in runs], dtype=np.int64)
    shape = int(np.max(lengths, initial=0)), len(runs)
    treated, outcomes = np.zeros(shape, dtype=np.bool_), np.zeros(shape)
    for number, one in enumerate(runs):
        treated[: len(one.treated), number] = one.treated
        outcomes[: len(one.outcomes), number] = one.outcomes
    return treated, outcomes, lengths


def alarm_share(stops: Stops) -> float:
    """Share of runs with an alarm."""
    return share(stops, _LAST - 1)
