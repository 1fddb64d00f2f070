"""The demo: all stages in order, live traffic during an adapter swap, and the report.

Each stage prints one line and adds its record to the report.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import psutil

from graftwork import report
from graftwork.artifacts.publish import promote
from graftwork.base.load import resolve
from graftwork.cli.render import duration, echo, gib, print_table, progress_bar
from graftwork.cluster.session import Session, session
from graftwork.datasets.rows import read_rows
from graftwork.environment import collect
from graftwork.planning.memory import StagePlan
from graftwork.report.format import score
from graftwork.report.render import ReportInput
from graftwork.report.schema import (
    AdapterLatency,
    CompareReport,
    PlanRow,
    ServingRecord,
    StageTime,
    SwapRecord,
    TrainRun,
)
from graftwork.report.sweep_schema import SweepRecord
from graftwork.serving.api.status import replica_stats
from graftwork.serving.arms import base_name
from graftwork.serving.client import ChatCall
from graftwork.serving.deploy import Endpoint, deploy
from graftwork.serving.evaluation.run import CompareOutcome, run_compare
from graftwork.serving.evaluation.spec import CompareSpec
from graftwork.serving.load_test import SwapReport, swap_under_load
from graftwork.stages.demo_spec import BurstSpec, DemoSpec, DemoSpecs, load_specs
from graftwork.stages.plans import plan_spec
from graftwork.storage.store import RunPaths, Store
from graftwork.training.report import Progress, TrainReport, train_run
from graftwork.training.run import train
from graftwork.training.spec import TrainSpec
from graftwork.tuning.report import SweepEnd, sweep_record
from graftwork.tuning.run import tune
from graftwork.tuning.trials import TuneReport


@dataclass(frozen=True)
class DemoReport:
    """URIs of the demo's report, and its verdict in a sentence."""

    json_uri: str
    html_uri: str
    verdict: str


Bar = Callable[[int, int, str], None]
"""Shows (done, total, text)."""
STAGING = "next"
"""The update is trained under the alias `next`, which no request names; the live alias takes it over under load."""


@dataclass
class DemoState:
    """Results of the stages so far."""

    specs: DemoSpecs
    quiet: bool
    predicted: dict[str, StagePlan] = field(default_factory=dict)
    stages: list[StageTime] = field(default_factory=list)
    plan: list[PlanRow] = field(default_factory=list)
    tuned: SweepRecord | None = None
    trained: list[TrainRun] = field(default_factory=list)
    serving: ServingRecord | None = None
    compared: CompareReport | None = None

    def done(
        self, stage: str, started: float, found: str, *, reused: bool = False, peak_bytes: int | None = None
    ) -> None:
        """Record a stage: its time, its finding, and its prediction next to what it took."""
        wall_s = time.monotonic() - started
        self.stages.append(StageTime(stage=stage, wall_s=wall_s, reused=reused, found=found))
        line = self.predicted.get(stage)
        if line is not None:
            self.plan.append(
                PlanRow(
                    stage=stage,
                    predicted_bytes=line.peak_bytes_per_process,
                    predicted_s=line.seconds,
                    actual_bytes=None if reused else peak_bytes,
                    actual_s=None if reused else wall_s,
                )
            )
        if not self.quiet:
            echo(f"[{stage}] {found} ({'reused' if reused else duration(wall_s)})")

    @contextmanager
    def bar(self, label: str) -> Iterator[Bar]:
        with progress_bar(label, self.quiet) as update:
            yield update


def run_demo(demo: DemoSpec, folder: Path, on: str = "local", *, quiet: bool = False) -> DemoReport:
    """Run every stage of the main job on the Ray that `on` names, and write its report.

    What is done is reused: runs, sweeps, answers and bases are content-hashed. Raises UserError before anything starts.
    """
    job = DemoState(load_specs(demo, folder), quiet)
    prepare(job)
    plan(job, folder)
    specs = job.specs  # the update trains while the endpoint serves: both must be placed, sharing the cores in turn
    needed = int(specs.update.num_workers * specs.update.cpus_per_worker + specs.serve.num_cpus) + 1
    with session(on, num_cpus=max(psutil.cpu_count() or 1, needed)) as here:
        tune_stage(job, here)
        train_stages(job)
        with deploy(job.specs.serve) as endpoint:
            serve_stage(job, endpoint)
            compare_stage(job, endpoint)
    return report_stage(job)


