"""False alarms and power of live splits whose arms differ in latency, failures, lost answers and delay of feedback.

    python -m benchmarks.latency_runs                    500 runs a case, three minutes on one core

One unit is drawn each second. Each run is a log: rows in the order of writing, up to the last draw, so units in
flight at the end have no outcome. The monitor's own `Attribution` turns the rows into observations, and the
sequential tests that the monitor uses then take all runs at once, as in benchmarks/online_runs.py
(tests/unit/serving/ab_test/test_online_runs.py compares both with
the whole monitor). `as_scored` is the peer: the same units in the
order in which their scores come, those without a score left out. Upper bounds are one-sided 95 % ones (Wilson); that
of the sample ratio is of all cases, and counts a run where either of its two tests, of all units or of those with a
score, ever crosses.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.online_runs import NEVER, Followed, Stops, first, share
from benchmarks.record import Clock, Figure, write
from benchmarks.sequential import median, rate, single, upper
from graftwork.serving.ab_test.attribution import Attribution
from graftwork.serving.ab_test.log_reader import LogColumns
from graftwork.serving.ab_test.spec import OnlineRules
from graftwork.stats import Floats
from graftwork.stats.sequential import SampleRatio, SplitScores

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
        entered = Attribution(case.rules).attribute(rows)
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
        kind=kinds,
        role=["primary"] * count,
        arm=arms,
        unit=ids,
        request_id=ids,
        at=times[order].tolist(),
        probability=chances,
        failed=broken,
        cold=same,
        empty=same,
        event=[None] * count,
        detail=[None] * count,
        numbers={"right": scores[order]},
    )


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


CASES = (
    *(
        Slow(ratio, in_flight, units=2500 if in_flight == 500 else 1000)
        for ratio in (1, 3, 10, 30)
        for in_flight in (10, 80, 500)
    ),
    Slow(10, 80, chance=0.1),
    Slow(10, 80, treated=0.5, control=0.5),
    Slow(10, 80, failed=0.05, lost=0.02),
    Slow(30, 40, failed=0.05, lost=0.02),
)
RATED = (
    *(Slow(ratio, in_flight, rated=0.3, units=2000) for ratio, in_flight in ((1, 10), (10, 80), (30, 40))),
    Slow(30, 80, rated=0.3, lost=0.02, units=2000),
)
EFFECT = Slow(10, 100, treated=0.85, control=0.8, units=4500)
"""The goal's effect; more than 4,000 of its units are counted."""


def alike(runs: int) -> tuple[dict[str, Figure], list[dict[str, Any]]]:
    """A/A of every case."""
    found: list[dict[str, Any]] = []
    for number, case in enumerate((*CASES, *RATED)):
        seen = latency_runs(case, runs, seed=600 + number)
        names = ("found", "split", "found_as_scored", "split_as_scored")
        alarms = {name: alarm_share(getattr(seen, name)) for name in names}
        found.append(
            {
                "case": case.name,
                "p": case.control,
                "runs": runs,
                "units": seen.steps,
                **alarms,
                "upper": upper(alarms["found"], runs),
            }
        )
        print(found[-1], flush=True)
    split = sum(one["split"] for one in found) / len(found)
    worst = {
        "aa_upper": max(one["upper"] for one in found[: len(CASES)]),
        "feedback_aa_upper": max(one["upper"] for one in found[len(CASES) :]),
        "aa_as_scored": max(one["found_as_scored"] for one in found),
        "srm_as_scored": max(one["split_as_scored"] for one in found),
    }
    figures = {name: single(value, runs, "share of runs") for name, value in worst.items()}
    all_runs = runs * len(found)
    return {**figures, "srm_upper": single(upper(split, all_runs), all_runs, "share of runs")}, found


def unlike(runs: int) -> dict[str, Figure]:
    """The goal's effect, between arms one of which is ten times slower."""
    seen = latency_runs(EFFECT, runs, seed=650)
    assert seen.steps >= 4000, f"{seen.steps} units counted"
    return {"power": rate(seen.found, 4000), "power_median": median(seen.found, "requests")}


def main() -> None:
    """Measures and writes the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--runs", type=int, default=500)
    args = parser.parse_args()
    clock = Clock()
    figures, detail = alike(args.runs)
    write("latency_runs", args.out, {**figures, **unlike(args.runs)}, detail, {"runs": args.runs}, clock)


if __name__ == "__main__":
    main()
