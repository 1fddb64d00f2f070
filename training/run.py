"""Driver of a run: resolve the spec once, train it on workers, publish the result, write the page."""

import contextlib
import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from graftwork import environment
from graftwork.base import load as base_model
from graftwork.base import source
from graftwork.base.load import ResolvedBase
from graftwork.base.support import check_training
from graftwork.cluster.jobs.fencing import Fence, SupersededError
from graftwork.config import canonical_json
from graftwork.errors import GraftworkError, Interrupted, StorageError
from graftwork.planning.hardware import accelerators_here, with_gpus
from graftwork.storage.store import RunPaths, Store
from graftwork.training.autotune import resolve_auto_for_run
from graftwork.training.checkpoint import Checkpoints
from graftwork.training.evaluation.questions import Probe, probes_of
from graftwork.training.evaluation.report import missing, outcomes_report, read_parts
from graftwork.training.objectives.rows import PreparedData, prepare
from graftwork.training.publish import publish, still_there
from graftwork.training.ray_worker import fit
from graftwork.training.report import (
    OnProgress,
    TrainReport,
    memory_notes,
    plan_of_run,
    progress_told,
    write_page,
)
from graftwork.training.run_diff import warn_about_similar_runs
from graftwork.training.run_lock import OVERTAKES_S, run_lock
from graftwork.training.spec import TrainSpec
from graftwork.training.strategies import WEIGHTS_SHARDED, check_here, check_rows
from graftwork.training.warm_start import parent_of, pin_init, pin_stack
from graftwork.training.worker_messages import LoopResult, StepReport, TrainJob, read_steps

log = logging.getLogger("graftwork.training")


@dataclass(frozen=True)
class ResolvedRun:
    """A spec with all that it names found: what it trains, and where it is kept."""

    spec: TrainSpec
    base: ResolvedBase
    data: PreparedData
    paths: RunPaths
    probes: tuple[Probe, ...] = ()
    """Its outcomes, as questions and scores."""
    notes: tuple[str, ...] = ()
    """The numbers that `auto` was resolved to, with the reasons."""

    @classmethod
    def resolve(cls, spec: TrainSpec) -> "ResolvedRun":
        """Resolve base and data. Raises UserErrors of all kinds, before anything starts or is written."""
        spec, chosen = with_gpus(spec, accelerators_here())
        check_here(spec)
        base = base_model.resolve(spec.base)
        check_training(spec, base.config)
        data, probes = prepare(spec), tuple(probes_of(spec))
        check_rows(spec, len(data.eval) if data.eval is not None else 0)

        spec = pin_stack(spec, base)

        def paths(init: str | None) -> RunPaths:
            what = {"spec": spec.recipe(), "base": base.digest, "data": data.digest(), "init": init}
            what |= {"below": spec.base_adapter} if spec.base_adapter else {}
            digest = hashlib.sha256(canonical_json(what).encode()).hexdigest()
            return RunPaths(Store(spec.root), spec.name, digest)

        pinned = pin_init(spec, base, lambda version: paths(version).run_id)
        # Ray Train moves each worker into a folder of its own, where a relative place is another one
        placed = pinned.with_({"root": Store(spec.root).uri, "base.uri": source.absolute(spec.base.uri)})
        return cls(placed, base, data, paths(parent_of(placed)), probes, (chosen,) if chosen and spec.gpus else ())

    @property
    def root(self) -> str:
        """Root of the store."""
        return self.spec.root

    def notes_before_start(self) -> list[str]:
        """Ignored keys of the rows, held-out rows that are trained on, the difference from an unfinished run."""
        return [*self.warnings, *warn_about_similar_runs(self.spec, self.paths)]

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings that are printed before the run starts."""
        return (*self.data.warnings, *(warning for probe in self.probes for warning in probe.warnings))

    def with_auto_resolved(self) -> "ResolvedRun":
        """Without `auto`, and why it is so. Raises ConfigError where nothing fits."""
        spec, notes = resolve_auto_for_run(self.spec, self.base, self.data.train, self.paths)
        return replace(self, spec=spec, notes=(*self.notes, *notes))

    def with_retries(self) -> "ResolvedRun":
        """The same run, which waits out an outage of its store."""
        store = self.paths.store.with_retries(self.spec.checkpoints.outage_s)
        return replace(self, paths=replace(self.paths, store=store))


def check(spec: TrainSpec) -> list[str]:
    """Resolve a spec and return its notes before the start. Raises UserErrors of all kinds."""
    return ResolvedRun.resolve(spec).notes_before_start()


def run_paths(spec: TrainSpec) -> RunPaths:
    """Where a spec's run is kept. Its digest covers the contents of base and data, not where they lie."""
    return ResolvedRun.resolve(spec).paths


