"""Sweep charts as inline SVG: timeline, loss curves, parallel coordinates, heat map, Pareto front."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from graftwork.report import format as words
from graftwork.report.charts import Line, Mark, Scale, element, interval_track, scatter, ticks
from graftwork.report.sweep_schema import (
    FrontRecord,
    HeatCell,
    HeatRecord,
    ImportanceRecord,
    KeyImportance,
    Plain,
    SweepKey,
    SweepRecord,
    SweepTrial,
    in_space,
)
from graftwork.report.views import Chart, Tick, curves

LANE_PX = 18
NICE_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400)


@dataclass(frozen=True)
class Axis:
    """One upright axis of the parallel coordinates."""

    name: str
    at: float
    """Percent from the left."""
    ticks: tuple[Tick, ...]


@dataclass(frozen=True)
class Timeline:
    """Trials on the sweep's clock, packed into as few lanes as hold them."""

    plot: Markup
    height_px: int
    ticks: tuple[Tick, ...]
    lanes: int
    idle: float
    """Share of the lanes' time in which none of them trained."""
    left_out: int
    """Trials whose time is not known."""


def style(trial: SweepTrial, sweep: SweepRecord) -> str:
    """CSS class of a trial."""
    return "best" if trial.id == sweep.best_id else trial.state


def short(key: str) -> str:
    """The last part of a dotted key."""
    return key.rpartition(".")[2]


def title(trial: SweepTrial) -> str:
    """`rank 16, lr 0.002 (stopped at step 4, loss 1.234)`."""
    values = ", ".join(f"{short(key)} {words.format_setting(value)}" for key, value in trial.values.items())
    stood = f" at step {trial.last_step}, loss {loss(trial.last_loss)}" if trial.losses else ""
    return f"{values} ({trial.state}{stood})"


def loss(value: float | None) -> str:
    """Three decimals; three digits from 10 on."""
    if value is None or not math.isfinite(value):
        return words.NONE
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.3g}"


