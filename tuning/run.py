"""Driver of a sweep: chooses trials, repeats lost ones and finds the best spec.

    runs/<name>-<hash8>/{spec.yaml, provenance.json, trials.json, status.json, report.json, report.html, tensorboard/}

A rerun reads `trials.json`, not Ray Tune's own state: that is a pickle, saved every ten seconds at most, so a killed
driver would forget finished trials.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from graftwork import environment
from graftwork.base import load as base_model
from graftwork.base.support import check_training
from graftwork.cluster.jobs.fencing import Fence, SupersededError
from graftwork.config import canonical_json
from graftwork.errors import ConfigError, GraftworkError, Interrupted, StorageError
from graftwork.planning.hardware import accelerators_here, with_gpus
from graftwork.storage.store import RunPaths, Store
from graftwork.training.autotune import sizes_of
from graftwork.training.objectives.rows import PreparedData, prepare
from graftwork.training.report import Progress
from graftwork.training.run import changed_keys, namesakes, unfinished_since
from graftwork.training.run_lock import OVERTAKES_S, run_lock
from graftwork.tuning.finals import choose, repeated_rows, with_finals
from graftwork.tuning.plan import points_to_plan, search_of
from graftwork.tuning.remote_trial import Elsewhere, check_elsewhere, end_trials
from graftwork.tuning.report import SweepEnd, sweep_record, write_page
from graftwork.tuning.resources import Node, TrialResources, nodes_of_ray
from graftwork.tuning.search import Search, contradiction, rows_key, rows_points, trial_spec
from graftwork.tuning.spec import TuneSpec
from graftwork.tuning.tensorboard import EventLogs
from graftwork.tuning.trial_store import TRIALS_FILE, Ledger
from graftwork.tuning.trials import TuneProgress, TuneReport, size_of
from graftwork.tuning.tune_driver import TunePlan, fit
from graftwork.tuning.winner import require_winner, train_winner


def warn_about_similar_sweeps(spec: TuneSpec, run: RunPaths) -> list[str]:
    """Return how a sweep that has not begun differs from the newest unfinished one of its name, if there is one."""
    if run.store.exists(*run.spec()):
        return []
    found = [(began, other) for other in namesakes(run) if (began := unfinished_since(other)) is not None]
    for _, other in sorted(found, key=lambda pair: pair[0], reverse=True):
        tree = yaml.safe_load(other.store.read_text(*other.spec()))
        if tree.get("kind") != spec.kind:
            continue
        try:
            before = TuneSpec.model_validate(tree)
        except ValidationError:
            differences = "its form: another version of graftwork wrote it"
        else:
            old, new = ({**sweep.recipe(), "train": sweep.train.recipe()} for sweep in (before, spec))
            differences = changed_keys(old, new) or "the contents of its base or data"
        return [
            f"this begins a new sweep, {run.run_id}, and takes over no trial: {other.run_id} ({_progress_text(other)}) "
            f"differs in {differences}. With the same values the same command goes on with it"
        ]
    return []


def _progress_text(run: RunPaths) -> str:
    state = run.store.read_json(*run.status())["state"]
    try:
        trials = run.store.read_json(*run.file(TRIALS_FILE))["trials"]
        ended = sum(trial["state"] not in ("pending", "running") for trial in trials)
    except (StorageError, KeyError, TypeError):
        return f"{state}, its trials can't be read"
    return f"{state}, {ended} of {len(trials)} trials ended"


OnProgress = Callable[[TuneProgress], None]


@dataclass(frozen=True)
class Sweep:
    """A resolved spec: the search, the rows of its trials, and the folder of its records."""

    spec: TuneSpec
    search: Search
    rows: dict[str, PreparedData]
    """By `space.rows_key`: trials whose rows are equal share one."""
    paths: RunPaths

    @classmethod
    def resolve(cls, spec: TuneSpec) -> "Sweep":
        """Resolve bases and data. Raises UserErrors of all kinds, before anything starts."""
        spec, _ = with_gpus(spec, accelerators_here())
        search = with_finals(spec, search_of(spec))
        if {"trained_parameters", "adapter_bytes"} & {goal.metric for goal in spec.objectives}:
            for point in rows_points(spec):
                size_of(trial_spec(spec, point))  # raises where the layers of the base are not known
        _require_supported(spec)
        prepared = {rows_key(point): (point, prepare(trial_spec(spec, point))) for point in rows_points(spec)}
        held_out = {len(data.eval) if data.eval is not None else 0 for _, data in prepared.values()}
        if len(held_out) > 1:
            raise ConfigError(
                "space",
                f"trials would be scored on {' or '.join(map(str, sorted(held_out)))} held-out rows",
                "losses are compared on the same rows; a shorter max_length drops long ones",
                "take max_length, prompt or data out of the space",
            )
        bases = {key: base_model.resolve(trial_spec(spec, point).base).digest for key, (point, _) in prepared.items()}
        what = {
            "sweep": spec.recipe(),
            "train": spec.train.recipe(),
            "rows": {key: [bases[key], data.digest()] for key, (_, data) in prepared.items()},
        }
        identity = hashlib.sha256(canonical_json(what).encode()).hexdigest()
        rows = {key: data for key, (_, data) in prepared.items()}
        rows |= {rows_key(point): prepare(trial_spec(spec, point)) for point in repeated_rows(spec)}
        return cls(spec, search, rows, RunPaths(Store(spec.root), spec.name, identity))

    def resources(self, nodes: Sequence[Node]) -> TrialResources:
        """Resource requests of the trials on a cluster with these nodes."""
        return TrialResources(self.spec, {key: sizes_of(data.train) for key, data in self.rows.items()}, nodes)


def _require_supported(spec: TuneSpec) -> None:
    """Raises BaseModelError where the base of a trial does not support its adapter or its precision."""
    trials = (trial_spec(spec, point) for point in points_to_plan(spec) if contradiction(spec, point) is None)
    asked = {
        canonical_json(
            [
                trial.base.model_dump(mode="json"),
                trial.quant.kind,
                trial.adapter.kind,
                getattr(trial.adapter, "targets", None),
            ]
        ): trial
        for trial in trials
    }
    for trial in asked.values():
        check_training(trial, base_model.resolve(trial.base).config)


def check(spec: TuneSpec) -> list[str]:
    """Find all errors of a spec before a cluster is started. Raises UserErrors of all kinds.

    Returns warnings: rows that are too long, ignored keys, held-out rows that are trained on, and the differences from
    an unfinished sweep of the same name.
    """
    sweep = Sweep.resolve(spec)
    spec = sweep.spec
    require_winner(spec)
    sets = [(trial_spec(spec, point).max_length, sweep.rows[rows_key(point)]) for point in rows_points(spec)]
    left_out = dict.fromkeys(data.left_out(max_length) for max_length, data in sets if data.left_out(max_length))
    warnings = dict.fromkeys(warning for data in sweep.rows.values() for warning in data.warnings)
    return [*left_out, *warnings, *warn_about_similar_sweeps(spec, sweep.paths)]


def tune(spec: TuneSpec, *, on_progress: OnProgress | None = None, elsewhere: Elsewhere | None = None) -> TuneReport:
    """Run a sweep; needs an initialised Ray. The same spec again returns the recorded report. `elsewhere`: each trial
    is a job there, and this Ray only waits for them.

    An interrupted sweep goes on: trials that finished or were stopped are not repeated. Writes runs/<name>-<digest8>/.
    Raises UserErrors before anything starts; ClusterError when no node can hold a trial; RunError when no trial ran to
    its end or another process runs the sweep; Interrupted on Ctrl-C.
    """
    if elsewhere is not None:
        check_elsewhere(spec)
        spec, _ = with_gpus(spec, elsewhere.accelerators(spec.root))
    sweep = Sweep.resolve(spec)
    require_winner(sweep.spec)
    with run_lock(sweep.paths, wait_s=OVERTAKES_S if Fence.from_environment() is not None else 0.0):
        attempt = _Attempt(sweep, on_progress or (lambda _: None), elsewhere)
        return attempt.train_winner(attempt.run())


class _Attempt:
    """One process at work on a sweep that it owns."""

    def __init__(self, sweep: Sweep, on_progress: OnProgress, elsewhere: Elsewhere | None = None) -> None:
        self.elsewhere = elsewhere
        self.sweep, self.spec, self.paths = sweep, sweep.spec, sweep.paths
        self.ledger = Ledger(sweep.paths, sweep.spec.train.checkpoints.outage_s, self._set_trouble)
        self.on_progress, self.trouble = on_progress, ""
        self.logs: EventLogs | None = None
        store = sweep.paths.store
        found = store.read_json(*sweep.paths.status()) if store.exists(*sweep.paths.status()) else {}
        self.finished = found.get("state") == "finished"
        self.earlier_s = float(found.get("wall_s", 0.0))
        self.started = time.monotonic()
        self.at_once = 1

    def run(self) -> TuneReport:
        self.ledger.resume(failed_too=self.finished)
        ends = [trial.started_s + trial.wall_s for trial in self.ledger.trials]
        self.earlier_s = max([self.earlier_s, *ends])  # a killed attempt wrote no status
        if self.finished and self.sweep.search.suggest(self.ledger.trials) is None:
            return self._with_page(self._report(reused=True))
        self._write_facts()
        self._set_state("running")
        try:
            self._fit()
            report = self._report(reused=False)
        except KeyboardInterrupt:
            self._set_state("interrupted")
            with contextlib.suppress(StorageError):
                self._show_unfinished("interrupted")
            raise self._interrupted() from None
        except SupersededError:
            raise  # the sweep is another attempt's now, and so is its status
        except (GraftworkError, OSError) as error:
            with contextlib.suppress(StorageError):  # it must not hide what happened
                self._set_state("failed", error=str(error))
                self._show_unfinished("failed", str(error))
            raise
        self._set_state("finished", best_id=report.best_id, best=report.best)
        return self._with_page(report)

    def train_winner(self, report: TuneReport) -> TuneReport:
        """Train and publish the winner where the spec has one."""
        if self.spec.winner is None:
            return report
        return replace(report, winner=train_winner(self.spec, report.best_spec, self.paths, self._notify))

    def _fit(self) -> None:
        began = datetime.fromisoformat(self.paths.store.read_json(*self.paths.provenance())["time"]).timestamp()
        where, sweep = self.elsewhere, self.sweep
        self.logs = EventLogs(self.paths, began, self.spec.train.checkpoints.outage_s)
        try:
            resources = replace(sweep.resources(nodes_of_ray()), elsewhere=where.on if where else None)
            self.at_once = resources.check_capacity(points_to_plan(self.spec))
            self._notify()
            plan = TunePlan(
                sweep.spec,
                self.ledger,
                sweep.search,
                sweep.rows,
                self._notify,
                self._wall_s,
                resources,
                self.at_once,
                where,
            )
            try:
                fit(plan)
            finally:
                if where is not None:
                    end_trials(where, self.paths)
        finally:
            self.logs.close()

    def _report(self, *, reused: bool) -> TuneReport:
        choice = choose(self.spec, self.ledger.trials)
        best = self.ledger.records[choice.trial_id]
        return TuneReport(
            run_id=self.paths.run_id,
            trials=self.ledger.trials,
            best_id=best.trial_id,
            best=best.values,
            best_spec=self.spec.train.with_(best.values),
            sampler=self.sweep.search.reason,
            choice=choice,
            eval_rows=self._eval_rows(),
            wall_s=self.earlier_s if reused else self._wall_s(),
            reused=reused,
        )

    def _with_page(self, report: TuneReport) -> TuneReport:
        record = sweep_record(self.spec, self.ledger.trials, SweepEnd.of(report))
        return replace(report, page=write_page(self.paths, self.spec, record).html_uri)

    def _show_unfinished(self, state: Literal["interrupted", "failed"], error: str | None = None) -> None:
        ended = SweepEnd(state, self._eval_rows(), self.sweep.search.reason, self._wall_s(), error=error)
        write_page(self.paths, self.spec, sweep_record(self.spec, self.ledger.trials, ended))

    def _eval_rows(self) -> int:
        """Number of held-out rows, equal for all trials."""
        held_out = next(iter(self.sweep.rows.values())).eval
        return len(held_out) if held_out is not None else 0

    def _wall_s(self) -> float:
        return round(self.earlier_s + time.monotonic() - self.started, 3)

    def _notify(self, winner: Progress | None = None) -> None:
        if self.logs is not None:
            self.logs.follow(self.ledger.trials)
        train = self.spec.train
        self.on_progress(
            TuneProgress(
                self.ledger.trials,
                self.sweep.search.total,
                self._wall_s(),
                steps=self.spec.steps,
                at_once=self.at_once,
                cpus=train.cpus_per_worker,
                gpus=train.gpus,
                trouble=self.trouble,
                winner=winner,
            )
        )

    def _set_trouble(self, trouble: str) -> None:
        self.trouble = trouble
        self._notify()

    def _set_state(self, state: str, **more: Any) -> None:
        status = {"state": state, "run_id": self.paths.run_id, "wall_s": self._wall_s(), **more}
        patience_s = 0.0 if state == "failed" else self.spec.train.checkpoints.outage_s
        self.paths.store.with_retries(patience_s).write_json(status, *self.paths.status())

    def _write_facts(self) -> None:
        """Write the resolved spec and the environment once, when the sweep first starts."""
        store = self.paths.store
        if store.exists(*self.paths.provenance()):
            return
        text = yaml.safe_dump(self.spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        store.write_bytes(text.encode(), *self.paths.spec())
        store.write_json(environment.collect(self.spec.seed), *self.paths.provenance())

    def _interrupted(self) -> Interrupted:
        done = sum(trial.ended for trial in self.ledger.trials)
        return Interrupted(
            f"sweep {self.paths.run_id}",
            f"stopped by Ctrl-C or SIGTERM; {done} of {len(self.ledger.trials)} trials are kept",
            "a trial that ended is not repeated",
            "run the same command: it continues with the others",
        )