def train(spec: TrainSpec, *, on_progress: OnProgress | None = None) -> TrainReport:
    """Resolve a spec, then `train_resolved`. Raises UserErrors before anything starts."""
    return train_resolved(ResolvedRun.resolve(spec), on_progress=on_progress)


def train_resolved(
    run: ResolvedRun, *, on_progress: OnProgress | None = None, workers: Callable[[TrainJob], LoopResult] = fit
) -> TrainReport:
    """Train and publish one adapter or base; needs an initialised Ray. The same spec again returns the known report.

    An unfinished run goes on from its last checkpoint. Writes runs/<name>-<digest8>/ and adapters/<name>/<version>/
    (bases/<name>/<version>/ where all weights are trained).
    `workers` runs the loop: on Ray Train's workers, or in a child process of this machine.
    Raises ConfigError where no automatic value fits; ClusterError when the workers do not fit; RunError when the work
    failed or another process runs it; Interrupted on Ctrl-C.
    """
    fence = Fence.from_environment()
    with run_lock(run.paths, wait_s=OVERTAKES_S if fence is not None else 0.0):
        found = _find_report(run)
        if found is not None:
            return _finalize_report(run, found, None)
        run = run.with_auto_resolved().with_retries()
        _write_status(run, "running")
        _write_facts(run)
        try:
            with progress_told(run.paths, on_progress or (lambda _: None)):
                result = workers(_job(run, fence))
            if fence is not None:
                fence.require(run.spec.checkpoints.outage_s)
            steps = read_steps(run.paths)
            report = _publish_result(run, result, steps)
        except (KeyboardInterrupt, Interrupted):
            _write_status(run, "interrupted")
            raise _interrupted(run) from None
        except SupersededError:
            raise  # the run is another attempt's now, and so is its status
        except (GraftworkError, OSError) as error:
            with contextlib.suppress(StorageError):  # it must not hide what happened
                _write_status(run, "failed", patience_s=0, error=str(error))
            raise
        _write_status(run, "finished", report=report.as_dict())
        return _finalize_report(run, report, steps)


def _finalize_report(run: ResolvedRun, report: TrainReport, steps: Sequence[StepReport] | None) -> TrainReport:
    """Return the report with its outcomes and its page, or with a note on what is missing. steps: None reads them.

    The run has published by now, so that nothing here can fail it. A rerun makes what is missing.
    """
    try:
        return _with_page(run, report, steps)
    except (Interrupted, SupersededError):
        raise
    except Exception as error:
        log.debug("run %s: what follows publishing", run.paths.run_id, exc_info=error)
        missing_part = "report.html" if not run.probes else "outcomes and report.html"
        why = f"{type(error).__name__}: {error}"
        if isinstance(error, GraftworkError):
            why = f"{error.subject}: {error.problem}"
        again = "the run is published; run the same command again to make what is missing"
        note = f"warning: {missing_part} could not be made ({why}); {again}"
        return replace(report, notes=(*report.notes, note))


def _with_page(run: ResolvedRun, report: TrainReport, steps: Sequence[StepReport] | None) -> TrainReport:
    """The report with its outcomes and its page. What was not measured with the training is measured now."""
    due = missing(run.paths, [probe.part for probe in run.probes])
    if due:
        whole = run.spec.with_({"strategy": {"kind": "ddp"}})  # each worker holds the whole model
        try:
            fit(TrainJob(whole, run.data.shared(run.paths.store), run.paths, parts=due))
        except KeyboardInterrupt:
            raise _interrupted(run) from None
    outcomes = outcomes_report(run.spec, run.probes, read_parts(run.paths)) if run.probes else None
    if not run.probes and report.reused and run.paths.store.exists(*run.paths.file("report.html")):
        return replace(report, page=run.paths.store.path(*run.paths.file("report.html")))
    page, lacks = write_page(run.paths, run.spec, report, outcomes, read_steps(run.paths) if steps is None else steps)
    told = outcomes.model_dump(mode="json") if outcomes else None
    return replace(report, page=page.html_uri, outcomes=told, notes=(*report.notes, *lacks))


