"""Rebase and learning curve: a task's recorded spec on a new base, or on growing numbers of rows, with its scores."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import yaml

from graftwork import stats
from graftwork.artifacts.manifest import AdapterManifest
from graftwork.artifacts.registry import resolve
from graftwork.base.load import resolve as resolve_base
from graftwork.base.source import BaseSpec
from graftwork.config import validate
from graftwork.datasets.rows import read_rows
from graftwork.environment import collect
from graftwork.errors import ArtifactError, ConfigError, DataError, RunError, UserError
from graftwork.metrics import NATS, Metric, signature
from graftwork.report import BuiltReport, build
from graftwork.report.evaluation_schema import (
    CurvePoint,
    CurveReport,
    CurveStep,
    Level,
    PairedTest,
    Rebased,
    RebaseReport,
)
from graftwork.report.render import ReportInput
from graftwork.report.schema import MetricInfo
from graftwork.stats import Floats
from graftwork.storage.store import RunPaths, Store
from graftwork.training.evaluation.questions import Probe
from graftwork.training.evaluation.report import level, paired, read_parts
from graftwork.training.report import Progress, TrainReport
from graftwork.training.run import ResolvedRun, check, train
from graftwork.training.spec import TrainSpec

OnProgress = Callable[[str, Progress], None]
"""(alias, where its new run is)"""


@dataclass(frozen=True)
class RebaseAsk:
    """Request of a rebase: a new base and the tasks' aliases."""

    root: str
    base: str
    aliases: tuple[str, ...]
    rows: int = 200
    """Held-out rows answered, where a recorded spec names no number."""
    alpha: float = 0.05


@dataclass(frozen=True)
class RebasedTask:
    """One task as it was trained, and as it will be."""

    alias: str
    manifest: AdapterManifest
    old: TrainSpec
    new: TrainSpec


def pairs_of(ask: RebaseAsk) -> list[RebasedTask]:
    """Each alias' recorded spec, on both bases. Raises UserErrors of all kinds, before anything starts."""
    if len(set(ask.aliases)) != len(ask.aliases):
        raise ConfigError(f"rebase {' '.join(ask.aliases)}", "an alias stands twice", "each task once")
    new_base = resolve_base(BaseSpec.model_validate(ask.base))
    found = [_pair(ask, alias) for alias in ask.aliases]
    for pair in found:
        if pair.manifest.base_digest == new_base.digest:
            raise ConfigError(
                f"rebase --base {ask.base} {pair.alias}",
                "that is the base it was trained on",
                "a rebase sets two bases side by side",
                "name another base",
            )
        check(pair.new)
    return found


def _pair(ask: RebaseAsk, alias: str) -> RebasedTask:
    store = Store(ask.root)
    manifest = resolve(store, alias)
    asked = f"rebase {alias}"
    name, dash, digest = manifest.run.rpartition("-")
    path = RunPaths(store, name, digest).spec() if dash else ()
    if not path or not store.exists(*path):
        raise ArtifactError(
            asked,
            f"run {manifest.run!r} has no recorded spec in {store.uri}",
            "a task is trained again from its run's spec.yaml",
            "a merged or registered adapter has none: rebase what it was made of",
        )
    old = recorded_spec(asked, store, path)
    if old.init_from is not None:
        raise ConfigError(
            asked,
            f"it went on from {old.init_from}",
            "an adapter can't go on on another base",
            f"rebase {old.init_from} first, and train on from its new version",
        )
    if old.data.eval is None:
        raise ConfigError(
            asked,
            "its spec has no data.eval",
            "both bases answer the recorded held-out rows",
            "train it again with data.eval",
        )
    old = with_task(old, ask.rows)
    if (now := ResolvedRun.resolve(old).paths.run_id) != manifest.run:
        raise DataError(
            asked,
            f"its recorded spec is now run {now}, and {manifest.ref} came from {manifest.run}",
            "the rows and the base that it names are those it was trained with",
            "its data or its defaults changed since: train and promote it again first",
        )
    return RebasedTask(alias, manifest, old, old.with_({"base": ask.base}))


def recorded_spec(asked: str, store: Store, path: Sequence[str]) -> TrainSpec:
    """The spec that a run recorded, in this root. Raises ConfigError where it is of another version of graftwork."""
    tree = yaml.safe_load(store.read_text(*path))
    if not tree["data"].get("eval"):
        tree.pop("eval_every", None)  # recorded with its default, which without data.eval can't take effect
    return validate(TrainSpec, {**tree, "root": store.uri}, where=f"{asked}: {store.path(*path)}")


def rebase(ask: RebaseAsk, *, on_progress: OnProgress | None = None) -> RebaseReport:
    """Train each task on the new base and answer its held-out rows with both. Needs an initialised Ray.

    New versions are published without an alias. Finished runs and measured answers are reused. Raises as `train` does.
    """
    compared = []
    for pair in pairs_of(ask):

        def tell(now: Progress, alias: str = pair.alias) -> None:
            if on_progress is not None:
                on_progress(alias, now)

        train(pair.old)  # finished: only its answers are measured, where they are not yet
        report = train(pair.new, on_progress=tell)
        compared.append(Compared.from_records(pair, report.published_name, report.reused, ask.alpha))
    return rebase_report(ask, compared)


