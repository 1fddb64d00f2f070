"""Simulated experiments, all runs side by side, through the very classes that the monitor uses; and its peers.

Arrays have steps along the first axis and runs along the second. `never` stands for a run that did not stop.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from graftwork.stats import Floats
from graftwork.stats.sequential import LimitTest, MeanTest, PairScores, SampleRatio, Scored, SplitScores, sums

ALPHA = 0.05
BOUND = 2 / ALPHA
"""Of one side's capital, as in `BettingSequence`."""
PEEK_FROM = 100
"""Peers look from here on: before, a normal approximation is nobody's."""
Stops = NDArray[np.int64]
NEVER = np.iinfo(np.int64).max
_STEP = 50


@dataclass(frozen=True)
class Split:
    """A live split of two arms on a score of 0 or 1."""

    treated: float
    control: float
    plan: Callable[[Floats], Floats]
    """Chance of the treated arm at each place 0..1 of the run."""
    steps: int = 4000


def even(place: Floats) -> Floats:
    """50/50."""
    return np.full(place.shape, 0.5)


def tenth(place: Floats) -> Floats:
    """90/10, the treated arm has a tenth."""
    return np.full(place.shape, 0.1)


def ramping(place: Floats) -> Floats:
    """5 %, 20 %, 50 %, a third of the run each."""
    found: Floats = np.select([place < 1 / 3, place < 2 / 3], [0.05, 0.2], 0.5)
    return found


@dataclass
class Stopped:
    """First step at which each method refused "no difference", and whether the sequence ever missed the truth."""

    ours: Stops
    missed: NDArray[np.bool_]
    peers: dict[str, Stops] = field(default_factory=dict)


def draws(one: Split, runs: int, seed: int) -> Iterator[tuple[NDArray[np.bool_], Floats, Floats]]:
    """(treated, outcome, chance) some steps at a time."""
    rng = np.random.default_rng(seed)
    for start in range(0, one.steps, _STEP):
        count = min(_STEP, one.steps - start)
        chance = np.repeat(one.plan((start + np.arange(count)) / one.steps)[:, None], runs, axis=1)
        treated = rng.random((count, runs)) < chance
        right = rng.random((count, runs)) < np.where(treated, one.treated, one.control)
        yield treated, right.astype(np.float64), chance


def split_runs(one: Split, runs: int, seed: int) -> Stopped:
    """Our sequence, and on the same draws a z-test looked at always, the same test once at the end, and mSPRT."""
    scores, effect = SplitScores((runs,)), one.treated - one.control
    peers = _Peers(runs)
    found = Followed(runs, effect)
    for treated, outcome, chance in draws(one, runs, seed):
        found.take(scores.update(treated, outcome, chance))
        peers.take(treated, outcome)
    return Stopped(found.stops, found.missed, peers.stopped(one.steps))


def shadow_runs(wins: float, losses: float, steps: int, runs: int, seed: int) -> Stopped:
    """Pairs on the same prompts; the peer is McNemar's z looked at always."""
    rng, scores, found = np.random.default_rng(seed), PairScores((runs,)), Followed(runs, wins - losses)
    naive, moments, n = np.full(runs, NEVER), np.zeros((2, runs)), 0
    for start in range(0, steps, _STEP):
        drawn = rng.random((min(_STEP, steps - start), runs))
        differences = np.where(drawn < wins, 1.0, np.where(drawn < wins + losses, -1.0, 0.0))
        found.take(scores.update(differences))
        _, path = sums(moments, np.stack([differences, differences**2], axis=1))
        moments = path[-1]
        hit = np.abs(path[:, 0]) >= 1.959964 * np.sqrt(np.maximum(path[:, 1], 1e-9))
        hit[: max(0, PEEK_FROM - n)] = False
        naive = np.minimum(naive, first(hit, n))
        n += len(drawn)
    return Stopped(found.stops, found.missed, {"McNemar, always looked at": naive})


