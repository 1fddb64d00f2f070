"""A sweep: trials of the training loop under Ray Tune, recorded one by one, the best spec chosen.

    runs/<name>-<hash8>/{spec.yaml, provenance.json, trials.json, status.json}

Trials are plain function trainables, one process each: a Ray Train run nested in a trial keeps its placement group when
the scheduler stops it, and the sweep hangs (Ray 2.60). A rerun goes by `trials.json`, not by Tune's own state: that is
saved every ten seconds at most, so a killed driver would forget finished trials.
"""

import contextlib
import dataclasses
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
import yaml
from ray import tune as ray_tune

from graftwork import provenance
from graftwork.cluster.local import environment_of
from graftwork.config import canonical_json
from graftwork.errors import ClusterError, ConfigError, GraftworkError, Interrupted
from graftwork.storage import DEFAULT_ROOT, RunPaths, Store
from graftwork.training.data import PreparedData, prepare
from graftwork.training.loop import TrainJob
from graftwork.training.spec import TrainSpec
from graftwork.tuning.scheduler import scheduler
from graftwork.tuning.space import Values, draw
from graftwork.tuning.spec import TuneSpec
from graftwork.tuning.trial import run_trial
from graftwork.tuning.trials import Ledger, TrialRecord, choose, rule
from graftwork.tuning.watch import Watch

QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of a spec stay valid in a trial
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C reaches the caller at once
    "TUNE_FORCE_TRIAL_CLEANUP_S": "10",  # default 600: how long a stopped trial that does not leave keeps its CPU
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}

DECIDES_ROWS = ("base", "data", "prompt", "max_length", "too_long", "seed")
"""Keys of a training spec that `training.data.prepare` reads."""


@dataclass(frozen=True)
class TuneProgress:
    """The sweep as it stands, after each change of a trial."""

    trials: tuple[TrialRecord, ...]
    elapsed_s: float

    @property
    def total(self) -> int:
        return len(self.trials)

    @property
    def done(self) -> int:
        """Trials that finished, were stopped, or failed."""
        return sum(trial.ended or trial.state == "failed" for trial in self.trials)

    @property
    def text(self) -> str:
        """The trial with the lowest loss at its last report, in a few words."""
        seen = [trial for trial in self.trials if trial.losses and trial.state != "failed"]
        if not seen:
            return f"{sum(trial.state == 'running' for trial in self.trials)} running"
        best = min(seen, key=lambda trial: (-trial.steps, trial.losses[-1][1]))
        values = " ".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in best.values.items())
        return f"best so far {best.losses[-1][1]:.3f} at step {best.steps} ({values})"


@dataclass(frozen=True)
class TuneReport:
    """What a sweep found."""

    run_id: str
    trials: tuple[TrialRecord, ...]
    """In draw order."""
    best_id: str
    best: Values
    best_spec: TrainSpec
    """`spec.train` with the best values: what to train on the full budget."""
    sampler: str
    """How the trials were drawn, in words."""
    rule: str
    """How the best was chosen, in words."""
    eval_rows: int
    """Held-out rows behind each loss."""
    wall_s: float
    """Of all attempts."""
    reused: bool = False
    """The sweep was done before; nothing ran."""

    @property
    def peak_rss_bytes(self) -> int:
        """Largest resident set of any trial's process."""
        return max(trial.peak_rss_bytes for trial in self.trials)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**dataclasses.asdict(self), "best_spec": self.best_spec.model_dump(mode="json")}


def tune(spec: TuneSpec, *, on_progress: Callable[[TuneProgress], None] | None = None) -> TuneReport:
    """Run a sweep on the Ray of this process; continue it where it was interrupted; reuse it when it is done.

    Trials that finished or were stopped are never repeated; failed ones are, as long as the sweep has no result.
    Raises ConfigError or DataError before the first trial, ClusterError when no node can hold a trial, RunError when no
    trial ran to its end, Interrupted on Ctrl-C.
    """
    drawn = draw(spec)
    run = RunPaths(Store(spec.root), spec.name, _identity(spec))
    sweep = _Sweep(spec, run, Ledger(run, drawn.points), drawn.reason, on_progress or (lambda progress: None))
    if sweep.is_done():
        return sweep.reuse()
    _check_room(spec.train)
    sweep.ledger.resume()
    return sweep.run(_jobs(spec, [trial for trial in sweep.ledger.trials if not trial.ended]))


