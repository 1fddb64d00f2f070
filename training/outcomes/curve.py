"""Sample efficiency: the same spec on the first 50, 100, 200 ... rows, and what each step up brings."""

import hashlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from graftwork import stats
from graftwork.data import read_rows
from graftwork.errors import ConfigError, UserError
from graftwork.metrics import NATS, signature
from graftwork.provenance import collect
from graftwork.report import BuiltReport, build
from graftwork.report.outcome_records import CurvePoint, CurveReport, CurveStep
from graftwork.report.whole import ReportInput
from graftwork.storage import RunPaths, Store
from graftwork.training.outcomes.paired import level, paired
from graftwork.training.outcomes.told import TaskScores, task_scores, with_task
from graftwork.training.records import Progress, TrainReport
from graftwork.training.run import check, train
from graftwork.training.spec import TrainSpec

EVAL_ROWS = 200
"""Held-out rows that are answered, where the spec names no number."""

OnProgress = Callable[[Progress], None]


def curve_specs(spec: TrainSpec, sizes: Sequence[int]) -> list[TrainSpec]:
    """An ordinary run a size. Raises UserErrors of all kinds, before anything starts."""
    asked = f"--curve {','.join(map(str, sizes))}"
    if len(sizes) < 2 or sorted(set(sizes)) != list(sizes) or sizes[0] < 1:
        found = "one size alone" if len(sizes) == 1 else "they do not rise"
        raise ConfigError(asked, found, "two sizes or more, each larger than the one before",
                          "write --curve 50,100,200,400")  # fmt: skip
    if spec.data.eval is None:
        raise ConfigError(asked, "data.eval is not given", "sizes are compared on held-out rows", "give data.eval")
    specs = [with_task(spec, EVAL_ROWS).with_({"data.train_rows": size}) for size in sizes]
    try:
        check(specs[0])
    except UserError as error:
        raise type(error)(f"{asked}: {error.subject}", error.problem, error.rule, error.hint) from None
    there = len(read_rows(spec.data.train, limit=sizes[-1], need="train"))
    if there < sizes[-1]:
        raise ConfigError(asked, f"{spec.data.train} has {there} rows", "no size is larger than the data",
                          f"end with {there} or less")  # fmt: skip
    return specs


def curve(spec: TrainSpec, sizes: Sequence[int], *, on_progress: OnProgress | None = None) -> CurveReport:
    """Train every size (a finished one is reused), measure and set each against the one before.

    Needs an initialised Ray. Nothing is promoted. Raises as `train` does.
    """
    specs = curve_specs(spec, sizes)
    reports = [train(one, on_progress=on_progress) for one in specs]
    return curve_report(spec, sizes, reports, [task_scores(one) for one in specs])


def curve_report(
    spec: TrainSpec, sizes: Sequence[int], reports: Sequence[TrainReport], scores: Sequence[TaskScores]
) -> CurveReport:
    """The record of runs that are done."""
    alpha, units, own = spec.outcomes.alpha, scores[0].probe.units, scores[0].task_metric
    points = tuple(
        CurvePoint(
            rows=size, run_id=report.run_id, adapter=report.published_name, reused=report.reused, steps=report.steps,
            loss=level(found.values["nats"], NATS, units, alpha, spec.seed),
            score=level(found.values[own.name], own, units, alpha, spec.seed),
        )
        for size, report, found in zip(sizes, reports, scores, strict=True)
    )  # fmt: skip
    tests = [
        (paired(after.values["nats"], before.values["nats"], NATS, units, alpha, spec.seed),
         paired(after.values[own.name], before.values[own.name], own, units, alpha, spec.seed))
        for before, after in zip(scores, scores[1:], strict=False)
    ]  # fmt: skip
    adjusted = stats.holm([loss.p_value for loss, _ in tests])
    steps = tuple(
        CurveStep(rows=rows, before=before, loss=loss, score=score, p_adjusted=p,
                  verdict=stats.decide(loss.value, p, False, alpha, higher=False))
        for rows, before, (loss, score), p in zip(sizes[1:], sizes, tests, adjusted, strict=False)
    )  # fmt: skip
    recipe = {"asked": scores[0].probe.about, "base": spec.base.uri, "quant": spec.quant.kind, "seed": spec.seed,
              "test": tests[0][0].test, "interval": tests[0][0].interval}  # fmt: skip
    return CurveReport(
        name=spec.name, metric=own.name, alpha=alpha, n=len(units), points=points, steps=steps,
        sentence=sentence(steps), signature=signature(own.name, len(units), recipe),
    )  # fmt: skip


def sentence(steps: Sequence[CurveStep]) -> str:
    """Whether more examples would help, as far as these sizes tell."""
    last = steps[-1]
    fell = f"from {last.before} to {last.rows} examples the held-out loss"
    change = f"{last.loss.value:+.3f} [{last.loss.low:+.3f}, {last.loss.high:+.3f}] nats a token"
    if last.verdict == "better":
        return f"More examples would still help: {fell} changed by {change}."
    if last.verdict == "worse":
        return f"More examples of this kind hurt: {fell} rose by {change}."
    flat = next((step.before for step in _flat_end(steps)), last.before)
    return (
        f"Flat from {flat} examples on: {fell} changed by {change}, and {last.loss.detects:.3f} would have been seen."
    )


def _flat_end(steps: Sequence[CurveStep]) -> Sequence[CurveStep]:
    """The steps behind the last one that a test tells from none."""
    told = [at for at, step in enumerate(steps) if step.verdict in ("better", "worse")]
    return steps[told[-1] + 1 if told else 0 :]


def write_curve(spec: TrainSpec, report: CurveReport) -> BuiltReport:
    """report.json and report.html in runs/<name>-curve-<digest8>/. Raises StorageError."""
    digest = hashlib.sha256("\n".join(point.run_id for point in report.points).encode()).hexdigest()
    run = RunPaths(Store(spec.root), f"{spec.name}-curve"[:63], digest)
    page = ReportInput(
        title=f"{spec.name}: how many examples?", subtitle=run.run_id, verdict=report.sentence, curve=report,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        provenance={**collect(spec.seed), "spec": spec.model_dump(mode="json")},
    )  # fmt: skip
    return build(page, run.store, *run.file())
