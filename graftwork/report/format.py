"""Number formats: one function for each quantity, used by pages and the command line."""

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

NONE = "–"
DUST = 1e-9
"""A number nearer to 0 is the rounding error of a computation, and is printed as 0."""


def rounded(value: float, decimals: int = 2) -> str:
    """Round a share or a score, half to even, by its decimal digits.

    Every share of a report goes through here: 139/200 is 0.70 and 70%. `f"{value:.2f}"` rounds the binary value
    instead, which is below 0.695, and gives 0.69 next to 70%.
    """
    if not math.isfinite(value):
        return str(value)
    text = str(round(Decimal(f"{value:.12g}"), decimals))
    return text.removeprefix("-") if not float(text) else text


def score(value: float) -> str:
    """0..1 with two decimals."""
    return rounded(value)


def signed(value: float) -> str:
    """A difference of scores, with its sign; a true minus so that columns align."""
    text = rounded(value)
    return text.replace("-", "−") if text.startswith("-") else f"+{text}"


def number(value: float) -> str:
    """Return a number within ±1 with two decimals (two digits where that is 0, as for prices), a larger one with three
    digits and thousands separated."""
    if DUST < abs(value) < 0.001:
        return f"{value:.2g}"
    if abs(value) <= 1:
        return score(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def signed_number(value: float) -> str:
    """As `number`, with its sign."""
    return (
        signed(value)
        if 0.001 <= abs(value) <= 1 or abs(value) <= DUST
        else f"{'−' if value < 0 else '+'}{number(abs(value))}"
    )


def numbers(low: float, high: float) -> str:
    """An interval of scores or of a measure."""
    return f"[{number(low)}, {number(high)}]".replace("-", "−")


def signed_numbers(low: float, high: float) -> str:
    """An interval of differences of scores or of a measure."""
    return f"[{signed_number(low)}, {signed_number(high)}]"


def interval(low: float, high: float) -> str:
    """An interval of scores."""
    return f"[{score(low)}, {score(high)}]".replace("-", "−")


def signed_interval(low: float, high: float) -> str:
    """An interval of differences."""
    return f"[{signed(low)}, {signed(high)}]"


def percent(value: float) -> str:
    """A share as a whole percentage: the digits of `score`."""
    return f"{points(value)}%"


def percents(low: float, high: float) -> str:
    """An interval of shares."""
    return f"[{points(low)}, {points(high)}]"


def points(value: float) -> str:
    """A share, or a difference of two, in whole percentage points."""
    return str(int(Decimal(rounded(value)) * 100))


def gibibytes(value: float | None) -> str:
    """GiB as a size."""
    return size(None if value is None else value * 2**30)


def tied(groups: Sequence[Sequence[str]]) -> str:
    """`a, b | c, d`: the sets of arms that no test tells apart; empty where each arm stands alone."""
    return " | ".join(", ".join(group) for group in groups if len(group) > 1)


def p_value(value: float) -> str:
    """Three decimals, and a bound below them."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def seconds(value: float | None) -> str:
    """`0.4 s`, `41 s`, `3 min 12 s`, `1 h 05 min`."""
    if value is None:
        return NONE
    if value < 10:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def milliseconds(value: float | None) -> str:
    """`0.42 ms`, `38 ms`, `1,204 ms`, `108 s`: from 10 s on in seconds."""
    if value is None:
        return NONE
    if value >= 10_000:
        return f"{value / 1000:,.0f} s"
    return f"{value:.2f} ms" if value < 10 else f"{value:,.0f} ms"


def size(value: float | None) -> str:
    """Bytes in binary units."""
    if value is None:
        return NONE
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= factor:
            return f"{value / factor:.2f} {unit}" if value < 10 * factor else f"{value / factor:.0f} {unit}"
    return f"{value:.0f} B"


def count(value: float | None) -> str:
    """A whole number with thousands separated."""
    return NONE if value is None else f"{value:,.0f}"


def format_setting(value: object) -> str:
    """A setting: short floats, empty as a dash."""
    if isinstance(value, bool) or value is None:
        return NONE if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def ratio(actual: float | None, predicted: float | None) -> str:
    """Return the error of a prediction."""
    if not actual or not predicted:
        return NONE
    return f"{100 * (actual / predicted - 1):+.0f}%".replace("-", "−")


def flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A tree of settings as (dotted key, value) lines."""
    lines: list[tuple[str, str]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            lines += flat(value, f"{name}.")
        elif isinstance(value, list | tuple):
            lines.append((name, ", ".join(format_setting(item) for item in value) or NONE))
        else:
            lines.append((name, format_setting(value)))
    return lines


def clock(value: float) -> str:
    """A time on a clock that starts at 0: `0:40`, `12:05`, `2:03:00`."""
    hours, rest = divmod(round(value), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
