"""Driver of a run: resolve the spec once, train it on workers, publish the result, write the page."""

import contextlib
import hashlib
import logging
import math
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import yaml
from pydantic import ValidationError

from graftwork import environment
from graftwork.artifacts import publish as artifact_publish
from graftwork.artifacts.manifest import aliases
from graftwork.artifacts.registry import UnknownAdapter, open_adapter
from graftwork.base import load as base_load
from graftwork.base import publish as base_publish
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
from graftwork.training.ray_worker import fit
from graftwork.training.report import (
    OnProgress,
    TrainReport,
    follow_progress,
    memory_notes,
    plan_of_run,
    write_page,
)
from graftwork.training.run_lock import OVERTAKES_S, run_lock
from graftwork.training.spec import TrainSpec
from graftwork.training.strategies import WEIGHTS_SHARDED, check_here, check_rows
from graftwork.training.warm_start import folder_below, parent_of, pin_init, pin_stack
from graftwork.training.worker_messages import LoopResult, StepReport, TrainJob, read_steps

SHOWN_KEYS = 6
"""Most keys that are named where two specs differ."""

log = logging.getLogger("graftwork.training")


@dataclass(frozen=True)
class ResolvedRun:
    """A spec with all that it names found: what it trains, and the place of its record."""

    spec: TrainSpec
    base: ResolvedBase
    data: PreparedData
    paths: RunPaths
    parent: str | None = None
    """The version that `init_from` goes on from, `task@version` where it is another task's."""
    probes: tuple[Probe, ...] = ()
    """Its outcomes, as questions and scores."""
    notes: tuple[str, ...] = ()
    """The numbers that `auto` was resolved to, with the reasons."""
    warnings: tuple[str, ...] = ()
    """Ignored keys of the rows, held-out rows that are trained on."""

    @classmethod
    def resolve(cls, spec: TrainSpec) -> "ResolvedRun":
        """Resolve base and data. Raises UserErrors of all kinds, before anything starts or is written."""
        spec, chosen = with_gpus(spec, accelerators_here())
        check_here(spec)
        base = base_load.resolve(spec.base)
        check_training(spec, base.config)
        data, probes = prepare(spec), tuple(probes_of(spec))
        check_rows(spec, len(data.eval) if data.eval is not None else 0)
        if spec.base_adapter is not None:
            spec = pin_stack(spec, base)

        def paths(init: str | None) -> RunPaths:
            what = {"spec": spec.recipe(), "base": base.digest, "data": data.digest(), "init": init}
            what |= {"below": spec.base_adapter} if spec.base_adapter else {}
            digest = hashlib.sha256(canonical_json(what).encode()).hexdigest()
            return RunPaths(Store(spec.root), spec.name, digest)

        placed, parent = spec, None
        if spec.init_from is not None:
            placed = pin_init(spec, base, lambda version: paths(version).run_id)
            parent = parent_of(placed)
        # Ray Train moves each worker into a folder of its own, where a relative place is another one
        placed = placed.with_({"root": Store(spec.root).uri, "base.uri": source.absolute(spec.base.uri)})
        warnings = (*data.warnings, *(warning for probe in probes for warning in probe.warnings))
        notes = (chosen,) if chosen and spec.gpus else ()
        return cls(placed, base, data, paths(parent), parent, probes, notes, warnings)

    def notes_before_start(self) -> list[str]:
        """The warnings, and the difference from an unfinished run of the same name."""
        return [*self.warnings, *warn_about_similar_runs(self.spec, self.paths)]

    def with_auto_resolved(self) -> "ResolvedRun":
        """Replace `auto` in the spec, and note the reason. Raises ConfigError where nothing fits."""
        spec, notes = resolve_auto_for_run(self.spec, self.base, self.data.train, self.paths)
        return replace(self, spec=spec, notes=(*self.notes, *notes))


def check(spec: TrainSpec) -> list[str]:
    """Resolve a spec and return its notes before the start. Raises UserErrors of all kinds."""
    return ResolvedRun.resolve(spec).notes_before_start()


