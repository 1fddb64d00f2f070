"""A study as a run: train what is not trained, measure, judge, report. Each stage prints one line of what it found."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from examples.studies.claims import judge
from examples.studies.measure import Measured, check_measure, run_measure
from examples.studies.report import StudyPage, section
from examples.studies.results import measure_record, sentence
from examples.studies.schema import StudyAdapter, StudyReport
from examples.studies.spec import MeasureSpec, StudySpec
from graftwork import config, report
from graftwork.base import load as base_model
from graftwork.base.support import check_serving
from graftwork.cli.render import duration, echo, progress_bar
from graftwork.cluster.session import Session
from graftwork.environment import collect
from graftwork.errors import ConfigError
from graftwork.planning.hardware import Accelerators, with_gpus
from graftwork.report.schema import StageTime, TrainRun
from graftwork.serving.arms import base_name
from graftwork.storage.store import RunPaths, Store
from graftwork.training.report import TrainReport, train_run
from graftwork.training.run import check, train
from graftwork.training.spec import TrainSpec

ON_CPUS = Accelerators(0, owner="a study")
"""Its measures compare adapters on CPUs (`num_cpus`): `auto` of an adapter's spec is no GPU."""


@dataclass(frozen=True)
class StudyOutcome:
    """A finished study."""

    report: StudyReport
    json_uri: str
    html_uri: str


def check_study(spec: StudySpec, folder: Path) -> list[TrainSpec]:
    """The study's train specs, all of it found sound before a cluster is asked for. Raises UserErrors of all kinds.

    folder: where the study's file lies.
    """
    check_serving(spec)
    adapters = [adapter_spec(spec, number, folder) for number in range(len(spec.adapters))]
    for adapter in adapters:
        check(adapter)
    for measure in spec.measures:
        check_measure(spec, measure)
    return adapters


def cpus_of(spec: StudySpec, adapters: Sequence[TrainSpec]) -> int:
    """Logical CPUs that a private Ray needs: training and measuring come one after the other."""
    training = max((adapter.num_workers * adapter.cpus_per_worker for adapter in adapters), default=0.0)
    return max(psutil.cpu_count() or 1, int(training) + 1, int(spec.num_cpus))


def run_study(spec: StudySpec, adapters: Sequence[TrainSpec], here: Session, *, quiet: bool = False) -> StudyOutcome:
    """Train, measure, judge, report. adapters: from `check_study`.

    What is done is reused: bases, training runs, answers and likelihoods are content-hashed. Raises UserError before
    anything is asked, RunError.
    """
    stages = Stages(here, quiet)
    trained = [stages.train(adapter) for adapter in adapters]
    versions = {adapter.name: found.version for adapter, found in zip(adapters, trained, strict=True)}
    measured = [stages.measure(spec, measure, versions) for measure in spec.measures]
    records = tuple(_adapter(adapter, found) for adapter, found in zip(adapters, trained, strict=True))
    made = study_report(spec, records, measured)
    runs = tuple(train_run(found, adapter) for adapter, found in zip(adapters, trained, strict=True))
    return _written(spec, made, runs, stages)


def adapter_spec(spec: StudySpec, number: int, folder: Path) -> TrainSpec:
    """The train spec of the study's adapter of that number, with the study's root and base. Raises ConfigError."""
    wanted = spec.adapters[number]
    found = config.load(folder / wanted.file, expect="train")
    assert isinstance(found, TrainSpec), "kind train is a TrainSpec"
    shared = {"root": spec.root, "base": spec.base.model_dump(mode="json"), "quant": spec.quant.model_dump(mode="json")}
    try:
        return with_gpus(found.with_({**shared, **wanted.set}), ON_CPUS)[0]
    except ConfigError as error:
        where = f"adapters.{number}.set: {error.subject.removeprefix('override: ')}"
        raise ConfigError(where, error.problem, error.rule, error.hint, error.also) from None


def study_report(spec: StudySpec, adapters: tuple[StudyAdapter, ...], measured: list[Measured]) -> StudyReport:
    """The study's result, the same bytes for the same adapters, scores and seed."""
    digest = base_model.resolve(spec.base).digest
    claims = judge(spec, {found.spec.name: found.scores for found in measured})
    return StudyReport(
        name=spec.name,
        title=spec.title,
        paper=spec.paper,
        deviations=spec.deviations,
        base=base_name(spec.base.uri),
        base_digest=digest,
        alpha=spec.alpha,
        equivalence_margin=spec.equivalence_margin,
        seed=spec.seed,
        adapters=adapters,
        measures=tuple(measure_record(spec, found, digest) for found in measured),
        claims=claims,
        sentence=sentence(claims),
    )


class Stages:
    """Runs stages and notes how long each took; says so unless quiet."""

    def __init__(self, here: Session, quiet: bool) -> None:
        self.here, self.quiet = here, quiet
        self.times: list[StageTime] = []

    def train(self, spec: TrainSpec) -> TrainReport:
        """Train one adapter, or find it trained."""
        started = time.monotonic()
        with progress_bar(f"train {spec.name}", self.quiet) as bar:
            found = self.here.run(train, spec, on_progress=lambda p: bar(p.step, p.total_steps, f"loss {p.loss:.3f}"))
        said = f"{found.adapter}: {found.rows} rows, {found.steps} steps, loss {found.train_loss[-1][1]:.3f}"
        self._done(f"train {spec.name}", started, said, found.reused)
        return found

    def measure(self, spec: StudySpec, measure: MeasureSpec, versions: dict[str, str]) -> Measured:
        """Measure all arms, or find them measured."""
        started = time.monotonic()
        with progress_bar(f"measure {measure.name}", self.quiet) as bar:
            found = self.here.run(run_measure, spec, measure, versions, on_progress=lambda p: bar(p.done, p.total, ""))
        said = f"{len(found.scores.units)} questions x {len(measure.arms)} arms, {found.failed} failed"
        self._done(f"measure {measure.name}", started, said, found.reused)
        return found

    def _done(self, stage: str, started: float, found: str, reused: bool) -> None:
        wall_s = time.monotonic() - started
        self.times.append(StageTime(stage=stage, wall_s=wall_s, reused=reused, found=found))
        if not self.quiet:
            echo(f"[{stage}] {found} ({'reused' if reused else duration(wall_s)})")


def _adapter(spec: TrainSpec, found: TrainReport) -> StudyAdapter:
    return StudyAdapter(
        name=spec.name,
        version=found.version,
        method=train_run(found, spec).method,
        rows=found.rows,
        steps=found.steps,
        tokens=found.tokens,
        loss=found.train_loss[-1][1],
    )


def _written(spec: StudySpec, made: StudyReport, runs: tuple[TrainRun, ...], stages: Stages) -> StudyOutcome:
    """study.json, report.json and report.html in the study's run folder."""
    run = RunPaths(Store(spec.root), spec.name, spec.identity())
    run.store.write_json(made.model_dump(mode="json"), *run.file("study.json"))
    page = StudyPage(
        title=made.title,
        subtitle=made.base,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        verdict=made.sentence,
        study=made,
        train=runs,
        stages=tuple(stages.times),
        provenance=collect(spec.seed),
    )
    written = report.build(page, run.store, *run.file(), section=section(made))
    return StudyOutcome(made, written.json_uri, written.html_uri)
