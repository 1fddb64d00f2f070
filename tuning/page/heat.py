"""Two keys against each other: the lowest loss of each pair of their values."""

from collections.abc import Sequence

from graftwork.report.sweep_records import HeatCell, HeatRecord, ImportanceRecord, SweepKey, SweepTrial
from graftwork.tuning.page.axis import MOST_VALUES, Cells, numeric
from graftwork.tuning.page.rates import rates

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
    return HeatRecord(row_key=row_key.name, column_key=column_key.name, rows=rows.labels, columns=columns.labels,
                      cells=_cells(trials, rows, columns), rates=claim)  # fmt: skip


def _cells(trials: Sequence[SweepTrial], rows: Cells, columns: Cells) -> tuple[HeatCell, ...]:
    """Those that have a trial, row by row."""
    last_step = max(trial.last_step for trial in trials)
    groups: dict[tuple[int, int], list[SweepTrial]] = {}
    for trial in trials:
        where = rows.index(trial.values[rows.key.name]), columns.index(trial.values[columns.key.name])
        groups.setdefault(where, []).append(trial)
    cells = [_cell(where, group, last_step) for where, group in sorted(groups.items())]
    best = {row: min((cell for cell in cells if cell.row == row and cell.loss is not None),
                     key=lambda cell: cell.loss or 0.0, default=None) for row in range(len(rows.labels))}  # fmt: skip
    return tuple(cell.model_copy(update={"best_of_row": cell is best[cell.row]}) for cell in cells)


def _cell(where: tuple[int, int], group: Sequence[SweepTrial], last_step: int) -> HeatCell:
    ended = [loss for trial in group if (loss := trial.loss_at(last_step)) is not None]
    reached = max(trial.last_step for trial in group)
    there = [loss for trial in group if (loss := trial.loss_at(reached)) is not None]
    return HeatCell(row=where[0], column=where[1], loss=min(ended, default=None), reached=reached,
                    last=min(there, default=None), n=len(group))  # fmt: skip