def run_paths(spec: TrainSpec) -> RunPaths:
    """Place of a spec's run. Its digest covers the contents of base and data, not their places."""
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
        run, outage_s = run.with_auto_resolved(), run.spec.checkpoints.outage_s
        run = replace(run, paths=run.paths.patiently(outage_s))

        def require_current() -> None:
            if fence is not None:
                fence.require(outage_s)

        try:
            _write_status(run.paths, "running")
            _write_run_inputs(run)
            with follow_progress(run.paths, on_progress or (lambda _: None)):
                result = workers(_job(run, fence))
            require_current()
            steps = read_steps(run.paths)
            report = _publish_result(run, result, steps, require_current)
            _write_status(run.paths, "finished", report=report.as_dict())
        except (KeyboardInterrupt, Interrupted):
            _record_end(run, "interrupted")
            raise _interrupted_error(run) from None
        except SupersededError:
            raise  # the run is another attempt's now, and so is its status
        except BaseException as error:  # whatever it is: a status "running" would stay permanently
            known = isinstance(error, GraftworkError | OSError)
            _record_end(run, "failed", error=str(error) if known else f"{type(error).__name__}: {error}")
            raise
        return _finalize_report(run, report, steps)


def _finalize_report(run: ResolvedRun, report: TrainReport, steps: Sequence[StepReport] | None) -> TrainReport:
    """Return the report with its outcomes and its page, or with a note on what is missing. steps: None reads them.

    The run has published by now, so that nothing here can fail it. A rerun makes what is missing; outcomes that
    training has not measured are measured now.
    """
    store, page = run.paths.store, run.paths.file("report.html")
    try:
        if run.probes and (due := missing(run.paths, [probe.part for probe in run.probes])):
            whole = run.spec.with_({"strategy": {"kind": "ddp"}})  # each worker holds the whole model
            try:
                fit(TrainJob(whole, run.data.shared(store), run.paths, parts=due))
            except KeyboardInterrupt:
                raise _interrupted_error(run) from None
        if not run.probes and report.reused and store.exists(*page):
            return replace(report, page=store.path(*page))
        outcomes = outcomes_report(run.spec, run.probes, read_parts(run.paths)) if run.probes else None
        steps = read_steps(run.paths) if steps is None else steps
        built, lacks = write_page(run.paths, run.spec, report, outcomes, steps)
        record = outcomes.model_dump(mode="json") if outcomes else None
        return replace(report, page=built.html_uri, outcomes=record, notes=(*report.notes, *lacks))
    except (Interrupted, SupersededError):
        raise
    except Exception as error:  # whatever it is: the adapter is published, and the report must say so
        log.debug("run %s: what follows publishing", run.paths.run_id, exc_info=error)
        missing_part = "report.html" if not run.probes else "outcomes and report.html"
        why = f"{type(error).__name__}: {error}"
        if isinstance(error, GraftworkError):
            why = f"{error.subject}: {error.problem}"
        again = "the run is published; run the same command again to make what is missing"
        note = f"warning: {missing_part} could not be made ({why}); {again}"
        return replace(report, notes=(*report.notes, note))


def _job(run: ResolvedRun, fence: Fence | None) -> TrainJob:
    """The workers' job. Its outcomes are measured with the training where each worker has all weights."""
    measured_now = run.probes and run.spec.strategy.kind not in WEIGHTS_SHARDED
    parts = missing(run.paths, [probe.part for probe in run.probes]) if measured_now else ()
    return TrainJob(run.spec, run.data.shared(run.paths.store), run.paths, parts=parts, fence=fence)


def _find_report(run: ResolvedRun) -> TrainReport | None:
    """The recorded report of a run whose adapter, or base, is still there; a lacking alias is set again."""
    store, spec = run.paths.store, run.spec
    if not store.exists(*run.paths.status()):
        return None
    status = store.read_json(*run.paths.status())
    if status["state"] != "finished":
        return None
    report = TrainReport.from_dict(status["report"], reused=True)
    if report.base is not None:
        return report if base_publish.find(store, spec.name, report.version) is not None else None
    try:
        open_adapter(store, spec.name, report.version)
    except UnknownAdapter:
        return None  # removed since: the last checkpoint publishes it again
    if spec.alias and aliases(store, spec.name).get(spec.alias) is None:
        artifact_publish.promote(store, spec.name, spec.alias, report.version)
    return report