def ratio_runs(planned: float, actual: float, steps: int, runs: int, seed: int) -> tuple[Stops, Stops]:
    """(our sample-ratio test at .001, chi-square at .001 looked at always)."""
    rng, ratio = np.random.default_rng(seed), SampleRatio(np.array([planned, 1 - planned]), (runs,))
    ours, naive, seen, n = np.full(runs, NEVER), np.full(runs, NEVER), np.zeros(runs), 0
    for start in range(0, steps, _STEP):
        arms = (rng.random((min(_STEP, steps - start), runs)) >= actual).astype(np.intp)
        plan = np.broadcast_to([planned, 1 - planned], (*arms.shape, 2))
        ours = np.minimum(ours, first(ratio.update(arms, plan) >= 1000, n))
        _, path = sums(seen, (arms == 0).astype(np.float64))
        seen, count = path[-1], n + np.arange(1, len(arms) + 1)[:, None]
        hit = np.abs(path - planned * count) >= 3.290527 * np.sqrt(count * planned * (1 - planned))
        hit[: max(0, PEEK_FROM - n)] = False
        naive = np.minimum(naive, first(hit, n))
        n += len(arms)
    return ours, naive


def guard_runs(limit: float, actual: float, steps: int, runs: int, seed: int, alpha: float = 0.01) -> Stops:
    """Requests until a guardrail cuts the arm."""
    rng, test, stops = np.random.default_rng(seed), LimitTest(limit, (runs,)), np.full(runs, NEVER)
    for start in range(0, steps, _STEP):
        failed = (rng.random((min(_STEP, steps - start), runs)) < actual).astype(np.float64)
        stops = np.minimum(stops, first(test.update(failed) >= 1 / alpha, start))
    return stops


def share(stops: Stops, within: int) -> float:
    """Share of runs that stopped in so many steps."""
    return float(np.mean(stops <= within))


class Followed:
    """The betting sequence at two means: none, and the truth."""

    def __init__(self, runs: int, effect: float) -> None:
        self._test, self._n = MeanTest(np.array([0.0, effect]), (runs, 2)), 0
        self.stops, self.missed = np.full(runs, NEVER), np.zeros(runs, dtype=np.bool_)

    def take(self, scored: Scored) -> None:
        parts = [part[..., None] for part in (scored.values, scored.low, scored.high, scored.spread)]
        above, below = self._test.update(*parts)  # type: ignore[arg-type]
        crossed = (above >= BOUND) | (below >= BOUND)
        self.stops = np.minimum(self.stops, first(crossed[..., 0], self._n))
        self.missed |= np.any(crossed[..., 1], axis=0)
        self._n += len(crossed)


class _Peers:
    """Two-sample z by Welch's variance, looked at always and once; mSPRT (Johari et al. 2017) with tau = 0.1."""

    TAU2 = 0.01

    def __init__(self, runs: int) -> None:
        self._sums, self._n = np.zeros((4, runs)), 0
        self._naive, self._mixed = np.full(runs, NEVER), np.full(runs, NEVER)
        self._last = np.zeros(runs)

    def take(self, treated: NDArray[np.bool_], outcome: Floats) -> None:
        one, none = treated.astype(np.float64), (~treated).astype(np.float64)
        _, path = sums(self._sums, np.stack([one, none, one * outcome, none * outcome], axis=1))
        self._sums = path[-1]
        n1, n0 = np.maximum(path[:, 0], 1), np.maximum(path[:, 1], 1)
        p1, p0 = path[:, 2] / n1, path[:, 3] / n0
        variance = np.maximum(p1 * (1 - p1) / n1 + p0 * (1 - p0) / n0, 1e-12)
        gap = p1 - p0
        evidence = np.minimum(self.TAU2 * gap**2 / (2 * variance * (variance + self.TAU2)), 700)
        mixed = np.sqrt(variance / (variance + self.TAU2)) * np.exp(evidence) >= 1 / ALPHA
        naive = np.abs(gap) >= 1.959964 * np.sqrt(variance)
        early = max(0, PEEK_FROM - self._n)
        naive[:early], mixed[:early] = False, False
        self._naive = np.minimum(self._naive, first(naive, self._n))
        self._mixed = np.minimum(self._mixed, first(mixed, self._n))
        self._last = np.abs(gap[-1]) / np.sqrt(variance[-1])
        self._n += len(treated)

    def stopped(self, steps: int) -> dict[str, Stops]:
        once = np.where(self._last >= 1.959964, steps, NEVER)
        return {"z, always looked at": self._naive, "z, once at the end": once, "mSPRT": self._mixed}


def first(hit: NDArray[np.bool_], before: int) -> Stops:
    """Step of the first hit of each run, counted from 1; `before` steps came earlier."""
    found: Stops = np.where(np.any(hit, axis=0), before + np.argmax(hit, axis=0) + 1, NEVER)
    return found
