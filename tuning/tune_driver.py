"""The trials under Ray Tune: the only module that starts it.

A process trains one trial, or with `share_base` several. Tune gives it its place in the cluster and takes it back;
which trials there are is the ledger's and the search's business, which go on the judge's.
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
    """The trials that are to stop. The driver writes it before a trial's report returns, the trial reads it after."""

    def __init__(self) -> None:
        self._stopped: set[str] = set()
        self._held: dict[str, str] = {}

    def stop(self, trial_ids: Iterable[str]) -> None:
        """These trials leave their loop at the report they are in."""
        self._stopped.update(trial_ids)

    def goes_on(self, trial_ids: Iterable[str]) -> list[bool]:
        """For each of the trials, in their order."""
        return [trial_id not in self._stopped for trial_id in trial_ids]

    def hold(self, trial_id: str, group: str) -> None:
        """The workers of a gang say in which placement group they are: Ray (2.60) keeps it when the process that
        started them is killed, and Ray Train's own cleaner needs a dashboard to see that."""
        self._held[trial_id] = group

    def release(self, trial_id: str) -> str | None:
        """The group that a trial held, told once; the driver frees it when the trial's process was lost."""
        return self._held.pop(trial_id, None)


def free(board: Any, trial_id: str) -> None:
    """Give back what a gang held whose process is gone, its workers with it. Nothing happens for any other trial."""
    group = ray.get(board.release.remote(trial_id))
    if group is not None:
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))


def start_trial_control() -> Any:
    """A handle of a new board, on the driver's machine: any other may be lost. Needs an initialised Ray; `ray.kill`
    ends it."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(TrialControlActor).remote()


# Callbacks of Tune, which write the ledger, and Ctrl-C: all in the driver.


class Interrupt(Stopper):  # type: ignore[misc]  # Ray carries no types
    """Ends the sweep between two steps of Tune once Ctrl-C or SIGTERM came.

    An exception out of a signal handler would leave Tune without its clean-up, and the trials' placement groups with it
    (Ray 2.60). Trials that are in the middle of a step are given ten seconds, then killed.
    """

    asked = False
    error: GraftworkError | None = None

    def give_up(self, error: GraftworkError) -> None:
        """End the sweep with this error; an exception out of Tune's callbacks would leave its trials behind."""
        self.error = self.error or error

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No trial is stopped for its result; that is the scheduler's."""
        return False

    def stop_all(self) -> bool:
        """Tune asks after each of its steps."""
        return self.asked or self.error is not None

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

        def ask(_number: int, _frame: FrameType | None) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.asked:
            raise KeyboardInterrupt
        if self.error is not None:
            raise self.error