def _job(run: ResolvedRun, fence: Fence | None) -> TrainJob:
    parts = (
        () if run.spec.strategy.kind in WEIGHTS_SHARDED else missing(run.paths, [probe.part for probe in run.probes])
    )
    return TrainJob(run.spec, run.data.shared(run.paths.store), run.paths, parts=parts, fence=fence)


def _find_report(run: ResolvedRun) -> TrainReport | None:
    """The recorded report of a run whose adapter, or base, is still there; a lacking alias is set again."""
    store = run.paths.store
    if not store.exists(*run.paths.status()):
        return None
    status = store.read_json(*run.paths.status())
    if status["state"] != "finished":
        return None
    report = TrainReport.from_dict(status["report"], reused=True)
    if not still_there(run, report):
        return None  # removed since: the last checkpoint publishes it again
    return report


def _publish_result(run: ResolvedRun, result: LoopResult, steps: Sequence[StepReport]) -> TrainReport:
    """Publish what the last checkpoint holds and put the report together."""
    memory = memory_notes(run.paths, _peaks(run.spec, result))
    made = publish(run, result, steps)
    return TrainReport(
        run_id=run.paths.run_id,
        adapter=made.adapter,
        base=made.base,
        version=made.version,
        reused=False,
        steps=result.steps,
        rows=len(run.data.train),
        dropped_rows=run.data.dropped,
        eval_rows=len(run.data.eval) if run.data.eval is not None else 0,
        dropped_eval_rows=run.data.dropped_eval,
        eval_metrics=_eval_metrics(steps),
        tokens=result.tokens,
        wall_s=result.wall_s,
        tokens_per_s=result.tokens / max(math.fsum(step.step_s for step in steps), 1e-9),
        train_loss=result.train_loss,
        eval_loss=result.eval_loss,
        peak_rss_bytes_per_worker=result.peak_rss_bytes_per_worker,
        peak_cuda_bytes_per_worker=result.peak_cuda_bytes_per_worker,
        notes=(*run.notes, *result.notes, *run.data.notes, *run.warnings, *memory),
    )


def _eval_metrics(steps: Sequence[StepReport]) -> dict[str, float]:
    """The kind's own figures of the held-out rows at the last step that was evaluated."""
    evaluated = [step for step in steps if step.eval_loss is not None]
    if not evaluated:
        return {}
    return {
        name.removeprefix("eval_"): value for name, value in evaluated[-1].metrics.items() if name.startswith("eval_")
    }


def _peaks(spec: TrainSpec, result: LoopResult) -> tuple[int, ...]:
    return result.peak_cuda_bytes_per_worker if spec.gpus else result.peak_rss_bytes_per_worker


def _write_facts(run: ResolvedRun) -> None:
    """The resolved spec, what is predicted of it, and where the code runs: written once, when the run first starts."""
    store = run.paths.store
    if store.exists(*run.paths.provenance()):
        return
    text = yaml.safe_dump(run.spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    store.write_bytes(text.encode(), *run.paths.spec())
    store.write_json(plan_of_run(run.spec, run.base, run.data, run.probes), *run.paths.plan())
    store.write_json(environment.collect(run.spec.seed), *run.paths.provenance())


def _write_status(run: ResolvedRun, state: str, *, patience_s: float | None = None, **more: Any) -> None:
    store = run.paths.store if patience_s is None else run.paths.store.with_retries(patience_s)
    store.write_json({"state": state, "run_id": run.paths.run_id, **more}, *run.paths.status())


def _interrupted(run: ResolvedRun) -> Interrupted:
    mark = Checkpoints(run.paths).newest()
    kept = f"the checkpoint of step {mark.step} is kept" if mark else "no checkpoint was made yet"
    return Interrupted(
        f"run {run.paths.run_id}",
        f"stopped by Ctrl-C, SIGTERM or its job's end; {kept}",
        "what was committed stays valid",
        "run the same command: it continues from there",
    )