def highest(sweep: SweepRecord) -> float:
    """Return the end of a loss axis, so that diverged trials do not flatten the others: the better half is
    whole in the picture."""
    last = sorted(
        trial.last_loss for trial in sweep.trials if trial.last_loss is not None and math.isfinite(trial.last_loss)
    )
    if not last:
        return math.inf
    shown = [trial for trial in sweep.trials if trial.losses and (trial.last_loss or 0) <= last[(len(last) - 1) // 2]]
    firsts = max(value for trial in shown for _, value in trial.losses if math.isfinite(value))
    return max(firsts, last[0] + 2 * (last[(len(last) - 1) // 2] - last[0]))


def trials_chart(sweep: SweepRecord) -> Chart | None:
    """Held-out loss by step of every trial; the stopped ones are drawn faintly, the best on top."""
    shown = sorted((trial for trial in sweep.trials if trial.losses), key=lambda trial: trial.id == sweep.best_id)
    lines = [Line(trial.losses, style(trial, sweep), title(trial)) for trial in shown]
    return curves(lines, "optimizer step", "held-out loss", highest=highest(sweep))


def trials_above_axis(sweep: SweepRecord) -> int:
    """Trials that end above the loss axis, or have no loss."""
    top = highest(sweep)
    return sum(not (trial.last_loss is not None and trial.last_loss <= top) for trial in sweep.trials)


def timeline(sweep: SweepRecord) -> Timeline | None:
    """None where the start of no trial is known."""
    timed = sorted(
        (trial for trial in sweep.trials if trial.started_s is not None and sweep.took_s(trial)),
        key=lambda trial: trial.started_s or 0.0,
    )
    if not timed:
        return None
    end = max((trial.started_s or 0.0) + sweep.took_s(trial) for trial in timed)
    scale, lanes = Scale(0.0, end), _lanes(timed, sweep)
    count = max(lanes) + 1
    rails = [
        element("line", x1=0, x2="100%", y1=(lane + 0.5) * LANE_PX, y2=(lane + 0.5) * LANE_PX, class_="grid")
        for lane in range(count)
    ]
    bars = [_bar(trial, lane, scale, sweep) for trial, lane in zip(timed, lanes, strict=True)]
    plot = element("svg", element("title", "trials on the clock"), *rails, *bars, class_="canvas", role="img")
    busy = sum(map(sweep.took_s, timed))
    step = next((nice for nice in NICE_S if end / nice <= 5), NICE_S[-1])
    marks = tuple((scale(at * step), words.clock(at * step)) for at in range(int(end / step) + 1))
    return Timeline(
        plot, count * LANE_PX, marks, count, max(0.0, 1 - busy / (count * end)), len(sweep.trials) - len(timed)
    )


def _lanes(timed: Sequence[SweepTrial], sweep: SweepRecord) -> list[int]:
    """For each trial, in the order of their starts, the lowest lane that is free then."""
    busy: list[tuple[float, int]] = []
    free: list[int] = []
    lanes = []
    for trial in timed:
        started = trial.started_s or 0.0
        while busy and busy[0][0] <= started:
            heapq.heappush(free, heapq.heappop(busy)[1])
        lane = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (started + sweep.took_s(trial), lane))
        lanes.append(lane)
    return lanes


def _bar(trial: SweepTrial, lane: int, scale: Scale, sweep: SweepRecord) -> Markup:
    started, took = trial.started_s or 0.0, sweep.took_s(trial)
    said = f"{title(trial)}\n{words.clock(started)} + {words.seconds(took)}"
    return element(
        "rect",
        element("title", said),
        x=f"{scale(started):.2f}%",
        y=lane * LANE_PX + 2,
        rx=2,
        width=f"{max(scale(started + took) - scale(started), 0.25):.2f}%",
        height=LANE_PX - 4,
        class_=f"trial t-{style(trial, sweep)}",
    )


def parallel(sweep: SweepRecord) -> tuple[Markup, tuple[Axis, ...]] | None:
    """A line a trial over the axes of the keys and the loss."""
    searched = [trial for trial in sweep.trials if trial.repeat_of is None and in_space(sweep.keys, trial)]
    shown = [trial for trial in searched if trial.losses]
    shown.sort(key=lambda trial: (trial.id == sweep.best_id, -trial.losses[-1][1]))
    if not shown or not sweep.keys:
        return None
    axes = _axes(sweep)
    top = highest(sweep)
    lowest = min(trial.last_loss or 0.0 for trial in shown)
    room = 0.05 * (top - lowest) or 0.1
    y = Scale(lowest - room, top + room)
    rails = [
        element("line", x1=f"{axis.at:.2f}%", x2=f"{axis.at:.2f}%", y1=0, y2="100%", class_="axis-rail")
        for axis in axes
    ]
    lines = []
    for trial in shown:
        heights = [*(position(key, trial.values[key.name]) for key in sweep.keys), y(min(trial.losses[-1][1], top))]
        points = " ".join(f"{axis.at:.2f},{100 - at:.2f}" for axis, at in zip(axes, heights, strict=True))
        kind = f"curve thin c-{style(trial, sweep)}"
        lines.append(
            element(
                "polyline",
                element("title", title(trial)),
                points=points,
                fill="none",
                class_=kind,
                vector_effect="non-scaling-stroke",
            )
        )
    canvas = element("svg", *lines, viewBox="0 0 100 100", preserveAspectRatio="none", width="100%", height="100%")
    plot = element(
        "svg",
        element("title", "a line a trial over the keys and the loss"),
        *rails,
        canvas,
        class_="canvas",
        role="img",
    )
    end = Axis("loss", axes[-1].at, tuple((y(t), f"{t:.3g}") for t in ticks(y.low, y.high)))
    return plot, (*axes[:-1], end)


def _axes(sweep: SweepRecord) -> list[Axis]:
    gap = 100 / len(sweep.keys)
    named = [Axis(short(key.name), index * gap, key_ticks(key)) for index, key in enumerate(sweep.keys)]
    return [*named, Axis("loss", 100.0, ())]


def position(key: SweepKey, value: Plain) -> float:
    """0 to 100: listed values evenly apart, a range by its scale."""
    if key.values:
        order = listed(key)
        return 50.0 if len(order) == 1 else 5 + 90 * order.index(value) / (len(order) - 1)
    assert isinstance(value, int | float)
    return 5 + 0.9 * Scale(key.low or 0.0, key.high or 0.0, key.log)(value)


def listed(key: SweepKey) -> list[Plain]:
    """The values of a choice, numbers in rising order."""
    numbers = [value for value in key.values if isinstance(value, int | float) and not isinstance(value, bool)]
    return [*sorted(numbers)] if len(numbers) == len(key.values) else list(key.values)


def key_ticks(key: SweepKey) -> tuple[Tick, ...]:
    """The listed values; of a range its ends, and the powers of ten or round numbers between."""
    if key.values:
        return tuple((position(key, value), words.format_setting(value)) for value in listed(key))
    assert key.low is not None
    assert key.high is not None
    powers = range(math.ceil(math.log10(key.low)), math.floor(math.log10(key.high)) + 1) if key.log else ()
    inner = [10.0**power for power in powers] if key.log else ticks(key.low, key.high)
    apart = [at for at in inner if min(position(key, at) - 5, 95 - position(key, at)) > 8]
    return tuple((position(key, at), f"{at:.3g}") for at in (key.low, *apart, key.high))


def importance_tracks(found: ImportanceRecord) -> list[tuple[KeyImportance, Markup]]:
    """Each key's share with its interval."""
    return [
        (
            one,
            interval_track(
                Mark(
                    one.value,
                    one.low,
                    one.high,
                    "latency",
                    f"{one.key}: {words.percent(one.value)} {words.percents(one.low, one.high)}",
                ),
                Scale(0, 1),
                None,
            ),
        )
        for one in found.keys
    ]


def heat_rows(heat: HeatRecord) -> list[tuple[str, list[tuple[HeatCell | None, int]]]]:
    """The rows from the top, the highest first: each cell with its shade, 0 (worst) to 4 (best) by rank."""
    final = sorted({cell.loss for cell in heat.cells if cell.loss is not None})
    shades = {value: 4 - round(4 * index / max(len(final) - 1, 1)) for index, value in enumerate(final)}
    by_place = {(cell.row, cell.column): cell for cell in heat.cells}
    rows = []
    for row in reversed(range(len(heat.rows))):
        found = [by_place.get((row, column)) for column in range(len(heat.columns))]
        rows.append(
            (heat.rows[row], [(cell, shades[cell.loss] if cell and cell.loss is not None else -1) for cell in found])
        )
    return rows


def front_chart(front: FrontRecord, sweep: SweepRecord) -> Chart | None:
    """The first two objectives against each other."""
    if len(front.objectives) < 2 or not front.points:
        return None
    x, y = ([point.values[goal] for point in front.points] for goal in (1, 0))
    scales = _padded_scale(x), _padded_scale(y)
    by_id = {trial.id: trial for trial in sweep.trials}
    points = [
        (
            (a, b),
            "",
            "best" if point.id == sweep.best_id else "finished" if point.on_front else "stopped",
            f"{title(by_id[point.id])}\n{front.objectives[0]} {b:.4g}, {front.objectives[1]} {a:.4g}",
        )
        for a, b, point in zip(x, y, front.points, strict=True)
    ]
    plot = scatter(points, *scales, f"{front.objectives[0]} by {front.objectives[1]}")
    marks = [tuple((scale(t), _short(t)) for t in _ticks(scale)) for scale in scales]
    return Chart(plot, front.objectives[1], marks[0], front.objectives[0], marks[1])


def _padded_scale(values: Sequence[float]) -> Scale:
    """A scale with room at both ends; logarithmic where the values span more than a factor of four."""
    low, high = min(values), max(values)
    if low > 0 and high / low >= 4:
        room = (high / low) ** 0.12
        return Scale(low / room, high * room, log=True)
    room = 0.12 * (high - low) or 0.5 * abs(high) or 1.0
    return Scale(low - room, high + room)


def _short(value: float) -> str:
    """`3.2 M`, `150 k`, `0.45`."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.3g}"


def _ticks(scale: Scale) -> list[float]:
    if not scale.log:
        return ticks(scale.low, scale.high)
    powers = [10.0**p for p in range(math.ceil(math.log10(scale.low)), math.floor(math.log10(scale.high)) + 1)]
    return powers if len(powers) > 1 else [scale.low * (scale.high / scale.low) ** at for at in (0.1, 0.5, 0.9)]