@dataclass(frozen=True)
class Compared:
    """One task's answers on both bases."""

    pair: RebasedTask
    new_adapter: str
    reused: bool
    metric: Metric
    old: Level
    new: Level
    test: PairedTest
    about: str

    @classmethod
    def from_records(cls, pair: RebasedTask, new_adapter: str, reused: bool, alpha: float) -> "Compared":
        """From what both runs recorded."""
        old, new = task_scores(pair.old), task_scores(pair.new)
        assert old.probe.units == new.probe.units, "both answered the same rows"
        metric, units, seed = new.task_metric, new.probe.units, pair.new.seed
        sides = [level(one.values[metric.name], metric, units, alpha, seed) for one in (old, new)]
        test = paired(new.values[metric.name], old.values[metric.name], metric, units, alpha, seed)
        return cls(pair, new_adapter, reused, metric, sides[0], sides[1], test, new.probe.about)


def rebase_report(ask: RebaseAsk, compared: Sequence[Compared]) -> RebaseReport:
    """Tasks that gain, lose or are undecided, by Benjamini-Hochberg over the tasks."""
    adjusted = stats.benjamini_hochberg([one.test.p_value for one in compared])
    tasks = tuple(_task_record(ask, one, p) for one, p in zip(compared, adjusted, strict=True))
    known = {one.metric.name: one.metric for one in compared}
    infos = tuple(
        MetricInfo(name=one.name, unit=one.unit, better=one.better, kind=one.kind, meaning=one.meaning)
        for one in known.values()
    )
    told = {word: [task.alias for task in tasks if task.outcome == word] for word in ("gains", "loses", "undecided")}
    sentence = "; ".join(f"{word}: {', '.join(names)}" for word, names in told.items() if names)
    return RebaseReport(
        old_bases=tuple(dict.fromkeys(one.pair.old.base.uri for one in compared)),
        new_base=ask.base,
        alpha=ask.alpha,
        tasks=tasks,
        metrics=infos,
        sentence=sentence[:1].upper() + sentence[1:] + ". Nothing was promoted.",
    )


def _task_record(ask: RebaseAsk, one: Compared, p: float) -> Rebased:
    task, _, name = one.pair.alias.partition("@")
    verdict = stats.decide(one.test.value, p, False, ask.alpha, higher=one.metric.better == "higher")
    recipe = {
        "asked": one.about,
        "old": one.pair.old.base.uri,
        "new": ask.base,
        "quant": one.pair.new.quant.kind,
        "interval": one.test.interval,
        "test": one.test.test,
        "adjust": "bh",
    }
    root = "" if ask.root == TrainSpec.model_fields["root"].default else f" --root {ask.root}"
    move = name if name != one.pair.manifest.version else "latest"
    return Rebased(
        alias=one.pair.alias,
        metric=one.metric.name,
        old_adapter=one.pair.manifest.ref,
        new_adapter=one.new_adapter,
        old=one.old,
        new=one.new,
        test=one.test,
        p_adjusted=p,
        reused=one.reused,
        outcome="gains" if verdict == "better" else "loses" if verdict == "worse" else "undecided",
        promote=f"graftwork adapters promote {one.new_adapter} {move}{root}",
        signature=signature(one.metric.name, one.test.n, recipe),
    )


def write_rebase(ask: RebaseAsk, report: RebaseReport) -> BuiltReport:
    """report.json and report.html in runs/rebase-<digest8>/. Raises StorageError."""
    made = "\n".join(f"{task.old_adapter} {task.new_adapter}" for task in report.tasks)
    run = RunPaths(Store(ask.root), "rebase", hashlib.sha256(made.encode()).hexdigest())
    page = ReportInput(
        title="Old base and new base",
        subtitle=run.run_id,
        verdict=report.sentence,
        rebase=report,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        provenance=collect(0),
    )
    return build(page, run.store, *run.file())


@dataclass(frozen=True)
class TaskScores:
    """A value a question for each metric, the first metric of `probe` being the task's own."""

    probe: Probe
    values: Mapping[str, Floats]

    @property
    def task_metric(self) -> Metric:
        """The task's metric."""
        return self.probe.metrics[0]


def with_task(spec: TrainSpec, rows: int | None = None) -> TrainSpec:
    """The spec with the task measured and nothing else; `rows`: of the held-out ones, where the spec names no number.

    What else was asked is left for a run of its own. No alias is moved.
    """
    asked = spec.outcomes.task.model_dump(mode="json", exclude_unset=True) if spec.outcomes.task else {}
    given = {"rows": rows, **asked} if rows is not None else asked
    return spec.with_({"outcomes": {"task": given, "alpha": spec.outcomes.alpha}, "alias": None})