def _publish_result(
    run: ResolvedRun,
    result: LoopResult,
    steps: Sequence[StepReport],
    require_current: Callable[[], None] = lambda: None,
) -> TrainReport:
    """Publish the last checkpoint and put the report together."""
    peaks = result.peak_cuda_bytes_per_worker if run.spec.gpus else result.peak_rss_bytes_per_worker
    memory = memory_notes(run.paths, peaks)
    made = publish(run, result, steps, require_current)
    evaluated = [step.metrics for step in steps if step.eval_loss is not None]
    figures = evaluated[-1] if evaluated else {}
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
        eval_metrics={key.removeprefix("eval_"): v for key, v in figures.items() if key.startswith("eval_")},
        tokens=result.tokens,
        wall_s=result.wall_s,
        tokens_per_s=result.tokens / max(math.fsum(step.step_s for step in steps), 1e-9),
        train_loss=result.train_loss,
        eval_loss=result.eval_loss,
        peak_rss_bytes_per_worker=result.peak_rss_bytes_per_worker,
        peak_cuda_bytes_per_worker=result.peak_cuda_bytes_per_worker,
        notes=(*run.notes, *result.notes, *run.data.notes, *run.warnings, *memory),
    )


class ManifestFacts(TypedDict):
    """Origin of a model, as both kinds of manifest record it."""

    method: Mapping[str, object]
    prompt: Mapping[str, object]
    data_fingerprint: str
    metrics: Mapping[str, float]
    run: str
    provenance: Mapping[str, object]


@dataclass(frozen=True)
class PublishedModel:
    """A version that can be named from now on."""

    version: str
    adapter: str | None = None
    """`task@version`."""
    base: str | None = None
    """A place, as `base:` takes it."""


def publish(
    run: ResolvedRun,
    result: LoopResult,
    steps: Sequence[StepReport],
    require_current: Callable[[], None] = lambda: None,
) -> PublishedModel:
    """Publish the last checkpoint: an adapter version, or a new base where all weights were trained.

    `require_current` raises where another driver has taken over: called again before the manifest and the alias.
    Raises ArtifactError, StorageError.
    """
    spec, store, template = run.spec, run.paths.store, base_load.template(run.base)
    metrics = {
        "train_loss": result.train_loss[-1][1],
        "steps": float(result.steps),
        "tokens": float(result.tokens),
        "train_s": math.fsum(step.step_s for step in steps),
    }
    if result.eval_loss:
        metrics["eval_loss"] = result.eval_loss[-1][1]
    facts = ManifestFacts(
        method={**spec.adapter.model_dump(mode="json"), "objective": spec.objective.kind},
        prompt=spec.prompt.model_dump(mode="json"),
        data_fingerprint=run.data.fingerprint,
        metrics=metrics,
        run=run.paths.run_id,
        provenance=store.read_json(*run.paths.provenance()),
    )
    with Checkpoints(run.paths).model_files(result.steps) as folder:
        if not spec.adapter.trains_base:
            return _publish_adapter(run, folder, facts, require_current)
        base = base_publish.publish(
            store,
            spec.name,
            folder,
            run.base,
            template_date=template.date,
            require_current=require_current,
            **facts,
        )
        return PublishedModel(base.version, base=base_publish.place(store, spec.name, base.version))


def _publish_adapter(
    run: ResolvedRun, folder: Path, facts: ManifestFacts, require_current: Callable[[], None]
) -> PublishedModel:
    """Publish a PEFT folder. One trained on top of `base_adapter` is stacked with it, to work on the base alone."""
    spec, template = run.spec, base_load.template(run.base)
    with tempfile.TemporaryDirectory(prefix="gw-stack-") as stacked:
        if spec.base_adapter is not None:
            from graftwork.training.adapters.attach import stack_loras

            rank = stack_loras(folder, folder_below(spec), Path(stacked))
            shape = {"rank": rank, "alpha": float(rank), "rslora": False, "targets": "mixed"}
            facts["method"] = {**facts["method"], **shape, "stacked_on": spec.base_adapter}
        manifest = artifact_publish.publish(
            run.paths.store,
            spec.name,
            Path(stacked) if spec.base_adapter is not None else folder,
            base_digest=run.base.digest,
            quant=spec.quant.model_dump(mode="json"),
            template_digest=template.digest,
            template_date=template.date,
            tokenizer_digest=template.tokenizer_digest,
            parent=run.parent,
            merged_from=(spec.base_adapter,) if spec.base_adapter is not None else (),
            alias=spec.alias,
            require_current=require_current,
            **facts,
        )
    return PublishedModel(manifest.version, adapter=manifest.ref)


