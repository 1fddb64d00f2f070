"""The trials under Ray Tune: the only module that starts it.

A process trains one trial, or with `share_base` several. Tune reserves its resources and releases them. The ledger and
the search choose the trials; the stopping rule decides which continue.
"""

import contextlib
import logging
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray import PlacementGroupID, cloudpickle, tune
from ray.tune import Callback, Stopper
from ray.tune.experiment import Trial
from ray.tune.search import Searcher
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from graftwork.cluster.private_ray import environment_of
from graftwork.errors import GraftworkError
from graftwork.training.objectives.rows import PreparedData
from graftwork.training.spec import TrainSpec
from graftwork.tuning.early_stopping import StoppingRule, stopping_rule
from graftwork.tuning.multi_lora.group import group_of
from graftwork.tuning.remote_trial import Elsewhere
from graftwork.tuning.resources import Request, TrialResources, fits, fits_one, is_distributed, nodes_of_ray
from graftwork.tuning.retry import TrialFailure, after, failure_of, hopeless, kernel_kills, shrunk
from graftwork.tuning.search import Search, Values, Wait, rows_key
from graftwork.tuning.spec import TuneSpec
from graftwork.tuning.trial import TrialConfig, run_trial
from graftwork.tuning.trial_store import Ledger, TrialPaths
from graftwork.tuning.trials import State, TrialRecord

# Control actor: a running trial reads there whether it continues, and records its placement group.


class TrialControlActor:
    """The trials that must stop: the driver sets them before a trial's report returns, the trial reads them after."""

    def __init__(self) -> None:
        self._stopped: set[str] = set()
        self._placement_groups: dict[str, str] = {}

    def stop(self, trial_ids: Iterable[str]) -> None:
        """These trials leave their loop at the report they are in."""
        self._stopped.update(trial_ids)

    def goes_on(self, trial_ids: Iterable[str]) -> list[bool]:
        """For each of the trials, in their order."""
        return [trial_id not in self._stopped for trial_id in trial_ids]

    def hold(self, trial_id: str, group: str) -> None:
        """Record the placement group of a distributed trial's workers: Ray (2.60) keeps it when the process that
        started them is killed, and Ray Train's own cleaner needs a dashboard to see that."""
        self._placement_groups[trial_id] = group

    def release(self, trial_id: str) -> str | None:
        """Forget and return the placement group of a trial whose process was lost, for the driver to remove."""
        return self._placement_groups.pop(trial_id, None)


# Callbacks of Tune, which write the ledger, and Ctrl-C: all in the driver.


class Interrupt(Stopper):  # type: ignore[misc]  # Ray carries no types
    """Ends the sweep between two steps of Tune once Ctrl-C or SIGTERM came.

    An exception out of a signal handler would leave Tune without its clean-up, and the trials' placement groups with it
    (Ray 2.60). Trials that are in the middle of a step are given ten seconds, then killed.
    """

    requested = False
    error: GraftworkError | None = None

    def give_up(self, error: GraftworkError) -> None:
        """End the sweep with this error; an exception out of Tune's callbacks would leave its trials behind."""
        self.error = self.error or error

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Stop no trial for its result: the stopping rule does."""
        return False

    def stop_all(self) -> bool:
        """Called by Tune after each of its steps."""
        return self.requested or self.error is not None

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM for the block; raise KeyboardInterrupt at its end when one came, or the error
        that the sweep was given up with. A second signal raises at once. Main thread only, elsewhere none is taken."""
        if threading.current_thread() is not threading.main_thread():
            yield
            if self.error is not None:
                raise self.error
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def request(_number: int, _frame: FrameType | None) -> None:
            if self.requested:
                raise KeyboardInterrupt
            self.requested = True

        for number in before:
            signal.signal(number, request)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.requested:
            raise KeyboardInterrupt
        if self.error is not None:
            raise self.error


