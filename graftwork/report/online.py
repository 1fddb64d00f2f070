"""An online experiment's record -> what the page shows: the effect and its sequence as the log grew, and words."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from graftwork.report import words
from graftwork.report.figures import Chart
from graftwork.report.online_records import ExperimentReport, OnlineContrast, OnlineGuardrail
from graftwork.report.plots import Mark, Scale, band_chart, interval_track, ticks


def path_chart(report: ExperimentReport, contrast: OnlineContrast) -> Chart | None:
    """Estimate and confidence sequence by n (log axis), with 0 and the margin; None before there is an interval."""
    points = [p for p in contrast.path if math.isfinite(p.low) and math.isfinite(p.high)]
    if len(points) < 2:
        return None
    shown = _reach(report, contrast, [abs(p.estimate) for p in points])
    x, y = Scale(points[0].n, points[-1].n, log=True), Scale(-shown, shown)
    clipped = [(p.n, max(-shown, p.low), min(shown, max(-shown, p.estimate)), min(shown, p.high)) for p in points]
    title = f"{contrast.arm} − {contrast.control} on {report.metric}, n={points[-1].n}"
    plot = band_chart(clipped, x, y, {0.0: "zero", report.margin: "margin", -report.margin: "margin"}, title)
    unit = "prompts" if report.mode == "shadow" else "units"
    x_ticks = tuple((x(n), words.count(n)) for n in _powers(x))
    y_ticks = tuple((y(t), f"{t:+g}" if t else "0") for t in ticks(y.low, y.high, 5))
    return Chart(plot, f"{unit} so far (log scale)", x_ticks, f"{contrast.arm} − {contrast.control}", y_ticks)


def effect_track(report: ExperimentReport, contrast: OnlineContrast) -> Markup:
    """The last interval on one line, zero marked."""
    reach = _reach(report, contrast, [])
    low, high = max(-reach, contrast.low), min(reach, contrast.high)
    title = f"{contrast.sentence}\n{contrast.signature}"
    return interval_track(Mark(contrast.estimate or 0.0, low, high, "rag", title), Scale(-reach, reach), reference=0.0)


def estimator(mode: str) -> str:
    """Name what a contrast's estimate is: the mean of scores weighted by each unit's chance of its arm, or of pairs.

    A split's estimate is not the difference of the arms' plain means, which mislead where weights move.
    """
    return "paired difference" if mode == "shadow" else "weighted difference"


def evidence(value: float) -> str:
    """An e-value: how many to one."""
    if not math.isfinite(value) or value >= 1e6:
        return "> 10⁶"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def signed(value: float | None) -> str:
    """A difference with three decimals, since intervals of large logs are narrow."""
    return words.NONE if value is None else f"{value:+.3f}".replace("-", "−")


def effect_interval(contrast: OnlineContrast) -> str:
    """The confidence sequence now."""
    if not math.isfinite(contrast.low):
        return "none before n=100"
    return f"[{signed(contrast.low)}, {signed(contrast.high)}]"


def guard_state(guardrail: OnlineGuardrail) -> str:
    """The badge's words."""
    return "within" if guardrail.broken_at is None else f"broken at n={words.count(guardrail.broken_at)}"


def _reach(report: ExperimentReport, contrast: OnlineContrast, seen: Sequence[float]) -> float:
    """Far enough for the last interval, the margin and the later estimates; wide early intervals are cut."""
    late = seen[len(seen) // 3 :]
    known = [abs(v) for v in (contrast.low, contrast.high, contrast.estimate or 0.0) if math.isfinite(v)]
    return 1.6 * max([report.margin, *known, *late])


def _powers(scale: Scale) -> list[int]:
    found = [step * 10**power for power in range(9) for step in (1, 3)]
    return [n for n in found if scale.low <= n <= scale.high]