def prepare(job: DemoState) -> None:
    """Fetch and convert the base, build the recipes: once per machine."""
    started = time.monotonic()
    with job.bar("base and data"):
        base = resolve(job.specs.compare.base)
        trained = (str(spec.data.source("train", spec.seed)) for spec in job.specs.train)
        uris = dict.fromkeys([*trained, job.specs.compare.eval])
        # recipes are built on first use
        rows = ", ".join(f"{len(read_rows(uri, need='train'))} rows in {uri.removeprefix('recipe://')}" for uri in uris)
    job.done("prepare", started, f"base {base.digest[:12]} verified; {rows}")


def plan(job: DemoState, folder: Path) -> None:
    """Predict memory and time of every stage, and refuse what cannot fit."""
    started = time.monotonic()
    lines = plan_spec(job.specs.demo, folder)
    job.predicted = {line.stage: line for line in lines}
    if not job.quiet:
        print_table(
            "plan",
            ("stage", "processes", "peak each", "time", "fits"),
            [(x.stage, x.processes, gib(x.peak_bytes_per_process), duration(x.seconds), x.verdict) for x in lines],
        )
    total = sum(line.seconds for line in lines)
    peak = max(line.total_bytes for line in lines)
    job.done("plan", started, f"{duration(total)} predicted in all, {gib(peak)} at the peak")


def tune_stage(job: DemoState, here: Session) -> None:
    """The sweep; its winner's keys go into the training runs."""
    started = time.monotonic()
    with job.bar("tune") as bar:
        found: TuneReport = here.run(tune, job.specs.tune, on_progress=lambda p: bar(p.done, p.total, p.text))
    job.specs = job.specs.with_best(found.best)
    ended = SweepEnd("finished", found.eval_rows, found.sampler, found.wall_s, found.choice, found.reused)
    job.tuned = sweep_record(job.specs.tune, found.trials, ended)
    best = " ".join(f"{key}={value}" for key, value in found.best.items())
    stopped = sum(trial.state == "stopped" for trial in found.trials)
    job.done(
        "tune",
        started,
        f"{len(found.trials)} trials, {stopped} stopped early; best {best}",
        reused=found.reused,
        peak_bytes=found.peak_rss_bytes,
    )


def train_stages(job: DemoState) -> None:
    """One adapter after the other, each on all workers."""
    for spec in job.specs.train:
        started = time.monotonic()
        stage = f"train {spec.name}"
        with job.bar(stage) as bar:
            found = train(spec, on_progress=partial(_show_progress, bar))
        if spec.alias:  # an earlier run of the job may have swapped its update in
            promote(Store(spec.root), spec.name, spec.alias, found.version)
        if spec.name == job.specs.update.name:
            job.specs = replace(job.specs, update=job.specs.update.with_({"init_from": found.adapter}))
        job.trained.append(train_run(found, spec))
        job.done(
            stage, started, _describe_run(found), reused=found.reused, peak_bytes=max(found.peak_rss_bytes_per_worker)
        )


def _show_progress(bar: Bar, progress: Progress) -> None:
    text = f"loss {progress.loss:.3f}  {progress.tokens_per_s:.0f} tok/s"
    bar(progress.step, progress.total_steps, text)


def _describe_run(found: TrainReport) -> str:
    held_out = f"; {found.held_out}" if found.held_out else ""
    return (
        f"{found.adapter}: {found.rows_text}, {found.steps} steps, loss {found.train_loss[0][1]:.3f} -> "
        f"{found.train_loss[-1][1]:.3f}{held_out}, {found.tokens_per_s:.0f} tok/s"
    )


