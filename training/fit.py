"""The loop on Ray Train's workers: the only module that imports ray.train."""

import os
import shutil
from typing import Any

from graftwork.errors import ClusterError, GraftworkError, RunError
from graftwork.training.job import LoopResult, NonFiniteLoss, TrainJob
from graftwork.training.spec import TrainSpec

MAX_FAILURES = 3
"""Times that a lost worker is replaced; each time the loop goes on from the last checkpoint."""
COLLECTIVE_TIMEOUT_S = 300
"""A worker that waits longer for another gives up (torch's default is 1800)."""
START_TIMEOUT_S = 120
"""For all workers to be placed and alive; Ray's default of 60 s is short for a busy machine of two cores."""


def fit(job: TrainJob) -> LoopResult:
    """Run the job on `spec.num_workers` Ray Train workers and wait for its end.

    Raises ClusterError when the workers don't fit the cluster, NonFiniteLoss, RunError naming what killed the workers.
    """
    import ray
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer

    require_resources(job.spec)
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_TIMEOUT_S))
    assert job.run is not None, "trials run without Ray Train"
    notes = job.run.store.local_dir(*job.run.file("ray"))  # Ray's own, of no use afterwards
    trainer = TorchTrainer(
        _work,
        train_loop_config={"job": ray.put(job)},
        torch_config=TorchConfig(
            backend="nccl" if job.spec.gpus_per_worker else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S
        ),
        scaling_config=train.ScalingConfig(
            num_workers=job.spec.num_workers,
            use_gpu=job.spec.gpus_per_worker > 0,
            resources_per_worker=resources_per_worker(job.spec),
        ),
        run_config=train.RunConfig(
            name=job.spec.name,
            storage_path=str(notes),
            failure_config=train.FailureConfig(max_failures=MAX_FAILURES, controller_failure_limit=1),
        ),
    )
    _without_idle_helpers(trainer)
    try:
        outcome = trainer.fit().return_value
    except train.TrainingFailedError as error:
        raise _explained(job, error) from error
    finally:
        shutil.rmtree(notes, ignore_errors=True)
    if isinstance(outcome, GraftworkError):
        raise outcome
    assert isinstance(outcome, LoopResult), "rank 0 returns how the loop ended"
    return outcome


def _without_idle_helpers(trainer: Any) -> None:
    """Leave out the helper processes of Ray Train that have nothing to do; each takes about 2 CPU s (Ray 2.60).

    The dataset manager: rows come with the job, not through Ray Data. The placement group's cleaner, where this Ray
    has no dashboard: the cleaner asks it whether the controller lives, and holds up the run's end.
    """
    from ray._private.services import get_webui_url_from_internal_kv
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    idle: tuple[type, ...] = (DatasetsCallback,)
    if not get_webui_url_from_internal_kv():
        idle += (PlacementGroupCleanerCallback,)
    made = trainer._create_default_callbacks
    trainer._create_default_callbacks = lambda: [one for one in made() if not isinstance(one, idle)]


def _work(config: dict[str, object]) -> LoopResult | GraftworkError:
    """One worker. A loss that is not finite ends all ranks at the same step: returned, since a retry would not help."""
    import ray

    from graftwork.training.loop import run_steps

    job: TrainJob = ray.get(config["job"])
    try:
        return run_steps(job, lambda _: True)
    except NonFiniteLoss as error:
        return error


def resources_per_worker(spec: TrainSpec) -> dict[str, float]:
    """What one worker reserves of the cluster."""
    return {"CPU": spec.cpus_per_worker, **({"GPU": spec.gpus_per_worker} if spec.gpus_per_worker else {})}


def require_resources(spec: TrainSpec) -> None:
    """Raise ClusterError when the workers can never be placed: Ray itself would wait for ever."""
    import ray

    have = ray.cluster_resources()
    for name, each in resources_per_worker(spec).items():
        need = each * spec.num_workers
        if need > have.get(name, 0.0):
            key = f"{name.lower()}s_per_worker"
            raise ClusterError(
                f"num_workers={spec.num_workers}, {key}={each:g}",
                f"the cluster has {have.get(name, 0.0):g} {name}, the run needs {need:g}",
                "all workers run at the same time",
                f"--set num_workers={max(1, int(have.get(name, 0.0) // each))} or a smaller {key}",
            )


def _explained(job: TrainJob, error: Exception) -> GraftworkError:
    """The error of a worker if it was one of ours, else a RunError with the first line that tells why."""
    failures = getattr(error, "worker_failures", {})
    for failure in failures.values():
        cause = getattr(failure, "cause", None) or failure
        if isinstance(cause, GraftworkError):
            return cause
    rank, failure = next(iter(failures.items()), (None, error))
    where = f"worker {rank}" if rank is not None else "Ray Train's controller"
    return RunError(
        f"training {job.spec.name}",
        f"{where} failed: {str(failure).strip()[-2000:]}",
        f"a lost worker is replaced {MAX_FAILURES} times",
        "run the same command: it continues from the last checkpoint",
    )