class TuneCallback(Callback):  # type: ignore[misc]  # Ray carries no types
    """Tune calls these between its steps, one at a time: each report goes into the ledger and before the judge, and the
    verdict onto the board before Tune lets the trial go on. `on_change` is called after each."""

    def __init__(
        self,
        ledger: Ledger,
        judge: StoppingRule,
        board: Any,
        last_step: int,
        on_change: Callable[[], None],
        after_failure: Callable[[TrialRecord, TrialFailure], dict[str, Any]],
        places: TrialPaths,
        interrupt: Interrupt,
    ) -> None:
        self._ledger, self._judge, self._board = ledger, judge, board
        self._last_step, self._on_change = last_step, on_change
        self._after_failure, self._places, self._interrupt = after_failure, places, interrupt
        self._started: dict[str, float] = {}
        self._attempt: dict[str, str] = {}
        """Tune's id of the newest attempt of each trial."""
        self._reported: dict[str, int] = {}
        """The last step of the newest attempt."""
        self._kernel_kills: dict[str, int] = {}
        self._judged: dict[str, int] = {}
        """The last step of each trial that the judge has seen: once, however often the trial is run."""

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
            self._on_change()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **_: Any
    ) -> None:
        if self._interrupt.error is not None:
            return
        with self._giving_up():
            stopped = []
            for trial_id, (step, loss) in result["trials"].items():
                if self._is_news(trial, trial_id, step) and self._report(trial_id, step, loss, result) == "stopped":
                    stopped.append(trial_id)
            for trial_id, message in result.get("lost", {}).items():
                self._record_failure(trial, trial_id, TrialFailure("diverged", message))
            if stopped:
                ray.get(self._board.stop.remote(stopped))
            self._on_change()

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        """Its process has left the loop, by itself or because all were told to."""
        if self._interrupt.stop_all():
            return
        with self._giving_up():
            for trial_id in trial.config["trials"]:
                if self._ledger.records[trial_id].state == "running":
                    self._change(trial_id, state="failed", failure="error", error="its process left before its end")
            self._places.tidy(self._ledger.trials)
            self._on_change()

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        if self._interrupt.error is not None:
            return
        with self._giving_up():
            for trial_id in trial.config["trials"]:
                kills = kernel_kills() - self._kernel_kills.get(trial_id, kernel_kills())
                self._record_failure(trial, trial_id, failure_of(_error(trial), kills))
                free(self._board, trial_id)
            if (error := hopeless(self._ledger.trials)) is not None:
                raise error
            self._on_change()

    def _record_failure(self, trial: Trial, trial_id: str, failure: TrialFailure) -> None:
        """Enter why this attempt of a trial ended, unless it is over already."""
        record = self._ledger.records[trial_id]
        if record.state == "running" and self._attempt.get(trial_id, trial.trial_id) == trial.trial_id:
            self._change(trial_id, **self._after_failure(record, failure))
            self._attempt.pop(trial_id, None)

    def _is_news(self, trial: Trial, trial_id: str, step: int) -> bool:
        """Neither a report of an attempt that is over nor one that was there before."""
        record = self._ledger.records[trial_id]
        return (
            self._attempt.get(trial_id) == trial.trial_id
            and record.state == "running"
            and step > self._reported[trial_id]
        )

    def _report(self, trial_id: str, step: int, loss: float, result: dict[str, Any]) -> State:
        """Enter a report; returns the state that the trial is in now."""
        record = self._ledger.records[trial_id]
        before = tuple(known for known in record.losses if known[0] < step)  # an earlier attempt may have come further
        losses, notes, why = (*before, (step, loss)), record.notes, None
        self._reported[trial_id] = step
        if record.repeat_of is None and step > self._judged.get(trial_id, 0):  # all of the finals run to their end
            self._judged[trial_id], why = step, self._judge.reason_to_stop(trial_id, step, loss)
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
        """An error of ours ends the sweep, cleanly; what Tune tells after that is told to nobody."""
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
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # tuning.watch.Interrupt takes its place, for SIGTERM as well
    "TUNE_FORCE_TRIAL_CLEANUP_S": "10",  # default 600: how long a stopped trial that does not leave keeps its CPU
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}


@dataclass(frozen=True)
class TunePlan:
    """What the running of a sweep's trials needs of it."""

    spec: TuneSpec
    ledger: Ledger
    search: Search
    rows: Mapping[str, PreparedData]
    """By `space.rows_key`."""
    settled: Callable[[Values], TrainSpec]
    """The training spec of a point, without `auto`. Raises ConfigError when the values contradict each other."""
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
        spec = shrunk(self.settled(record.values), record.smaller)
        assert spec is not None, "a trial is asked for no more than there is"
        return spec

    def after_failure(self, record: TrialRecord, failure: TrialFailure) -> dict[str, Any]:
        """What changes in the record of a trial that failed."""
        return after(record, failure, self.spec_of(record), self.spec.retries, smaller=self.spec.retry_smaller)


def fit(sweep: TunePlan) -> None:
    """Run trials until the search has no more; the ledger holds the outcome. Needs an initialised Ray.

    Raises KeyboardInterrupt on Ctrl-C and SIGTERM.
    """
    spec, ledger = sweep.spec, sweep.ledger
    interrupt, board = Interrupt(), start_trial_control()
    judge = stopping_rule(spec, [trial for trial in ledger.trials if trial.ended and trial.repeat_of is None])
    places = TrialPaths(ledger.run.patiently(spec.train.checkpoints.outage_s), spec.checkpoint_every)
    watch = TuneCallback(ledger, judge, board, spec.steps, sweep.on_change, sweep.after_failure, places, interrupt)
    told: dict[str, Any] = {
        "rows": dict(sweep.rows),
        "steps": spec.steps,
        "report_every": spec.report_every,
        "board": board,
        "places": places,
        "elsewhere": sweep.elsewhere,
    }
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, **told), lambda config: tune.PlacementGroupFactory(config["asks"])
    )
    scratch = tempfile.TemporaryDirectory(prefix="gw-tune-")  # Tune's own notes; a rerun goes by the ledger
    with environment_of(QUIET), _quiet_log(), scratch as folder, interrupt.on_signals():
        tune.Tuner(
            trainable,
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
                callbacks=[watch],
            ),
        ).fit()
    ray.kill(board)
    places.clear()