class TuneCallback(Callback):  # type: ignore[misc]  # Ray carries no types
    """Tune calls these between its steps, one at a time: each report goes into the ledger and to the stopping rule, and
    its decision to the control actor before Tune lets the trial go on. `on_change` is called after each."""

    def __init__(
        self,
        sweep: "TunePlan",
        rule: StoppingRule,
        control: Any,
        places: TrialPaths,
        interrupt: Interrupt,
    ) -> None:
        self._sweep, self._ledger, self._last_step = sweep, sweep.ledger, sweep.spec.steps
        self._rule, self._control, self._places, self._interrupt = rule, control, places, interrupt
        self._started: dict[str, float] = {}
        self._attempt: dict[str, str] = {}
        """Tune's id of the newest attempt of each trial."""
        self._reported: dict[str, int] = {}
        """The last step of the newest attempt."""
        self._kernel_kills: dict[str, int] = {}
        self._judged: dict[str, int] = {}
        """The last step of each trial that the stopping rule has seen: once, however often the trial is run."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks for a restore that never comes: a rerun goes by the ledger."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        if self._interrupt.error is not None:
            return
        with self._giving_up():
            for trial_id in trial.config["trials"]:
                self._started[trial_id] = time.monotonic()
                self._kernel_kills[trial_id] = kernel_kills()
                self._attempt[trial_id], self._reported[trial_id] = trial.trial_id, 0
                self._change(trial_id, state="running")
            self._sweep.on_change()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **_: Any
    ) -> None:
        if self._interrupt.error is not None:
            return
        with self._giving_up():
            stopped = []
            for trial_id, (step, loss) in result["trials"].items():
                record, is_newest = self._ledger.records[trial_id], self._attempt.get(trial_id) == trial.trial_id
                if not is_newest or record.state != "running" or step <= self._reported[trial_id]:
                    continue  # of an attempt that is over, or reported before
                if self._report(record, step, loss, result) == "stopped":
                    stopped.append(trial_id)
            for trial_id, message in result.get("lost", {}).items():
                self._record_failure(trial, trial_id, TrialFailure("diverged", message))
            if stopped:
                ray.get(self._control.stop.remote(stopped))
            self._sweep.on_change()

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        """Its process has left the loop, by itself or because all had to."""
        if self._interrupt.stop_all():
            return
        with self._giving_up():
            for trial_id in trial.config["trials"]:
                if self._ledger.records[trial_id].state == "running":
                    self._change(trial_id, state="failed", failure="error", error="its process left before its end")
            self._places.tidy(self._ledger.trials)
            self._sweep.on_change()

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        if self._interrupt.error is not None:
            return
        with self._giving_up():
            for trial_id in trial.config["trials"]:
                kills = kernel_kills() - self._kernel_kills.get(trial_id, kernel_kills())
                self._record_failure(trial, trial_id, failure_of(_error(trial), kills))
                if (group := ray.get(self._control.release.remote(trial_id))) is not None:
                    remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))
            if (error := hopeless(self._ledger.trials)) is not None:
                raise error
            self._sweep.on_change()

    def _record_failure(self, trial: Trial, trial_id: str, failure: TrialFailure) -> None:
        """Enter why this attempt of a trial ended, unless it is over already."""
        record = self._ledger.records[trial_id]
        if record.state == "running" and self._attempt.get(trial_id, trial.trial_id) == trial.trial_id:
            self._change(trial_id, **self._sweep.after_failure(record, failure))
            self._attempt.pop(trial_id, None)

    def _report(self, record: TrialRecord, step: int, loss: float, result: dict[str, Any]) -> State:
        """Enter a report; returns the state that the trial is in now."""
        trial_id = record.trial_id
        before = tuple(known for known in record.losses if known[0] < step)  # an earlier attempt may have come further
        losses, notes, why = (*before, (step, loss)), record.notes, None
        self._reported[trial_id] = step
        if record.repeat_of is None and step > self._judged.get(trial_id, 0):  # all of the finals run to their end
            self._judged[trial_id], why = step, self._rule.reason_to_stop(trial_id, step, loss)
        if record.until is not None and step >= record.until:
            why = why or f"its segment ends at step {step}"
        state: State = "finished" if step >= self._last_step else "stopped" if why else "running"
        if state == "stopped" and why:
            notes = (*notes, why)
        costs = {"peak_rss_bytes": result["peak_rss_bytes"], "metrics": result["metrics"][trial_id]}
        self._change(trial_id, losses=losses, steps=step, state=state, notes=notes, **costs)
        return state

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        """An error of ours ends the sweep, cleanly; later calls of Tune are ignored."""
        try:
            yield
        except GraftworkError as error:
            self._interrupt.give_up(error)

    def _change(self, trial_id: str, **changes: Any) -> None:
        wall_s = round(time.monotonic() - self._started.get(trial_id, time.monotonic()), 3)
        self._ledger.update(trial_id, wall_s=wall_s, **changes)


def _error(trial: Trial) -> BaseException | str:
    """What ended an attempt. Tune keeps the text alone of errors that are neither a task's nor an actor's."""
    if trial.pickled_error_file is None:
        return Path(trial.error_file).read_text(encoding="utf-8").strip()
    error: BaseException = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    return error


QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of a spec stay valid in a trial
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # `Interrupt` takes its place, for SIGTERM as well
    "TUNE_FORCE_TRIAL_CLEANUP_S": "10",  # default 600: how long a stopped trial that does not leave keeps its CPU
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}


@dataclass(frozen=True)
class TunePlan:
    """The parts of a sweep that its trials need."""

    spec: TuneSpec
    ledger: Ledger
    search: Search
    rows: Mapping[str, PreparedData]
    """By `space.rows_key`."""
    on_change: Callable[[], None]
    clock: Callable[[], float]
    """Seconds of the sweep so far."""
    resources: TrialResources
    at_once: int
    """Trials at a time, at most."""
    elsewhere: Elsewhere | None = None
    """Where each trial is a job; None: trials run on the Ray of the sweep."""

    def spec_of(self, record: TrialRecord) -> TrainSpec:
        """What a trial is to train, in as little memory as it has been found to need."""
        spec = shrunk(self.resources.resolve_trial(record.values), record.smaller)
        assert spec is not None, "after() takes no more steps down than there are"
        return spec

    def after_failure(self, record: TrialRecord, failure: TrialFailure) -> dict[str, Any]:
        """What changes in the record of a trial that failed."""
        return after(record, failure, self.spec_of(record), self.spec.retries, smaller=self.spec.retry_smaller)


def fit(sweep: TunePlan) -> None:
    """Run trials until the search has no more; the ledger holds the outcome. Needs an initialised Ray.

    Raises KeyboardInterrupt on Ctrl-C and SIGTERM.
    """
    spec, ledger = sweep.spec, sweep.ledger
    interrupt = Interrupt()
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # others may be lost
    control = ray.remote(num_cpus=0, scheduling_strategy=here)(TrialControlActor).remote()
    rule = stopping_rule(spec, [trial for trial in ledger.trials if trial.ended and trial.repeat_of is None])
    places = TrialPaths(ledger.run.patiently(spec.train.checkpoints.outage_s), spec.checkpoint_every)
    trainable = tune.with_parameters(
        run_trial,
        rows=dict(sweep.rows),
        steps=spec.steps,
        report_every=spec.report_every,
        control=control,
        places=places,
        elsewhere=sweep.elsewhere,
    )
    scratch = tempfile.TemporaryDirectory(prefix="gw-tune-")  # Tune's own notes; a rerun goes by the ledger
    with environment_of(QUIET), _quiet_log(), scratch as folder, interrupt.on_signals():
        tune.Tuner(
            tune.with_resources(trainable, lambda config: tune.PlacementGroupFactory(config["bundles"])),
            tune_config=tune.TuneConfig(
                search_alg=FromLedger(sweep, interrupt),
                num_samples=-1,  # until the search has no more
                max_concurrent_trials=sweep.at_once,
                # where its fork trains (forkserver.py): a process that trains twice keeps adapters (peft issue 2221)
                reuse_actors=spec.share_base == 1 and not spec.train.gpus,
            ),
            run_config=tune.RunConfig(
                name=spec.name,
                storage_path=folder,
                verbose=0,
                stop=interrupt,
                callbacks=[TuneCallback(sweep, rule, control, places, interrupt)],
            ),
        ).fit()
    ray.kill(control)
    places.clear()


class FromLedger(Searcher):  # type: ignore[misc]  # Ray carries no types
    """Gives Tune the next process to start, with the trials of the ledger that it trains."""

    def __init__(self, sweep: TunePlan, interrupt: Interrupt) -> None:
        super().__init__()
        self._sweep, self._interrupt = sweep, interrupt
        self._requests: dict[str, Request] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher for a restore that never comes; a progress bar of the driver's can't be pickled."""
        return {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return None where Tune must ask again, FINISHED where there is no more."""
        try:
            chosen = self._sweep.ledger.next(self._sweep.search)
            if chosen is None and not any(trial.state == "running" for trial in self._sweep.ledger.trials):
                return str(Searcher.FINISHED)  # not before: a trial that fails may be run again
            if chosen is None or isinstance(chosen, Wait):
                return None
            return self._trial_config(chosen, self._sweep.spec_of(chosen))
        except GraftworkError as error:
            self._interrupt.give_up(error)
            return str(Searcher.FINISHED)

    def _trial_config(self, chosen: TrialRecord, spec: TrainSpec) -> dict[str, Any] | None:
        """The config of the process; None while there is no room for it. One that will never have room has failed."""
        sweep, resources, ledger = self._sweep, self._sweep.resources, self._sweep.ledger
        if not fits_one(resources.request([spec], chosen.values), resources.nodes):
            error = str(resources.unschedulable_error(spec, chosen.values))
            ledger.update(chosen.trial_id, state="failed", error=error)
            return None
        most = self._most_together(spec, chosen.values)
        if not most:
            return None
        rows = rows_key(chosen.values)
        group = group_of(chosen, most, ledger, sweep.search, sweep.spec_of, sweep.rows[rows])
        request = resources.request(list(group.values()), chosen.values)
        why, notes = resources.explain_placement(spec, chosen.values), ledger.records[chosen.trial_id].notes
        if why is not None and why not in notes:
            ledger.update(chosen.trial_id, notes=(*notes, why))
        for trial_id in group:
            self._requests[trial_id] = request
            ledger.update(trial_id, started_s=sweep.clock(), wall_s=0.0)
        specs = {trial_id: spec.model_dump_json() for trial_id, spec in group.items()}
        return vars(TrialConfig(specs, rows, request.bundles[:1], request.worker, chosen.until, chosen.parent))

    def _most_together(self, spec: TrainSpec, values: Values) -> int:
        """Trials that may share the process now: at most `share_base`, 0 where there is no room for one.

        Ray may wait for nodes while no process runs. Tune does not see the workers of a distributed trial: Ray Train
        reserves them itself, and gives up after a wait.
        """
        most = 1 if is_distributed(spec) or self._sweep.elsewhere else self._sweep.spec.share_base
        running = [self._requests[one.trial_id] for one in self._sweep.ledger.trials if one.state == "running"]
        current = list({id(request): request for request in running}.values())  # one for a whole group
        resources, nodes = self._sweep.resources, nodes_of_ray() if current else []
        for count in range(most, 0, -1):
            request = resources.request([spec] * count, values)
            if fits_one(request, resources.nodes) and (not current or fits(nodes, [*current, request])):
                return count
        return 0

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing to do: the ledger has the outcome."""

    def save(self, checkpoint_path: str) -> None:
        """Tune would restore from it; a rerun goes by the ledger."""

    def restore(self, checkpoint_path: str) -> None:
        """Never called."""


@contextlib.contextmanager
def _quiet_log() -> Iterator[None]:
    """Silence Tune's log of each failed trial: the ledger has its error."""
    log = logging.getLogger("ray.tune")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)