def _write_run_inputs(run: ResolvedRun) -> None:
    """Write the resolved spec, its prediction and its environment, once, when the run first starts."""
    store = run.paths.store
    if store.exists(*run.paths.provenance()):
        return
    text = yaml.safe_dump(run.spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    store.write_bytes(text.encode(), *run.paths.spec())
    store.write_json(plan_of_run(run.spec, run.base, run.data, run.probes), *run.paths.plan())
    store.write_json(environment.collect(run.spec.seed), *run.paths.provenance())


def _write_status(paths: RunPaths, state: str, **more: Any) -> None:
    paths.store.write_json({"state": state, "run_id": paths.run_id, **more}, *paths.status())


def _record_end(run: ResolvedRun, state: str, **more: Any) -> None:
    """Write the status of a run that did not finish, in one try: an outage must neither hide nor delay its error."""
    with contextlib.suppress(StorageError):
        _write_status(run.paths.patiently(0), state, **more)


def _interrupted_error(run: ResolvedRun) -> Interrupted:
    """Return the error of Ctrl-C, with the newest checkpoint where the store answers at once."""
    try:
        mark = Checkpoints(run.paths.patiently(0)).newest()
        kept = f"the checkpoint of step {mark.step} is kept" if mark else "no checkpoint was made yet"
    except StorageError as error:
        kept = f"its checkpoints are kept, but could not be listed ({error.problem})"
    return Interrupted(
        f"run {run.paths.run_id}",
        f"stopped by Ctrl-C, SIGTERM or its job's end; {kept}",
        "what was committed stays valid",
        "run the same command: it continues from there",
    )


# Unfinished runs of the same name, and the keys in which a new spec differs from the newest of them.


def warn_about_similar_runs(spec: TrainSpec, run: RunPaths) -> list[str]:
    """Differences of a run that has not begun from the newest unfinished one of its name; empty where there is none."""
    if run.store.exists(*run.spec()):
        return []
    found = [(began, other) for other in namesakes(run) if (began := unfinished_since(other)) is not None]
    if not found:
        return []
    other = max(found, key=lambda pair: pair[0])[1]
    mark = Checkpoints(other).newest()
    reached = f"step {mark.step}" if mark else "its start"
    try:
        before = TrainSpec.model_validate(yaml.safe_load(other.store.read_text(*other.spec())))
        differs = changed_keys(before.recipe(), spec.recipe())
        differs = differs or "the contents of its base or data, or in the adapter that it starts from"
    except ValidationError:
        differs = "its form: another version of graftwork wrote it"
    return [
        f"this begins a new run, {run.run_id}: {other.run_id} is unfinished at {reached} and differs in {differs}. "
        "With the same values the same command goes on with it"
    ]


def namesakes(run: RunPaths) -> list[RunPaths]:
    """The other runs of its name."""
    pattern = re.compile(re.escape(run.name) + "-([0-9a-f]{8})")
    names = [found for name in run.store.list("runs") if (found := pattern.fullmatch(name))]
    return [RunPaths(run.store, run.name, found[1]) for found in names if found[0] != run.run_id]


def unfinished_since(run: RunPaths) -> str | None:
    """When a run began, as UTC text; None when it is finished, or no run."""
    if not all(run.store.exists(*key) for key in (run.status(), run.provenance(), run.spec())):
        return None
    if run.store.read_json(*run.status())["state"] == "finished":
        return None
    return str(run.store.read_json(*run.provenance())["time"])


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The keys of two trees that differ, with their values there (`before`) and here; empty when none does."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    more = f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else ""
    return ", ".join(f"{key} ({old.get(key)} there, {new.get(key)} here)" for key in keys[:SHOWN_KEYS]) + more


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        found += _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return found
