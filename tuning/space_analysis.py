"""Importance of each key: total Sobol indices of a surface fitted to the trials' losses.

The surface is a polynomial chaos expansion (Sudret 2008): a line and a parabola a key, products of the lines where
there are trials enough, ridge-fitted to the ranks of the losses as normal scores, because losses of diverging trials
have no scale. Its functions are orthonormal over the space, so the variance that a key accounts for is the sum of
its squared coefficients: a functional ANOVA over the space itself, wherever a search has gathered its trials.
Intervals: percentile bootstrap over trials with the same ridge. Where shuffled losses are predicted as well, nothing is
reported.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.stats import norm, rankdata

from graftwork.report.format import format_setting
from graftwork.report.sweep_schema import (
    HeatCell,
    HeatRecord,
    ImportanceRecord,
    KeyImportance,
    Plain,
    RateRow,
    RatesRecord,
    SweepKey,
    SweepTrial,
)

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
BINS = 6
"""Cells of a range."""
MOST_VALUES = 12
"""A choice of more is no axis of a table."""


def numeric(key: SweepKey) -> bool:
    """Return whether every value is a number; booleans are none."""
    return not key.values or all(isinstance(one, int | float) and not isinstance(one, bool) for one in key.values)


def number(value: Plain) -> float:
    """Return a numeric value as float."""
    assert isinstance(value, int | float), f"{value!r} is no number"
    return float(value)


class Cells:
    """Rows or columns of a table: the values of a choice in rising order, or equal parts of a range."""

    def __init__(self, key: SweepKey) -> None:
        self.key = key
        if key.values:
            self._listed = sorted(key.values, key=number) if numeric(key) else list(key.values)
            self.labels = tuple(format_setting(value) for value in self._listed)
            self.centres = tuple(number(value) for value in self._listed) if numeric(key) else ()
            return
        assert key.low is not None
        assert key.high is not None
        at = (math.log, math.exp) if key.log else (float, float)
        low, high = at[0](key.low), at[0](key.high)
        self._edges = [at[1](low + (high - low) * part / BINS) for part in range(BINS + 1)]
        self.centres = tuple(at[1](low + (high - low) * (part + 0.5) / BINS) for part in range(BINS))
        self.labels = tuple(f"{centre:.2g}" for centre in self.centres)

    def index(self, value: Plain) -> int:
        """Return the cell of a value."""
        if self.key.values:
            return self._listed.index(value)
        return min(max(int(np.searchsorted(self._edges, number(value), side="right")) - 1, 0), BINS - 1)


def terms(key: SweepKey, values: Sequence[Plain]) -> Floats:
    """Functions of a key at values, (trials, functions): a line and a parabola of a number, contrasts of other choices.

    They are orthonormal and of mean 0 over the key's domain, so that squared coefficients are shares of the variance.
    """
    if not key.values:
        assert key.low is not None
        assert key.high is not None
        scale = math.log if key.log else float
        low, high = scale(key.low), scale(key.high)
        u = np.array([(scale(number(value)) - low) / (high - low) for value in values])
        return np.column_stack([math.sqrt(3) * (2 * u - 1), math.sqrt(5) * (6 * u * u - 6 * u + 1)])
    listed = list(key.values)
    if numeric(key):
        at = np.array([number(value) for value in listed])
        at = np.log(at) if at.min() > 0 and at.max() / at.min() >= 4 else at
        at = (at - at.mean()) / (at.std() or 1.0)
        raw = np.column_stack([np.ones(len(at)), at, at * at][: min(3, len(listed))])
    else:
        raw = np.column_stack([np.ones(len(listed)), np.eye(len(listed))[:, 1:]])
    orthonormal = np.linalg.qr(raw)[0][:, 1:] * math.sqrt(len(listed))
    table: Floats = orthonormal[[listed.index(value) for value in values]]
    return table


USUAL = ("adapter.rank", "optim.lr")


def heat(keys: Sequence[SweepKey], trials: Sequence[SweepTrial], found: ImportanceRecord) -> HeatRecord | None:
    """Rank by learning rate where both are searched, else the two most important keys; None for fewer than two."""
    fit = {key.name: key for key in keys if len(key.values) != 1 and len(key.values) <= MOST_VALUES}
    order = [one.key for one in found.keys if one.key in fit] or list(fit)
    names = USUAL if set(USUAL) <= set(fit) else tuple(order[:2])
    if len(names) < 2 or not any(trial.losses for trial in trials):
        return None
    chosen = [fit[name] for name in names]
    if names != USUAL:
        chosen.sort(key=lambda key: len(Cells(key).labels))
    row_key, column_key = chosen
    rows, columns = Cells(row_key), Cells(column_key)
    claim = rates(trials, row_key, column_key) if numeric(row_key) and numeric(column_key) else None
    return HeatRecord(
        row_key=row_key.name,
        column_key=column_key.name,
        rows=rows.labels,
        columns=columns.labels,
        cells=_cells(trials, rows, columns),
        rates=claim,
    )


def _cells(trials: Sequence[SweepTrial], rows: Cells, columns: Cells) -> tuple[HeatCell, ...]:
    """Return the cells that have a trial, row by row."""
    last_step = max(trial.last_step for trial in trials)
    groups: dict[tuple[int, int], list[SweepTrial]] = {}
    for trial in trials:
        where = rows.index(trial.values[rows.key.name]), columns.index(trial.values[columns.key.name])
        groups.setdefault(where, []).append(trial)
    cells = [_cell(where, group, last_step) for where, group in sorted(groups.items())]
    best = {
        row: min(
            (cell for cell in cells if cell.row == row and cell.loss is not None),
            key=lambda cell: cell.loss or 0.0,
            default=None,
        )
        for row in range(len(rows.labels))
    }
    return tuple(cell.model_copy(update={"best_of_row": cell is best[cell.row]}) for cell in cells)


def _cell(where: tuple[int, int], group: Sequence[SweepTrial], last_step: int) -> HeatCell:
    ended = [loss for trial in group if (loss := trial.loss_at(last_step)) is not None]
    reached = max(trial.last_step for trial in group)
    there = [loss for trial in group if (loss := trial.loss_at(reached)) is not None]
    return HeatCell(
        row=where[0],
        column=where[1],
        loss=min(ended, default=None),
        reached=reached,
        last=min(there, default=None),
        n=len(group),
    )


RIDGES = (0.003, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Ridges to try, as shares of the number of trials."""
RESAMPLES = 400
SHUFFLES = 399
LEVEL = 0.95


