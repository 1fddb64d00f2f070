"""The trials under Ray Tune: the only module that starts it.

Trials are plain function trainables, one process each: a Ray Train run nested in a trial keeps its placement group when
the scheduler stops it, and the sweep hangs (Ray 2.60).
"""

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping

import ray
from ray import tune

from graftwork.cluster.local import environment_of
from graftwork.errors import ClusterError
from graftwork.training.job import TrainJob
from graftwork.training.machines import resources_per_worker
from graftwork.training.spec import TrainSpec
from graftwork.tuning.ledger import Ledger
from graftwork.tuning.scheduler import scheduler
from graftwork.tuning.spec import TuneSpec
from graftwork.tuning.trial import run_trial
from graftwork.tuning.watch import Interrupt, Watch

QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of a spec stay valid in a trial
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # tuning.watch.Interrupt takes its place, for SIGTERM as well
    "TUNE_FORCE_TRIAL_CLEANUP_S": "10",  # default 600: how long a stopped trial that does not leave keeps its CPU
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}


def fit(spec: TuneSpec, jobs: Mapping[str, TrainJob], ledger: Ledger, on_change: Callable[[], None]) -> None:
    """Run the trials of `jobs` (by trial id); the ledger holds the outcome. Needs an initialised Ray.

    Raises ClusterError when no node can hold a trial, KeyboardInterrupt on Ctrl-C and SIGTERM.
    """
    require_room(spec.train)
    interrupt = Interrupt()
    trainable = tune.with_resources(tune.with_parameters(run_trial, jobs=dict(jobs)), resources_per_worker(spec.train))
    scratch = tempfile.TemporaryDirectory(prefix="gw-tune-")  # Tune's own notes; a rerun goes by the ledger
    with environment_of(QUIET), _quiet_log(), scratch as folder, interrupt.on_signals():
        tune.Tuner(
            trainable,
            param_space={"trial_id": tune.grid_search(list(jobs))},
            tune_config=tune.TuneConfig(
                scheduler=scheduler(spec, [trial for trial in ledger.trials if trial.ended]),
                max_concurrent_trials=spec.max_concurrent,
                reuse_actors=False,  # one process a trial: its memory goes with it (peft issue 2221)
            ),
            run_config=tune.RunConfig(
                name=spec.name,
                storage_path=folder,
                verbose=0,
                stop=interrupt,
                callbacks=[Watch(ledger, spec.steps, interrupt, on_change)],
            ),
        ).fit()


def require_room(train: TrainSpec) -> None:
    """Raise ClusterError unless some node can hold a trial; Tune would wait for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for name, need in resources_per_worker(train).items():
        largest = max((node.get(name, 0.0) for node in nodes), default=0.0)
        if need > largest:
            raise ClusterError(
                f"train.{name.lower()}s_per_worker={need:g}",
                f"the largest node has {largest:g} {name}",
                "a trial runs on one node",
                f"set it to {largest:g} or less",
            )


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
