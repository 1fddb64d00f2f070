"""Does "LoRA Without Regret" show here: best learning rate against rank, LoRA against all weights?

    python -m benchmarks.lora_without_regret                 the figures of benchmarks/results/sweep_curves.json
    python -m benchmarks.lora_without_regret --page FOLDER   and the page of them
    python -m benchmarks.lora_without_regret --guide         and the table in docs/guide-tuning.md

A best rate is that of the lowest mean over the seeds, known to half a step of its grid. LoRA and all weights are
compared at their best rates, seed by seed: a seed decides the order of the rows for both.
"""

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Literal

import numpy as np

from benchmarks.record import RESULTS, Clock, figure, write
from benchmarks.recorded import CURVES, curves
from benchmarks.regret_schema import Gap, RateCurve, RatePoint, RegretClaim, RegretReport, RegretTask
from benchmarks.regret_views import RegretPage, gap_words, section, sentence
from benchmarks.sweep_curves import grid
from graftwork import stats
from graftwork.report import build
from graftwork.report.sweep_charts import loss
from graftwork.report.sweep_schema import SweepKey
from graftwork.report.sweep_views import rate_words, rates_words
from graftwork.storage.store import Store
from graftwork.tuning.space_analysis import Cells, of_grid, rate_row

RESULT = RESULTS / "lora_without_regret.json"
GUIDE = Path(__file__).parents[1] / "docs" / "guide-tuning.md"
BEGIN, END = "<!-- python -m benchmarks.lora_without_regret --guide -->", "<!-- /regret -->"
PUBLISHED = (
    "LoRA Without Regret (Schulman et al., Thinking Machines, 2025): LoRA's best learning rate hardly depends on its "
    "rank, is about 10 times that of training all weights (about 15 times in runs below 100 steps), and at their best "
    "rates LoRA learns as well, as long as its rank holds what there is to learn."
)
DIFFERS = (
    "A base of 135 million parameters, 16 optimizer steps, a constant rate; the paper's are larger and longer.",
    "LoRA trains on the base in nf4, as everywhere here; all weights are trained in fp32.",
    "Three seeds; a grid whose neighbours differ by a factor of 2.",
)
MARGIN = 0.03
"""Nats within which two losses count as equal, as in the other studies."""
Outcome = Literal["reproduced", "not reproduced", "undecided"]
OF_VERDICT: Mapping[str, Outcome] = {"hardly moves": "reproduced", "moves": "not reproduced"}
PAPERS_RATIO = (10.0, 15.0)
Losses = Mapping[float, Mapping[int, float]]
"""Learning rate -> seed -> loss at the end; infinite where the trial diverged."""


def study(path: Path = CURVES) -> RegretReport:
    """Everything that the recorded grids say."""
    full = _losses("full", path).get(None, {})
    tasks = [
        _task(name, found, full if name == "airport-card" else {})
        for name in ("airport-card", "ua-parse")
        if (found := _losses(name, path))
    ]
    claims = tuple(claim for task in tasks for claim in _claims(task))
    return RegretReport(
        published=PUBLISHED, differs=DIFFERS, base="SmolLM2-135M-Instruct", tasks=tuple(tasks), claims=claims
    )


def _losses(task: str, path: Path) -> dict[int | None, dict[float, dict[int, float]]]:
    """By rank, None for all weights; empty where the task is not recorded."""
    try:
        by_seed = curves(task, path)
    except KeyError:
        return {}
    found: dict[int | None, dict[float, dict[int, float]]] = {}
    for seed, trials in by_seed.items():
        for trial in trials:
            rank, rate = trial.values.get("adapter.rank"), trial.values["optim.lr"]
            assert rank is None or isinstance(rank, int)
            assert isinstance(rate, float)
            end = trial.losses[-1][1] if trial.state == "finished" else math.inf
            found.setdefault(rank, {}).setdefault(rate, {})[seed] = end
    return found


def _task(name: str, lora: Mapping[int | None, Losses], full: Losses) -> RegretTask:
    spec = grid(name)
    ranks = sorted(rank for rank in lora if rank is not None)
    rates = sorted({rate for losses in lora.values() for rate in losses})
    rows = Cells(SweepKey(name="adapter.rank", values=tuple(ranks)))
    columns = Cells(SweepKey(name="optim.lr", values=tuple(rates)))
    means = {
        row: {columns.index(rate): fmean(seeds.values()) for rate, seeds in sorted(lora[rank].items())}
        for row, rank in enumerate(ranks)
    }
    found = of_grid(means, rows, columns, spec.steps)
    shown = [_curve(f"rank {rank}", rank, lora[rank]) for rank in ranks]
    whole = _curve("all weights", None, full) if full else None
    gaps = [_gap(curve, lora[curve.rank], whole, full) for curve in shown] if whole else []
    ratio = _ratio(shown, whole) if whole else (None, None, None)
    return RegretTask(
        name=name,
        steps=spec.steps,
        rows=spec.eval_rows,
        curves=(*shown, *([whole] if whole else [])),
        rates=found,
        gaps=tuple(gap for gap in gaps if gap),
        ratio=ratio[0],
        ratio_low=ratio[1],
        ratio_high=ratio[2],
    )


def _curve(name: str, rank: int | None, losses: Losses) -> RateCurve:
    rates = sorted(losses)
    points = [
        RatePoint(
            rate=rate,
            mean=fmean(losses[rate].values()),
            low=min(losses[rate].values()),
            high=max(losses[rate].values()),
            n=len(losses[rate]),
        )
        for rate in rates
    ]
    best = rate_row(name, {index: point.mean for index, point in enumerate(points)}, rates)
    seeds = sorted({seed for by_seed in losses.values() for seed in by_seed})
    lowest = [_lowest({rate: losses[rate][seed] for rate in rates if seed in losses[rate]}) for seed in seeds]
    return RateCurve(name=name, rank=rank, points=tuple(points), best=best, best_by_seed=tuple(lowest))


