"""What training changed: figures of held-out rows before the first step and after the last, in words."""

import re
from collections.abc import Mapping, Sequence

from graftwork.training.steplog import StepReport

BEFORE, AFTER = "before_", "eval_"
_GROUP = re.compile(r"(?P<name>\w+)\[(?P<row>[^,]*)(, (?P<cell>.*))?\]")
"""A figure of a group of rows: `exact_match[length=512, depth=50]`."""


def before_after(steps: Sequence[StepReport]) -> tuple[str, ...]:
    """A line a figure that the first step notes as `before_NAME` and the last as `eval_NAME`.

    Groups stand in a table: a line for each value of their first field.
    """
    if not steps:
        return ()
    before = {key.removeprefix(BEFORE): value for key, value in steps[0].metrics.items() if key.startswith(BEFORE)}
    after = {key.removeprefix(AFTER): value for key, value in steps[-1].metrics.items() if key.startswith(AFTER)}
    if steps[-1].eval_loss is not None:
        after["loss"] = steps[-1].eval_loss
    both = {name: (value, after[name]) for name, value in before.items() if name in after}
    whole = [
        f"held-out {name.replace('_', ' ')}: {was:.4g} before, {now:.4g} after"
        for name, (was, now) in both.items()
        if not _GROUP.fullmatch(name)
    ]
    return tuple(whole + _table(both))


def _table(both: Mapping[str, tuple[float, float]]) -> list[str]:
    rows: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for key, (was, now) in both.items():
        if found := _GROUP.fullmatch(key):
            cells = rows.setdefault((found["name"], found["row"]), [])
            cells.append((found["cell"] or "", f"{was:.2g} to {now:.2g}"))
    return [
        f"held-out {name.replace('_', ' ')}, {row}: "
        + ", ".join(
            f"{cell} {change}".strip() for cell, change in sorted(rows[name, row], key=lambda c: _natural(c[0]))
        )
        for name, row in sorted(rows, key=lambda key: _natural(" ".join(key)))
    ]


def _natural(text: str) -> list[tuple[int, str]]:
    """Sorts 512 before 1024."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", text)]