class FromLedger(Searcher):  # type: ignore[misc]  # Ray carries no types
    """Tune asks for the next process to start; the ledger says which trials it is to train."""

    def __init__(self, sweep: TunePlan, interrupt: Interrupt) -> None:
        super().__init__()
        self._sweep, self._interrupt = sweep, interrupt
        self._asked: dict[str, Request] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher for a restore that never comes; a progress bar of the driver's can't be pickled."""
        return {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Tune's word for nothing yet is None, for no more FINISHED."""
        try:
            return self._next()
        except GraftworkError as error:
            self._interrupt.give_up(error)
            return str(Searcher.FINISHED)

    def _next(self) -> dict[str, Any] | str | None:
        chosen = self._sweep.ledger.next(self._sweep.search)
        if chosen is None and not any(trial.state == "running" for trial in self._sweep.ledger.trials):
            return str(Searcher.FINISHED)  # not before: a trial that fails may be run again
        if chosen is None or isinstance(chosen, Wait):
            return None
        return self._trial_config(chosen, self._sweep.spec_of(chosen))

    def _trial_config(self, chosen: TrialRecord, spec: TrainSpec) -> dict[str, Any] | None:
        """What the process is told; None while there is no room for it. One that will never have room has failed."""
        sweep, asking, rows = self._sweep, self._sweep.resources, rows_key(chosen.values)
        if not fits_one(asking.request([spec], chosen.values), asking.nodes):
            sweep.ledger.update(
                chosen.trial_id, state="failed", error=str(asking.unschedulable_error(spec, chosen.values))
            )
            return None
        most = self._most_together(spec, chosen.values)
        if not most:
            return None
        group = group_of(chosen, most, sweep.ledger, sweep.search, sweep.spec_of, sweep.rows[rows])
        request = asking.request(list(group.values()), chosen.values)
        self._note_gang(chosen.trial_id, asking.explain_placement(spec, chosen.values))
        for trial_id in group:
            self._asked[trial_id] = request
            sweep.ledger.update(trial_id, started_s=sweep.clock(), wall_s=0.0)
        specs = {trial_id: spec.model_dump_json() for trial_id, spec in group.items()}
        return TrialConfig(specs, rows, request.bundles[:1], request.worker, chosen.until, chosen.parent).config()

    def _most_together(self, spec: TrainSpec, values: Values) -> int:
        """Trials that may share the process now: at most `share_base`, 0 where there is no room for one."""
        most = 1 if is_distributed(spec) or self._sweep.elsewhere else self._sweep.spec.share_base
        asking, asked = self._sweep.resources, self._asked_now()
        nodes = nodes_of_ray() if asked else []
        for count in range(most, 0, -1):
            request = asking.request([spec] * count, values)
            if fits_one(request, asking.nodes) and (not asked or fits(nodes, [*asked, request])):
                return count
        return 0

    def _note_gang(self, trial_id: str, why: str | None) -> None:
        notes = self._sweep.ledger.records[trial_id].notes
        if why is not None and why not in notes:
            self._sweep.ledger.update(trial_id, notes=(*notes, why))

    def _asked_now(self) -> list[Request]:
        """Of the processes that run; where none does, Ray may wait for nodes. Tune knows nothing of a gang's workers:
        Ray Train reserves them apart, and gives up when it waits for long."""
        running = [trial.trial_id for trial in self._sweep.ledger.trials if trial.state == "running"]
        return list({id(self._asked[one]): self._asked[one] for one in running}.values())  # one for a whole group

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The ledger knows."""

    def save(self, checkpoint_path: str) -> None:
        """Tune would restore from it; a rerun goes by the ledger."""

    def restore(self, checkpoint_path: str) -> None:
        """Never called."""


@contextlib.contextmanager
def _quiet_log() -> Iterator[None]:
    """Tune logs an error for each failed trial; the ledger tells it better."""
    log = logging.getLogger("ray.tune")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)
