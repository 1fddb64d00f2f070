"""Training loop on Ray Train's workers: start, preemption, network interface.

Ray Train replaces workers that are lost. When it gives up, because no room was found for them or too many were lost,
this module looks at the cluster and starts it again, with fewer workers where the spec allows, while there is progress.
"""

import contextlib
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from graftwork.errors import GraftworkError
from graftwork.training.local_worker import (
    COLLECTIVE_TIMEOUT_S,
    MAX_FAILURES,
    START_TIMEOUT_S,
    fit_in_process,
    lost_worker,
    needs_ray_train,
    newest_step,
    require_wanted,
)
from graftwork.training.loop import train_as_worker
from graftwork.training.ray_resources import resources_per_worker, workers_soon, workers_that_fit
from graftwork.training.worker_messages import LoopResult, Report, TrainJob

NOTICE_S = 2
"""Between two looks of Ray Train for nodes that are about to be taken away (default 5)."""


def fit(job: TrainJob, *, ray_train: bool | None = None) -> LoopResult:
    """Run the job on `spec.num_workers` workers and wait for its end.

    A single worker of this machine is a child process (local_worker.py); all others are Ray Train's. `ray_train`
    overrides that choice.

    Raises ClusterError when the workers don't fit the cluster, also later for `recovery.deadline_s`; NonFiniteLoss,
    CheckpointLost, SupersededError, ConfigError as the loop does; Interrupted where the job was asked to end;
    RunError naming what killed the workers.
    """
    if not (needs_ray_train(job.spec) if ray_train is None else ray_train):
        return fit_in_process(job)
    from ray import train

    from graftwork.compat.ray_train import workers_did_not_start

    workers, reached, since = workers_that_fit(job.spec), newest_step(job), time.monotonic()
    while True:
        lost: Exception | None = None
        try:
            result = _run_attempt(job, workers)
            if not result.preempted:
                return result
            require_wanted(job)
        except train.TrainingFailedError as error:
            lost = error
        progress = newest_step(job) > reached
        if lost is not None and not progress and not workers_did_not_start(lost):
            raise _worker_error(job, lost) from lost
        if progress:
            reached, since = newest_step(job), time.monotonic()
        workers = workers_soon(job.spec, since + job.spec.recovery.deadline_s)


def fit_trial(job: TrainJob, report: Report, worker: Mapping[str, float]) -> LoopResult:
    """A trial of a sweep on its workers, each with `worker` of the cluster's resources; `report` is called on rank 0.

    Lost workers are not replaced here: the sweep runs the trial again. Raises what `fit` raises.
    """
    from ray import train

    with tempfile.TemporaryDirectory(prefix="gw-trial-") as notes:
        try:
            return _run_workers(job, job.spec.num_workers, dict(worker), Path(notes), failures=0, report=report)
        except train.TrainingFailedError as error:
            raise _worker_error(job, error) from error


def _run_attempt(job: TrainJob, workers: int) -> LoopResult:
    """Ray Train once. Raises what `fit` raises, and Ray Train's errors for what it gave up."""
    assert job.run is not None, "a trial is not gone on with"
    notes = job.run.store.local_dir(*job.run.file("ray"))  # Ray's own, of no use afterwards
    try:
        return _run_workers(job, workers, resources_per_worker(job.spec), notes, failures=MAX_FAILURES, report=None)
    finally:
        shutil.rmtree(notes, ignore_errors=True)