def _lowest(losses: Mapping[float, float]) -> float:
    return min(losses, key=lambda rate: losses[rate])


def _gap(curve: RateCurve, lora: Losses, whole: RateCurve, full: Losses) -> Gap | None:
    """None where fewer than two seeds are recorded of both."""
    assert curve.rank is not None
    ours, theirs = lora[curve.best.best], full[whole.best.best]
    shared = sorted(ours.keys() & theirs.keys())
    if len(shared) < 2:
        return None
    differences = np.array([ours[seed] - theirs[seed] for seed in shared])
    found = stats.student_mean(differences)
    return Gap(
        rank=curve.rank, difference=found.mean, low=found.interval.low, high=found.interval.high, n=len(differences)
    )


def _ratio(lora: Sequence[RateCurve], full: RateCurve) -> tuple[float, float, float]:
    """Geometric means over the ranks: of the parabolas' lowest points, and of the bounds."""
    middle = [one.best.vertex or one.best.best for one in lora]
    return (
        _mean(middle) / (full.best.vertex or full.best.best),
        _mean([one.best.low for one in lora]) / full.best.high,
        _mean([one.best.high for one in lora]) / full.best.low,
    )


def _mean(values: Sequence[float]) -> float:
    return math.exp(fmean(map(math.log, values)))


def _claims(task: RegretTask) -> Iterator[RegretClaim]:
    """Each published pattern as far as the grid can show it."""
    if task.rates is not None:
        outcome: Outcome = OF_VERDICT.get(task.rates.verdict, "undecided")
        yield RegretClaim(
            says="The best rate hardly depends on the rank.",
            task=task.name,
            outcome=outcome,
            here=rates_words(task.rates),
        )
    if task.ratio is not None and task.ratio_low is not None and task.ratio_high is not None:
        low, high = PAPERS_RATIO
        inside = task.ratio_low <= high and task.ratio_high >= low
        outcome = "reproduced" if low <= task.ratio <= high else "undecided" if inside else "not reproduced"
        yield RegretClaim(
            says="The best rate of LoRA is 10 to 15 times that of all weights.",
            task=task.name,
            outcome=outcome,
            here=ratio_words(task),
        )
    for gap in task.gaps:
        worse = gap.low > MARGIN
        outcome = "reproduced" if gap.high < MARGIN else "not reproduced" if worse else "undecided"
        says = f"At its best rate, rank {gap.rank} learns as well as all weights (within {MARGIN:g})."
        here = f"{gap_words(gap)} nats over {gap.n} seeds"
        yield RegretClaim(says=says, task=task.name, outcome=outcome, here=here)


def ratio_words(task: RegretTask) -> str:
    """`11 times [6.4, 19]`."""
    return f"{task.ratio:.2g} times [{task.ratio_low:.2g}, {task.ratio_high:.2g}], half a step of each grid around"


def markdown(report: RegretReport) -> str:
    """A table a task."""
    lines: list[str] = []
    for task in report.tasks:
        gaps = {gap.rank: gap for gap in task.gaps}
        seeds = max(point.n for curve in task.curves for point in curve.points)
        lines += [
            f"**{task.name}**, {task.steps} steps, {seeds} seeds, {task.rows} held-out rows:",
            "",
            "| trained | best rate [half a step] | parabola | loss there | minus all weights [95%] |",
            "|---|---|---|---|---|",
        ]
        for curve in task.curves:
            gap = gap_words(gaps[curve.rank]) if curve.rank in gaps else "–"
            vertex = f"{curve.best.vertex:.2g}" if curve.best.vertex else "–"
            lines.append(f"| {curve.name} | {rate_words(curve.best)} | {vertex} | {loss(curve.best.loss)} | {gap} |")
        lines.append("")
    lines += ["| published | task | here | |", "|---|---|---|---|"]
    lines += [f"| {claim.says} | {claim.task} | {claim.here} | {claim.outcome} |" for claim in report.claims]
    return "\n".join(lines)


def read(path: Path) -> RegretReport:
    """What a run of this module has written."""
    return RegretReport.model_validate(json.loads(path.read_text(encoding="utf-8"))["result"]["detail"])


def into_guide(report: RegretReport, guide: Path = GUIDE) -> None:
    """Put the table between the marks of the guide."""
    before, _, rest = guide.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    guide.write_text(f"{before}{BEGIN}\n\n{markdown(report)}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Print the table; write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=Path, default=CURVES)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--guide", action="store_true")
    asked = parser.parse_args()
    clock = Clock()
    report = study(asked.curves)
    print(markdown(report))
    figures = {
        f"{task.name}_best_rate": figure([row.best for row in task.rates.rows], "of ranks")
        for task in report.tasks
        if task.rates
    }
    figures |= {f"{task.name}_ratio": figure([task.ratio], "times") for task in report.tasks if task.ratio}
    write("lora_without_regret", asked.out, figures, report.model_dump(mode="json"), {"margin": MARGIN}, clock)
    if asked.page is not None:
        page = RegretPage(
            title="LoRA Without Regret", subtitle=report.base, created_at="", verdict=sentence(report), regret=report
        )
        store = Store(str(asked.page))
        print(build(page, store, "lora-without-regret", section=section(report)).html_uri)
    if asked.guide:
        into_guide(report)


if __name__ == "__main__":
    main()