class _Sweep:
    """One attempt at a sweep: state of the run folder and what the driver does with it."""

    def __init__(
        self, spec: TuneSpec, run: RunPaths, ledger: Ledger, sampler: str, on_progress: Callable[[TuneProgress], None]
    ) -> None:
        self.spec, self.paths, self.ledger, self.sampler, self.on_progress = spec, run, ledger, sampler, on_progress
        self.started = time.monotonic()
        self.earlier_s = float(self.status().get("wall_s", 0.0))

    def status(self) -> dict[str, Any]:
        """status.json, empty before the first attempt."""
        store = self.paths.store
        return dict(store.read_json(*self.paths.status())) if store.exists(*self.paths.status()) else {}

    def is_done(self) -> bool:
        return self.status().get("state") == "finished"

    def reuse(self) -> TuneReport:
        self.ledger.restore()
        return self.report(reused=True)

    def run(self, jobs: dict[str, TrainJob]) -> TuneReport:
        """The trials that are left, then the choice."""
        self.begin()
        try:
            if jobs:
                self.run_trials(jobs)
            report = self.report()
        except KeyboardInterrupt:
            self.set_state("interrupted")
            done = sum(trial.ended for trial in self.ledger.trials)
            raise Interrupted(
                f"sweep {self.paths.run_id}",
                f"interrupted after {done} of {len(self.ledger.trials)} trials",
                "a trial that ended is kept",
                "run the same command again: it continues",
            ) from None
        except GraftworkError as error:
            self.set_state("failed", error=str(error))
            raise
        self.set_state("finished", best_id=report.best_id)
        return report

    def begin(self) -> None:
        """The folder of the sweep, before its first trial."""
        store = self.paths.store
        document = yaml.safe_dump(self.spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        store.write_bytes(document.encode(), *self.paths.spec())
        store.write_json(provenance.collect(self.spec.seed), *self.paths.provenance())
        self.set_state("running")
        self.ledger.write()
        self.tell()

    def run_trials(self, jobs: dict[str, TrainJob]) -> None:
        """Tune over the trials in `jobs`; the ledger holds the outcome."""
        train = self.spec.train
        resources = {"CPU": train.cpus_per_worker} | ({"GPU": train.gpus_per_worker} if train.gpus_per_worker else {})
        trainable = ray_tune.with_resources(ray_tune.with_parameters(run_trial, jobs=jobs), resources)
        with environment_of(QUIET), _quiet_log(), tempfile.TemporaryDirectory(prefix="gw-tune-") as scratch:
            ray_tune.Tuner(
                trainable,
                param_space={"trial_id": ray_tune.grid_search(list(jobs))},
                tune_config=ray_tune.TuneConfig(
                    scheduler=scheduler(self.spec, [trial for trial in self.ledger.trials if trial.ended]),
                    max_concurrent_trials=self.spec.max_concurrent,
                    reuse_actors=False,  # one process a trial: memory of a trial dies with it (peft issue 2221)
                ),
                run_config=ray_tune.RunConfig(
                    name=self.paths.run_id,
                    storage_path=scratch,
                    verbose=0,
                    callbacks=[Watch(self.ledger, self.spec.steps, self.tell)],
                ),
            ).fit()

    def report(self, reused: bool = False) -> TuneReport:
        trials = self.ledger.trials
        best = choose(trials, self.spec.steps)
        return TuneReport(
            run_id=self.paths.run_id,
            trials=trials,
            best_id=best.trial_id,
            best=best.values,
            best_spec=self.spec.train.with_(best.values),
            sampler=self.sampler,
            rule=rule(self.spec.steps),
            eval_rows=self.spec.eval_rows,
            wall_s=self.earlier_s if reused else self.wall_s(),
            reused=reused,
        )

    def wall_s(self) -> float:
        return round(self.earlier_s + time.monotonic() - self.started, 3)

    def set_state(self, state: str, **more: Any) -> None:
        status = {"state": state, "wall_s": self.wall_s(), "sampler": self.sampler, **more}
        self.paths.store.write_json(status, *self.paths.status())

    def tell(self) -> None:
        self.on_progress(TuneProgress(self.ledger.trials, self.wall_s()))


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


def _identity(spec: TuneSpec) -> str:
    """Digest of the spec wherever its records live."""
    return spec.with_({"root": DEFAULT_ROOT, "train.root": DEFAULT_ROOT}).digest()


def _jobs(spec: TuneSpec, trials: Iterable[TrialRecord]) -> dict[str, TrainJob]:
    """The job of each trial, by its id. Trials whose rows are equal share one PreparedData."""
    rows: dict[str, PreparedData] = {}
    jobs = {}
    for trial in trials:
        train = spec.train.with_({**trial.values, "num_workers": 1, "data.eval_rows": spec.eval_rows})
        key = canonical_json(train.model_dump(mode="json", include=set(DECIDES_ROWS)))
        if key not in rows:
            rows[key] = prepare(train)
        jobs[trial.trial_id] = TrainJob(
            train, rows[key], max_steps=spec.steps, report_every=spec.report_every, eval_every=spec.report_every
        )
    _check_comparable(rows.values())
    return jobs


def _check_comparable(prepared: Iterable[PreparedData]) -> None:
    """Raise ConfigError when trials would be scored on different numbers of held-out rows."""
    held_out = {len(data.eval) if data.eval is not None else 0 for data in prepared}
    if len(held_out) > 1:
        raise ConfigError(
            "space",
            f"trials would be scored on {' or '.join(map(str, sorted(held_out)))} held-out rows",
            "losses are compared on the same rows; a shorter max_length drops long ones",
            "take max_length, prompt or data out of the space",
        )


def _check_room(train: TrainSpec) -> None:
    """Raise ClusterError unless some node can hold a trial; Tune would wait for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for key, wanted in (("CPU", train.cpus_per_worker), ("GPU", train.gpus_per_worker)):
        largest = max((node.get(key, 0.0) for node in nodes), default=0.0)
        if wanted > largest:
            setting = f"train.{key.lower()}s_per_worker={wanted:g}"
            raise ClusterError(
                setting, f"the largest node has {largest:g}", "a trial runs on one node", f"lower it to {largest:g}"
            )
