"""Inline SVG plots. Positions are percentages, so text and strokes keep their size at every page width.

Colours come from the page's CSS variables through classes; every mark has a `<title>` with its numbers. Functions
return `Markup`: whatever comes from outside is escaped here.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

Point = tuple[float, float]


@dataclass(frozen=True)
class Mark:
    """A point with its interval on a line from 0% to 100%."""

    value: float
    low: float
    high: float
    kind: str
    """CSS class and shape: prompt (circle), rag (square), finetune (triangle), both (diamond)."""
    title: str


@dataclass(frozen=True)
class Line:
    """One curve."""

    points: Sequence[Point]
    style: str
    """CSS class: best, finished, stopped, failed, train, eval."""
    title: str
    dots: bool = False


@dataclass(frozen=True)
class Scale:
    """Maps low..high to 0..100 percent, on a log axis where asked."""

    low: float
    high: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return 50.0 if high == low else 100 * (value - low) / (high - low)


def element(name: str, *children: object, **attributes: object) -> Markup:
    """One SVG or HTML element; `class_` is class, `_` in names is `-`, text and attributes are escaped."""
    pairs = [
        (key.rstrip("_").replace("_", "-"), _text(value)) for key, value in attributes.items() if value is not None
    ]
    opened = Markup("").join([escape(name), *(Markup(' {}="{}"').format(key, value) for key, value in pairs)])
    return Markup("<{}>{}</{}>").format(opened, Markup("").join(escape(child) for child in children), escape(name))


def interval_track(mark: Mark, scale: Scale, reference: float | None) -> Markup:
    """One row: a rail for the scale, the reference as a dashed stroke, the interval as a band, the value as a shape."""
    low, value, high = (_percent(scale(v)) for v in (mark.low, mark.value, mark.high))
    rail = [element("line", x1=0, x2="100%", y1="50%", y2="50%", class_="rail")]
    if reference is not None:
        at = _percent(scale(reference))
        rail.append(element("line", x1=at, x2=at, y1="12%", y2="88%", class_="reference"))
    band = element("line", x1=low, x2=high, y1="50%", y2="50%", class_=f"bar k-{mark.kind}")
    shape = element("svg", _shape(mark.kind), x=value, y="50%", overflow="visible", width=1, height=1)
    return _svg(mark.title, *rail, band, shape, class_="track")


def line_chart(lines: Sequence[Line], x: Scale, y: Scale, label: str) -> Markup:
    """Curves on a stretched canvas; the frame around it (ticks, axis names) is HTML."""
    grid = [
        element("line", x1=0, x2="100%", y1=_percent(100 - y(t)), y2=_percent(100 - y(t)), class_="grid")
        for t in ticks(y.low, y.high)
    ]
    curves = [
        element(
            "polyline",
            element("title", line.title),
            class_=f"curve c-{line.style}",
            fill="none",
            points=" ".join(f"{x(a):.2f},{100 - y(b):.2f}" for a, b in line.points),
            vector_effect="non-scaling-stroke",
        )
        for line in lines
    ]
    canvas = element(
        "svg",
        *curves,
        viewBox="0 0 100 100",
        preserveAspectRatio="none",
        width="100%",
        height="100%",
        overflow="visible",
    )
    dots = [
        element(
            "circle",
            element("title", f"{line.title}: {b:.4g} at step {a:g}"),
            cx=_percent(x(a)),
            cy=_percent(100 - y(b)),
            r=3,
            class_=f"dot c-{line.style}",
        )
        for line in lines
        if line.dots
        for a, b in line.points
    ]
    ends = [
        element(
            "circle",
            element("title", line.title),
            cx=_percent(x(line.points[-1][0])),
            r=3.5,
            cy=_percent(100 - y(line.points[-1][1])),
            class_=f"dot c-{line.style}",
        )
        for line in lines
        if line.points and not line.dots
    ]
    return _svg(label, *grid, canvas, *dots, *ends, class_="canvas")


def band_chart(
    points: Sequence[tuple[float, float, float, float]], x: Scale, y: Scale, levels: Mapping[float, str], label: str
) -> Markup:
    """(x, low, value, high): the interval as a band, the value as a curve, and marked levels (value -> CSS class)."""
    grid = [
        element("line", x1=0, x2="100%", y1=_percent(100 - y(t)), y2=_percent(100 - y(t)), class_="grid")
        for t in ticks(y.low, y.high, 5)
    ]
    marked = [
        element("line", x1=0, x2="100%", y1=_percent(100 - y(t)), y2=_percent(100 - y(t)), class_=f"level {name}")
        for t, name in levels.items()
        if y.low <= t <= y.high
    ]
    top = [f"{x(a):.2f},{100 - y(high):.2f}" for a, _, _, high in points]
    bottom = [f"{x(a):.2f},{100 - y(low):.2f}" for a, low, _, _ in reversed(points)]
    band = element("polygon", points=" ".join([*top, *bottom]), class_="band")
    curve = element(
        "polyline",
        class_="curve c-best",
        fill="none",
        vector_effect="non-scaling-stroke",
        points=" ".join(f"{x(a):.2f},{100 - y(value):.2f}" for a, _, value, _ in points),
    )
    canvas = element("svg", band, curve, viewBox="0 0 100 100", preserveAspectRatio="none", width="100%", height="100%")
    return _svg(label, *grid, canvas, *marked, class_="canvas")


def scatter(points: Iterable[tuple[Point, str, str, str]], x: Scale, y: Scale, label: str) -> Markup:
    """Labelled points: ((x, y), text next to it, CSS class, title)."""
    marks: list[Markup] = []
    for (a, b), text, style, title in points:
        left, top = x(a), _percent(100 - y(b))
        side = {"x": _percent(left), "dx": -11 if left > 70 else 11, "text_anchor": "end" if left > 70 else "start"}
        marks.append(
            element("circle", element("title", title), cx=_percent(left), cy=top, r=6, class_=f"dot c-{style}")
        )
        marks.append(element("text", text, y=top, dy="0.35em", class_=f"label c-{style}", **side))
    return _svg(label, *marks, class_="canvas")


def pair_track(predicted: float | None, actual: float | None, scale: Scale, title: str) -> Markup:
    """A prediction (hollow) and what came (filled), joined."""
    marks: list[Markup] = [element("line", x1=0, x2="100%", y1="50%", y2="50%", class_="rail")]
    if predicted is not None and actual is not None:
        ends = sorted((scale(predicted), scale(actual)))
        marks.append(element("line", x1=_percent(ends[0]), x2=_percent(ends[1]), y1="50%", y2="50%", class_="join"))
    for value, style in ((predicted, "predicted"), (actual, "actual")):
        if value is not None:
            marks.append(element("circle", cx=_percent(scale(value)), cy="50%", r=5, class_=f"dot {style}"))
    return _svg(title, *marks, class_="track")


def share_bar(parts: Sequence[tuple[float, str, str]], title: str) -> Markup:
    """One bar of shares: (share 0..1, CSS class, title) from left to right."""
    marks, left = [], 0.0
    for share, style, text in parts:
        marks.append(
            element(
                "rect",
                element("title", text),
                x=_percent(100 * left),
                width=_percent(100 * share),
                y=0,
                height="100%",
                class_=style,
            )
        )
        left += share
    return _svg(title, *marks, class_="share")


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers within low..high: steps of 1, 2, 2.5 or 5 times a power of ten."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * unit for unit in (1, 2, 2.5, 5, 10) if power * unit >= rough)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _svg(label: str, *children: object, class_: str) -> Markup:
    return element("svg", element("title", label), *children, class_=class_, role="img")


def _shape(kind: str) -> Markup:
    shapes: dict[str, Callable[[], Markup]] = {
        "rag": lambda: element("rect", x=-4.5, y=-4.5, width=9, height=9, class_="mark k-rag"),
        "finetune": lambda: element("path", d="M0,-5.5 L5.2,4 L-5.2,4 Z", class_="mark k-finetune"),
        "both": lambda: element("path", d="M0,-6 L6,0 L0,6 L-6,0 Z", class_="mark k-both"),
    }
    return shapes.get(kind, lambda: element("circle", r=5.0, class_=f"mark k-{kind}"))()


def _percent(value: float) -> str:
    return f"{value:.2f}%"


def _text(value: object) -> object:
    return f"{value:g}" if isinstance(value, float) else value
