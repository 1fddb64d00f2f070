"""How much each key matters: total Sobol indices of a surface fitted to the trials' losses.

The surface is a polynomial chaos expansion (Sudret 2008): a line and a parabola a key, products of the lines where
there are trials enough, ridge-fitted to the ranks of the losses as normal scores, because losses of diverging trials
have no scale. Its functions are orthonormal over the space, so the variance that a key accounts for is the sum of
its squared coefficients: a functional ANOVA over the space itself, wherever a search has gathered its trials.
Intervals: percentile bootstrap over trials with the ridge kept. Nothing is told where shuffled losses are predicted as
well.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import norm, rankdata

from graftwork.report.sweep_records import ImportanceRecord, KeyImportance, SweepKey, SweepTrial
from graftwork.tuning.page.axis import Floats, Indices, terms

RIDGES = (0.003, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Tried, a share of the number of trials."""
RESAMPLES = 400
SHUFFLES = 399
LEVEL = 0.95


def importance(keys: Sequence[SweepKey], trials: Sequence[SweepTrial], seed: int) -> ImportanceRecord:
    """Importance of each key by the losses at the last step that every trial reported which ended."""
    step = common_step(trials)
    shown = [trial for trial in trials if trial.state == "failed" or trial.loss_at(step) is not None]
    losses = [loss if (loss := trial.loss_at(step)) is not None else math.inf for trial in shown]
    diverged = sum(not math.isfinite(loss) for loss in losses)
    blocks = [terms(key, [trial.values[key.name] for trial in shown]) for key in keys]
    main = sum(block.shape[1] for block in blocks)

    def record(silent: str | None, surface: "_Surface | None" = None, p: float | None = None) -> ImportanceRecord:
        told = zip(keys, surface.shares(y), *_interval(surface, y, seed), strict=True) if surface and not silent else ()
        every = [KeyImportance(key=key.name, value=value, low=low, high=high) for key, value, low, high in told]
        return ImportanceRecord(step=step, n=len(shown), diverged=diverged, terms=surface.width if surface else main,
                                predicts=surface.predicts(y) if surface else None, p_value=p, silent=silent,
                                keys=tuple(sorted(every, key=lambda one: -one.value)))  # fmt: skip

    if len(keys) < 2:
        return record("one key alone is searched")
    if len(shown) < main + 4:
        return record(f"{len(shown)} trials are too few for {len(keys)} keys: {main + 4} are needed")
    if len(set(losses)) < 3:
        return record("the losses are all but equal")
    y = scores(losses)
    fits = [_Surface(blocks, pairs, ridge) for pairs in (False, True) for ridge in RIDGES]
    fits = [fit for fit in fits if fit.width + 4 <= len(shown)]
    p = _shuffled(fits, y, seed)
    chance = f"left-out trials are predicted no better than where the losses are shuffled (p={p:.2f}, n={len(shown)})"
    silent = chance if p >= 1 - LEVEL else None
    return record(silent, max(fits, key=lambda fit: fit.predicts(y)), p)


def common_step(trials: Sequence[SweepTrial]) -> int:
    """The last step at which every trial reported that finished or was stopped; 0 where none did."""
    return min((trial.last_step for trial in trials if trial.state in ("finished", "stopped") and trial.losses),
               default=0)  # fmt: skip


def scores(losses: Sequence[float]) -> Floats:
    """Normal scores of the ranks, ties averaged, of mean 0."""
    y: Floats = norm.ppf((rankdata(losses) - 0.5) / len(losses))
    y -= y.mean()
    return y


class _Surface:
    """A polynomial over the keys with a ridge: how well it predicts left-out trials, and the shares of the keys."""

    def __init__(self, blocks: Sequence[Floats], pairs: bool, ridge: float) -> None:
        columns: list[Floats] = []
        self._owners: list[set[int]] = []
        for index, block in enumerate(blocks):
            columns += list(block.T)
            self._owners += [{index}] * block.shape[1]
        if pairs:
            for a, b in itertools.combinations(range(len(blocks)), 2):
                columns.append(blocks[a][:, 0] * blocks[b][:, 0])
                self._owners.append({a, b})
        self._keys, self._ridge = len(blocks), ridge
        self._x = np.column_stack(columns)
        self.width = len(columns)
        x = self._x - self._x.mean(axis=0)
        self._hat = x @ self._solve(x, np.eye(len(x)))

    def shares(self, y: Floats, rows: Indices | None = None) -> Floats:
        """Total index of each key; over a resample of the trials where `rows` names one."""
        x, y = (self._x, y) if rows is None else (self._x[rows], y[rows])
        squared = self._solve(x - x.mean(axis=0), y - y.mean()) ** 2
        by_key = [squared[[key in owners for owners in self._owners]].sum() for key in range(self._keys)]
        return np.array(by_key) / (squared.sum() or 1.0)

    def predicts(self, y: Floats) -> float:
        """1 - squared error of left-out trials over that of the mean of the others."""
        return float(self.predict_each(y[:, None])[0])

    def predict_each(self, y: Floats) -> Floats:
        """The same for each column."""
        n = len(y)
        left_out: Floats = (y - self._hat @ y) / (1 - np.diag(self._hat)[:, None] - 1 / n)
        predicted: Floats = 1 - np.square(left_out).sum(axis=0) / np.square(y * n / (n - 1)).sum(axis=0)
        return predicted

    def _solve(self, x: Floats, y: Floats) -> Floats:
        gram = x.T @ x + self._ridge * len(x) * np.eye(self.width)
        return np.asarray(np.linalg.solve(gram, x.T @ y), dtype=np.float64)


def _shuffled(fits: Sequence[_Surface], y: Floats, seed: int) -> float:
    """How often the best fit predicts shuffled losses as well as the real ones: the p value of a permutation test."""
    rng = np.random.default_rng(seed)
    every = np.column_stack([y, *(rng.permutation(y) for _ in range(SHUFFLES))])
    best = np.max([fit.predict_each(every) for fit in fits], axis=0)
    return float(np.mean(best >= best[0] - 1e-12))


def _interval(surface: _Surface, y: Floats, seed: int) -> Floats:
    """(2, keys): lower and upper bounds."""
    rng = np.random.default_rng(seed)
    drawn = [surface.shares(y, rng.integers(len(y), size=len(y))) for _ in range(RESAMPLES)]
    bounds: Floats = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return bounds
