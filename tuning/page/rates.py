"""Whether the best learning rate moves with the rank ("LoRA Without Regret", Schulman et al. 2025: hardly), read from
the trials there are; any two numeric keys will do."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal

from graftwork.report import words
from graftwork.report.sweep_records import RateRow, RatesRecord, SweepKey, SweepTrial
from graftwork.tuning.page.axis import Cells, number

Verdict = Literal["hardly moves", "moves", "can't be told"]
LEAST_RATES = 3
"""Values of the column key that a row needs."""
Grid = Mapping[int, Mapping[int, float]]
"""Row -> column -> mean loss; infinite where a trial has none."""


def rates(trials: Sequence[SweepTrial], row_key: SweepKey, column_key: SweepKey) -> RatesRecord | None:
    """The best value of `column_key` for each of `row_key`, both numeric, at the last step at which that can be read;
    None where it can be at none: two rows are needed, and three columns in each."""
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
    return {row: {column: sum(losses) / len(losses) for column, losses in sorted(cells.items())}
            for row, cells in sorted(seen.items())}  # fmt: skip


def of_grid(grid: Grid, rows: Cells, columns: Cells, step: int) -> RatesRecord:
    """What a grid says."""
    at = columns.centres
    found = [rate_row(words.format_setting(rows.centres[row]), cells, at) for row, cells in grid.items()]
    used = sorted({column for cells in grid.values() for column in cells})
    grid_step = max(at[b] / at[a] for a, b in itertools.pairwise(used))
    moves_by = max(row.best for row in found) / min(row.best for row in found)
    apart = any(a.low > b.high * 1.001 for a in found for b in found)
    edge = any(row.edge for row in found)
    verdict: Verdict = "moves" if apart else "can't be told" if edge else "hardly moves"
    costs = {column: max(cells.get(column, math.inf) - min(cells.values()) for cells in grid.values())
             for column in used}  # fmt: skip
    shared = min(costs, key=lambda column: costs[column])
    one_for_all = math.isfinite(costs[shared])
    return RatesRecord(row_key=rows.key.name, column_key=columns.key.name, step=step, rows=tuple(found),
                       grid_step=grid_step, moves_by=moves_by, verdict=verdict,
                       shared=at[shared] if one_for_all else None,
                       shared_costs=costs[shared] if one_for_all else None)  # fmt: skip


def rate_row(label: str, cells: Mapping[int, float], at: Sequence[float]) -> RateRow:
    """The lowest of a row, half a step of its grid around it, and the parabola's lowest point."""
    tried = sorted(cells)
    here = min(range(len(tried)), key=lambda index: cells[tried[index]])
    best = at[tried[here]]
    below = at[tried[here - 1]] if here else None
    above = at[tried[here + 1]] if here + 1 < len(tried) else None
    low = math.sqrt(best * below) if below else best * best / math.sqrt(best * number(above))
    high = math.sqrt(best * above) if above else best * best / math.sqrt(best * number(below))
    points = [(math.log(at[tried[i]]), cells[tried[i]]) for i in (here - 1, here, here + 1)] if below and above else []
    return RateRow(row=label, best=best, loss=cells[tried[here]], low=low, high=high, n=len(tried),
                   edge="" if below and above else "high" if below else "low", vertex=_vertex(points))  # fmt: skip


def _vertex(points: Sequence[tuple[float, float]]) -> float | None:
    """The lowest point of the parabola through three, back from its log axis; None where one is infinite."""
    if not points or not all(math.isfinite(y) for _, y in points):
        return None
    (x0, y0), (x1, y1), (x2, y2) = points
    left, right = (x1 - x0) * (y1 - y2), (x1 - x2) * (y1 - y0)
    return math.exp(x1 - 0.5 * ((x1 - x0) * left - (x1 - x2) * right) / (left - right)) if left != right else None
