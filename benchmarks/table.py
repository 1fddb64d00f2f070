"""The table of figures against goals, from the committed results; the README's copy is written and checked from here.

python -m benchmarks.table                 prints it
python -m benchmarks.table --write         puts it between the marks of README.md
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.goals import GOALS, Goal
from benchmarks.record import NEVER, RESULTS, Figure

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- benchmarks: python -m benchmarks.table --write -->", "<!-- /benchmarks -->"


@dataclass(frozen=True)
class Row:
    """A goal with what was measured; None where there is no result."""

    goal: Goal
    found: Figure | None
    machine: str = ""

    @property
    def verdict(self) -> str:
        if self.found is None:
            return "not measured"
        missing = self.goal.missed_by(self.found["value"])
        return f"missed by {missing:.0%}" if missing else "met"


def rows(results: Path = RESULTS) -> list[Row]:
    """Every goal in order."""
    return [_row(goal, results / f"{goal.benchmark}.json") for goal in GOALS]


def _row(goal: Goal, path: Path) -> Row:
    if not path.exists():
        return Row(goal, None)
    document = json.loads(path.read_text(encoding="utf-8"))
    return Row(goal, document["result"]["figures"].get(goal.figure), _machine(document["run_info"]))


def _machine(info: dict[str, Any]) -> str:
    """Processor, cores and commit of a result."""
    hardware, git = info["hardware"], info["git"]
    commit = f", {git['sha'][:8]}{'+' if git['dirty'] else ''}" if git else ""
    return f"{hardware['cpu']}, {hardware['cores']} cores{commit}"


def shown(table: Sequence[Row]) -> str:
    """In Markdown: goal, figure with its quartiles and n, verdict; below it the machine of each figure."""
    lines = ["| what | goal | measured | |", "|---|---|---|---|"]
    for row in table:
        sign = ">=" if row.goal.side == "at least" else "<="
        lines.append(f"| {row.goal.text} | {sign} {_number(row.goal.limit)} | {_measured(row.found)} | {row.verdict} |")
    machines = dict.fromkeys(row.machine for row in table if row.machine)
    if machines:
        lines += ["", "Median (quartiles; n) on " + "; ".join(machines) + "."]
    return "\n".join(lines)


def _measured(found: Figure | None) -> str:
    if found is None:
        return ""
    value, q1, q3 = (_number(found[key]) for key in ("value", "q1", "q3"))
    return f"{value} ({q1} to {q3}; {found['n']:,})"


def _number(value: float) -> str:
    if value >= NEVER:
        return "never"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def inserted(text: str, table: str) -> str:
    """`text` with the table between its marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, f"no line {BEGIN}"
    assert end, f"no line {END} after {BEGIN}"
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write it into README.md")
    if parser.parse_args().write:
        README.write_text(inserted(README.read_text(encoding="utf-8"), shown(rows())), encoding="utf-8")
    else:
        print(shown(rows()))


if __name__ == "__main__":
    main()