def _run_workers(
    job: TrainJob, workers: int, each: dict[str, float], notes: Path, *, failures: int, report: Report | None
) -> LoopResult:
    """`report` None: the run's own, which writes its records."""
    import ray
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer

    from graftwork.compat.ray_train import AtWorkerStart, without_idle_helpers

    spec = job.spec
    # Ray Train waits for room until fewer workers may go on, or until it makes no difference who waits
    elastic, least_s = spec.recovery.min_workers is not None, min(START_TIMEOUT_S, spec.recovery.deadline_s)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(spec.recovery.wait_s if elastic else least_s)
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", str(NOTICE_S))
    trainer = TorchTrainer(
        _work,
        train_loop_config={"job": ray.put(job), "report": report},
        torch_config=TorchConfig(backend="nccl" if spec.gpus else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=train.ScalingConfig(num_workers=workers, use_gpu=spec.gpus > 0, resources_per_worker=each),
        run_config=train.RunConfig(
            name=spec.name,
            storage_path=str(notes),
            failure_config=train.FailureConfig(max_failures=failures, controller_failure_limit=0),
            callbacks=[AtWorkerStart(take_notice), AtWorkerStart(meet_by_node_address)],
        ),
    )
    without_idle_helpers(trainer)
    with _abort_on_ctrl_c(trainer):
        outcome = trainer.fit().return_value
    if isinstance(outcome, GraftworkError):
        raise outcome
    assert isinstance(outcome, LoopResult), "rank 0 returns how the loop ended"
    return outcome


@contextlib.contextmanager
def _abort_on_ctrl_c(trainer: Any) -> Iterator[None]:
    """Let Ctrl-C raise, in the main thread; Ray Train's own handler would end the process with exit code 0 (Ray 2.60).

    Its controller is told to give the workers up, for a Ray that outlives the run. It is not waited for: a private Ray
    goes with all of them, and a job that is stopped has three seconds.
    """
    from graftwork.compat.ray_train import on_controller

    controllers: list[Any] = []
    on_controller(trainer, controllers.append)
    try:
        yield
    except KeyboardInterrupt:
        for controller in controllers:
            controller.abort.remote()
        raise


def _work(config: dict[str, Any]) -> LoopResult | GraftworkError:
    """One worker."""
    import ray

    return train_as_worker(ray.get(config["job"]), config["report"], preemption_requested)


def _worker_error(job: TrainJob, error: Exception) -> GraftworkError:
    """The error of a worker if it was one of ours, else a RunError with the first line that tells why."""
    failures = getattr(error, "worker_failures", {})
    for failure in failures.values():
        cause = getattr(failure, "cause", None) or failure
        if isinstance(cause, GraftworkError):
            return cause
    rank, failure = next(iter(failures.items()), (None, error))
    where = f"worker {rank}" if rank is not None else "Ray Train's controller"
    return lost_worker(job, where, str(failure).strip()[-2000:])


# Gloo meets over the address that the machine's own name resolves to. Debian and Ubuntu write 127.0.1.1 for it into
# /etc/hosts, so that workers of two machines wait for each other on loopback; NCCL takes the first interface it finds.
VARIABLES = {"GLOO_SOCKET_IFNAME": "{}", "NCCL_SOCKET_IFNAME": "={}"}
"""Form of an interface's name in each; NCCL takes a plain word for the beginning of a name."""


def meet_by_node_address() -> None:
    """Name the interface of the node's address to gloo and NCCL, before this worker's process group is made.

    Variables that are set stay as they are; a node on loopback has no other machine to meet.
    """
    from ray.util import get_node_ip_address

    name = interface_of(get_node_ip_address())
    if name is not None:
        for variable, form in VARIABLES.items():
            os.environ.setdefault(variable, form.format(name))


def interface_of(address: str) -> str | None:
    """The interface that has an address; None for loopback, and where none has it (behind a translated address)."""
    if address.startswith("127.") or address == "::1":
        return None
    for name, found in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address for one in found):
            return name
    return None


_notice = threading.Event()
"""Set when this worker's machine is about to be taken away: the worker got SIGTERM."""


def take_notice() -> None:
    """Make this worker's first SIGTERM a notice; the second one ends the worker, as without this.

    Called on the worker's main thread, the only one that may set handlers; the training runs in another.
    """
    before = signal.getsignal(signal.SIGTERM)

    def note(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, before)
        _notice.set()

    signal.signal(signal.SIGTERM, note)


def preemption_requested() -> bool:
    """Return whether this worker's machine is about to be taken away. Called in the training thread."""
    from graftwork.compat.ray_train import node_is_draining

    return _notice.is_set() or node_is_draining()