def task_scores(spec: TrainSpec) -> TaskScores:
    """Of a spec by `with_task` that `train` has finished. Reads what was said; computes nothing. Raises RunError."""
    run = ResolvedRun.resolve(spec)
    [probe] = run.probes
    found = read_parts(run.paths).get("task")
    if found is None:
        raise RunError(
            f"outcomes.task of run {run.paths.run_id}",
            "it was not measured",
            "a published run stays finished when its outcomes fail",
            "run the same command again; the run's warning names the cause",
        )
    return TaskScores(probe, probe.scores(found.after))


EVAL_ROWS = 200
"""Held-out rows that are answered, where the spec names no number."""

OnCurveProgress = Callable[[Progress], None]


def curve_specs(spec: TrainSpec, sizes: Sequence[int]) -> list[TrainSpec]:
    """An ordinary run a size. Raises UserErrors of all kinds, before anything starts."""
    asked = f"--curve {','.join(map(str, sizes))}"
    if len(sizes) < 2 or sorted(set(sizes)) != list(sizes) or sizes[0] < 1:
        found = "one size alone" if len(sizes) == 1 else "they do not rise"
        raise ConfigError(
            asked, found, "two sizes or more, each larger than the one before", "write --curve 50,100,200,400"
        )
    if spec.data.eval is None:
        raise ConfigError(asked, "data.eval is not given", "sizes are compared on held-out rows", "give data.eval")
    specs = [with_task(spec, EVAL_ROWS).with_({"data.train_rows": size}) for size in sizes]
    try:
        check(specs[0])
    except UserError as error:
        raise type(error)(f"{asked}: {error.subject}", error.problem, error.rule, error.hint) from None
    source = spec.data.source("train", spec.seed)
    there = len(read_rows(source, limit=sizes[-1], need="train"))
    if there < sizes[-1]:
        raise ConfigError(
            asked, f"{source} has {there} rows", "no size is larger than the data", f"end with {there} or less"
        )
    return specs


def curve(spec: TrainSpec, sizes: Sequence[int], *, on_progress: OnCurveProgress | None = None) -> CurveReport:
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
            rows=size,
            run_id=report.run_id,
            adapter=report.published_name,
            reused=report.reused,
            steps=report.steps,
            loss=level(found.values["nats"], NATS, units, alpha, spec.seed),
            score=level(found.values[own.name], own, units, alpha, spec.seed),
        )
        for size, report, found in zip(sizes, reports, scores, strict=True)
    )
    tests = [
        (
            paired(after.values["nats"], before.values["nats"], NATS, units, alpha, spec.seed),
            paired(after.values[own.name], before.values[own.name], own, units, alpha, spec.seed),
        )
        for before, after in zip(scores, scores[1:], strict=False)
    ]
    adjusted = stats.holm([loss.p_value for loss, _ in tests])
    steps = tuple(
        CurveStep(
            rows=rows,
            before=before,
            loss=loss,
            score=score,
            p_adjusted=p,
            verdict=stats.decide(loss.value, p, False, alpha, higher=False),
        )
        for rows, before, (loss, score), p in zip(sizes[1:], sizes, tests, adjusted, strict=False)
    )
    recipe = {
        "asked": scores[0].probe.about,
        "base": spec.base.uri,
        "quant": spec.quant.kind,
        "seed": spec.seed,
        "test": tests[0][0].test,
        "interval": tests[0][0].interval,
    }
    return CurveReport(
        name=spec.name,
        metric=own.name,
        alpha=alpha,
        n=len(units),
        points=points,
        steps=steps,
        sentence=sentence(steps),
        signature=signature(own.name, len(units), recipe),
    )


def sentence(steps: Sequence[CurveStep]) -> str:
    """The verdict on more examples, as far as these sizes show."""
    last = steps[-1]
    fell = f"from {last.before} to {last.rows} examples the held-out loss"
    change = f"{last.loss.value:+.3f} [{last.loss.low:+.3f}, {last.loss.high:+.3f}] nats a token"
    if last.verdict == "better":
        return f"More examples would still help: {fell} changed by {change}."
    if last.verdict == "worse":
        return f"More examples of this kind hurt: {fell} rose by {change}."
    flat = last.before  # of the steps behind the last one whose change a test shows
    for step in reversed(steps):
        if step.verdict in ("better", "worse"):
            break
        flat = step.before
    return (
        f"Flat from {flat} examples on: {fell} changed by {change}, and {last.loss.detects:.3f} would have been seen."
    )


def write_curve(spec: TrainSpec, report: CurveReport) -> BuiltReport:
    """report.json and report.html in runs/<name>-curve-<digest8>/. Raises StorageError."""
    digest = hashlib.sha256("\n".join(point.run_id for point in report.points).encode()).hexdigest()
    run = RunPaths(Store(spec.root), f"{spec.name}-curve"[:63], digest)
    page = ReportInput(
        title=f"{spec.name}: how many examples?",
        subtitle=run.run_id,
        verdict=report.sentence,
        curve=report,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        provenance={**collect(spec.seed), "spec": spec.model_dump(mode="json")},
    )
    return build(page, run.store, *run.file())