def importance(keys: Sequence[SweepKey], trials: Sequence[SweepTrial], seed: int) -> ImportanceRecord:
    """Importance of each key by the losses at the last step that every trial reported which ended."""
    ended = [trial for trial in trials if trial.state in ("finished", "stopped") and trial.losses]
    step = min((trial.last_step for trial in ended), default=0)
    shown = [trial for trial in trials if trial.state == "failed" or trial.loss_at(step) is not None]
    losses = [loss if (loss := trial.loss_at(step)) is not None else math.inf for trial in shown]
    diverged = sum(not math.isfinite(loss) for loss in losses)
    blocks = [terms(key, [trial.values[key.name] for trial in shown]) for key in keys]
    main = sum(block.shape[1] for block in blocks)

    def record(silent: str | None, surface: "_Surface | None" = None, p: float | None = None) -> ImportanceRecord:
        shares = (
            zip(keys, surface.shares(y), *_interval(surface, y, seed), strict=True) if surface and not silent else ()
        )
        every = [KeyImportance(key=key.name, value=value, low=low, high=high) for key, value, low, high in shares]
        return ImportanceRecord(
            step=step,
            n=len(shown),
            diverged=diverged,
            terms=surface.width if surface else main,
            predicts=surface.predicts(y) if surface else None,
            p_value=p,
            silent=silent,
            keys=tuple(sorted(every, key=lambda one: -one.value)),
        )

    if len(keys) < 2:
        return record("one key alone is searched")
    if len(shown) < main + 4:
        return record(f"{len(shown)} trials are too few for {len(keys)} keys: {main + 4} are needed")
    if len(set(losses)) < 3:
        return record("the losses are all but equal")
    y = scores(losses)
    fits = [_Surface(blocks, pairs, ridge) for pairs in (False, True) for ridge in RIDGES]
    fits = [fit for fit in fits if fit.width + 4 <= len(shown)]
    p = _permutation_p(fits, y, seed)
    chance = f"left-out trials are predicted no better than where the losses are shuffled (p={p:.2f}, n={len(shown)})"
    silent = chance if p >= 1 - LEVEL else None
    return record(silent, max(fits, key=lambda fit: fit.predicts(y)), p)


def scores(losses: Sequence[float]) -> Floats:
    """Normal scores of the ranks, ties averaged, of mean 0."""
    y: Floats = norm.ppf((rankdata(losses) - 0.5) / len(losses))
    y -= y.mean()
    return y


class _Surface:
    """Polynomial over the keys with a ridge: its prediction of left-out trials, and the shares of the keys."""

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
        """Total index of each key; over a resample of the trials where `rows` is given."""
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


def _permutation_p(fits: Sequence[_Surface], y: Floats, seed: int) -> float:
    """p value of a permutation test: share of shuffles whose losses the best fit predicts as well as the real ones."""
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