def serve_stage(job: DemoState, endpoint: Endpoint) -> None:
    """Live traffic to the base and every adapter while an update is trained, published and swapped in.

    The update moves under its live alias when half of the burst is answered. Requests that fail are counted.
    """
    started = time.monotonic()
    update, burst = job.specs.update, job.specs.demo.burst
    live = f"{update.name}@{update.alias or 'latest'}"
    with job.bar("serve: burst and swap") as bar:
        trained = train(update.with_({"alias": STAGING}), on_progress=lambda p: bar(p.step, p.total_steps, ""))
        calls = _burst_calls(endpoint, update, burst, job.specs.compare)
        swap = asyncio.run(
            swap_under_load(endpoint, Store(update.root), live, trained.version, calls, concurrency=burst.concurrency)
        )
        engine = asyncio.run(_engine_stats(endpoint))
    job.serving = _swap_record(swap, engine)
    by_version = ", ".join(f"{version} answered {n}" for version, n in swap.by_version.items())
    job.done(
        "serve",
        started,
        f"{swap.requests} live requests, {swap.failed} failed, up to "
        f"{job.serving.max_adapters_in_batch} adapters in one batch; {swap.adapter} swapped in "
        f"{swap.swap_ms:.0f} ms: "
        f"{by_version}",
        peak_bytes=engine.get("peak_rss_bytes"),
    )


def compare_stage(job: DemoState, endpoint: Endpoint) -> None:
    """Every arm answers every held-out question on the endpoint that has just served."""
    started = time.monotonic()
    with job.bar("compare") as bar:
        found: CompareOutcome = run_compare(
            job.specs.compare, endpoint=endpoint, on_progress=lambda p: bar(p.done, p.total, f"{p.failed} failed")
        )
    job.compared = found.report
    primary = found.report.primary
    each = ", ".join(f"{arm.name} {score(arm.scores[primary].value)}" for arm in found.report.arms)
    size = f"{found.report.n} questions x {len(found.report.arms)} arms"
    job.done(
        "compare",
        started,
        f"{size}; {'facts and form together' if primary == 'both' else primary}: {each}",
        reused=found.asked == 0,
        peak_bytes=found.stats.get("peak_rss_bytes"),
    )


def report_stage(job: DemoState) -> DemoReport:
    """Write report.json and report.html into the job's run folder."""
    started = time.monotonic()
    demo = job.specs.demo
    assert job.compared is not None
    store = Store(demo.root)
    key = RunPaths(store, demo.name, demo.identity()).file()
    job.done("report", started, "written")
    made = ReportInput(
        title="Finetuned or RAG?",
        subtitle=f"{job.specs.compare.name} on {base_name(job.specs.compare.base.uri)}",
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        compare=job.compared,
        tune=job.tuned,
        train=tuple(job.trained),
        plan=tuple(job.plan),
        serving=job.serving,
        stages=tuple(job.stages),
        provenance=collect(job.specs.compare.seed),
    )
    written = report.build(made, store, *key)
    if not job.quiet:
        echo(f"\n{job.compared.advice.sentence}\n\nreport: {written.html_uri}")
    return DemoReport(written.json_uri, written.html_uri, job.compared.advice.sentence)


def _burst_calls(endpoint: Endpoint, update: TrainSpec, burst: BurstSpec, compare: CompareSpec) -> list[ChatCall]:
    """The base and the adapters in turn, each with questions of its own task."""
    own = [row.messages[0] for row in read_rows(update.data.source("train", update.seed), limit=64, need="train")]
    other = [row.messages[0] for row in read_rows(compare.eval, limit=64, need="eval")]
    models = [endpoint.base, *(f"{endpoint.base}:{ref}" for ref in endpoint.spec.adapters)]
    return [
        ChatCall(model, (asked[number % len(asked)],), max_tokens=burst.max_new_tokens)
        for number, model in enumerate(islice(cycle(models), burst.requests))
        for asked in (own if f":{update.name}@" in model else other,)
    ]


async def _engine_stats(endpoint: Endpoint) -> dict[str, Any]:
    return replica_stats(await endpoint.handle.snapshot.remote())


def _swap_record(swap: SwapReport, engine: Mapping[str, Any]) -> ServingRecord:
    latency = tuple(
        AdapterLatency(name=model, n=total.n, ttft_ms=swap.ttft_ms.get(model), latency_ms=total)
        for model, total in swap.latency_ms.items()
    )
    return ServingRecord(
        latency=latency,
        swap=SwapRecord(
            alias=swap.adapter,
            old_version=swap.old or "none",
            new_version=swap.new,
            requests=swap.requests,
            failed=swap.failed,
            answers_by_version=swap.by_version,
            swap_ms=swap.swap_ms,
        ),
        max_adapters_in_batch=engine["engine"]["most_adapters_in_step"],
    )
