"""The trials under Ray Tune: the only module that starts it.

A process trains one trial, or with `share_base` several. Tune gives it its place in the cluster and takes it back;
which trials there are is the ledger's and the search's business, which go on the judge's.
"""

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher

from graftwork.cluster.local import environment_of
from graftwork.errors import GraftworkError
from graftwork.training.data import PreparedData
from graftwork.training.spec import TrainSpec
from graftwork.tuning.asking import TrialResources, fits_one, is_distributed
from graftwork.tuning.board import start_trial_control
from graftwork.tuning.elsewhere import Elsewhere
from graftwork.tuning.failures import TrialFailure, after, shrunk
from graftwork.tuning.judge import judge_of
from graftwork.tuning.ledger import Ledger
from graftwork.tuning.places import TrialPaths
from graftwork.tuning.records import TrialRecord
from graftwork.tuning.room import Request, fits, nodes_of_ray
from graftwork.tuning.search import Search, Wait
from graftwork.tuning.space import Values, rows_key
from graftwork.tuning.spec import TuneSpec
from graftwork.tuning.together.group import group_of
from graftwork.tuning.trial import Told, run_trial
from graftwork.tuning.watch import Interrupt, TuneCallback

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
    judge = judge_of(spec, [trial for trial in ledger.trials if trial.ended and trial.repeat_of is None])
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
                # where its fork trains (tuning.forked): a process that trains twice keeps adapters (peft issue 2221)
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
        return Told(specs, rows, request.bundles[:1], request.worker, chosen.until, chosen.parent).config()

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