# Movement of the best learning rate with the rank ("LoRA Without Regret", Schulman et al. 2025: hardly any), read from
# the trials; works for any two numeric keys.

Verdict = Literal["hardly moves", "moves", "can't be told"]
LEAST_RATES = 3
"""Values of the column key that a row needs."""
Grid = Mapping[int, Mapping[int, float]]
"""Row -> column -> mean loss; infinite for a trial without one."""


def rates(trials: Sequence[SweepTrial], row_key: SweepKey, column_key: SweepKey) -> RatesRecord | None:
    """Best value of `column_key` for each of `row_key`, both numeric, at the last step that has enough trials.

    None without such a step: two rows are needed, and three columns in each.
    """
    rows, columns = Cells(row_key), Cells(column_key)
    for step in sorted({step for trial in trials for step, _ in trial.losses}, reverse=True):
        grid = grid_at(trials, rows, columns, step)
        readable = {row: cells for row, cells in grid.items() if sum(map(math.isfinite, cells.values())) >= LEAST_RATES}
        if len(readable) == len(grid) >= 2:
            return of_grid(readable, rows, columns, step)
    return None


def grid_at(trials: Sequence[SweepTrial], rows: Cells, columns: Cells, step: int) -> Grid:
    """Mean losses at a step. A trial that failed counts as infinite; one that was stopped before is left out."""
    seen: dict[int, dict[int, list[float]]] = {}
    for trial in trials:
        loss = trial.loss_at(step)
        loss = math.inf if loss is None and trial.state == "failed" else loss
        cells = seen.setdefault(rows.index(trial.values[rows.key.name]), {})
        if loss is not None:
            cells.setdefault(columns.index(trial.values[columns.key.name]), []).append(loss)
    return {
        row: {column: sum(losses) / len(losses) for column, losses in sorted(cells.items())}
        for row, cells in sorted(seen.items())
    }


def of_grid(grid: Grid, rows: Cells, columns: Cells, step: int) -> RatesRecord:
    """Return the best value of each row of a grid, and whether it moves."""
    at = columns.centres
    found = [rate_row(format_setting(rows.centres[row]), cells, at) for row, cells in grid.items()]
    used = sorted({column for cells in grid.values() for column in cells})
    grid_step = max(at[b] / at[a] for a, b in itertools.pairwise(used))
    moves_by = max(row.best for row in found) / min(row.best for row in found)
    apart = any(a.low > b.high * 1.001 for a in found for b in found)
    edge = any(row.edge for row in found)
    verdict: Verdict = "moves" if apart else "can't be told" if edge else "hardly moves"
    costs = {
        column: max(cells.get(column, math.inf) - min(cells.values()) for cells in grid.values()) for column in used
    }
    shared = min(costs, key=lambda column: costs[column])
    one_for_all = math.isfinite(costs[shared])
    return RatesRecord(
        row_key=rows.key.name,
        column_key=columns.key.name,
        step=step,
        rows=tuple(found),
        grid_step=grid_step,
        moves_by=moves_by,
        verdict=verdict,
        shared=at[shared] if one_for_all else None,
        shared_costs=costs[shared] if one_for_all else None,
    )


def rate_row(label: str, cells: Mapping[int, float], at: Sequence[float]) -> RateRow:
    """Return the lowest of a row, half a step of its grid around it, and the parabola's lowest point."""
    tried = sorted(cells)
    here = min(range(len(tried)), key=lambda index: cells[tried[index]])
    best = at[tried[here]]
    below = at[tried[here - 1]] if here else None
    above = at[tried[here + 1]] if here + 1 < len(tried) else None
    low = math.sqrt(best * below) if below else best * best / math.sqrt(best * number(above))
    high = math.sqrt(best * above) if above else best * best / math.sqrt(best * number(below))
    points = [(math.log(at[tried[i]]), cells[tried[i]]) for i in (here - 1, here, here + 1)] if below and above else []
    return RateRow(
        row=label,
        best=best,
        loss=cells[tried[here]],
        low=low,
        high=high,
        n=len(tried),
        edge="" if below and above else "high" if below else "low",
        vertex=_vertex(points),
    )


def _vertex(points: Sequence[tuple[float, float]]) -> float | None:
    """Lowest point of the parabola through three points, back from its log axis; None where one is infinite."""
    if not points or not all(math.isfinite(y) for _, y in points):
        return None
    (x0, y0), (x1, y1), (x2, y2) = points
    left, right = (x1 - x0) * (y1 - y2), (x1 - x2) * (y1 - y0)
    return math.exp(x1 - 0.5 * ((x1 - x0) * left - (x1 - x2) * right) / (left - right)) if left != right else None
