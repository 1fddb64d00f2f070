"""A sweep whose trial is a gang of machines: one RayJob a trial, each a training of its own behind a queue of Kueue's.

Small trials share the machines of one RayJob with Tune inside. A gang of several machines would there wait for another
gang's; here the queue lets a trial go when all of its machines are free, and a trial that ends gives them back.
"""

from collections.abc import Mapping
from typing import Any

from graftwork.cluster.backend import Attempt, Finding
from graftwork.cluster.kuberay.findings import refuse
from graftwork.cluster.kuberay.labels import SWEEP, TRIAL
from graftwork.cluster.kuberay.names import label_value
from graftwork.cluster.kuberay.rayjob import build_rayjob, with_plan


def is_gang(attempt: Attempt) -> bool:
    """Whether a trial needs more than one machine at once."""
    demand, groups = attempt.job.demand, attempt.job.cluster.workers
    most = max((group.gpu if demand.gpus_per_worker else 1 for group in groups), default=1)
    each = demand.gpus_per_worker or 1.0
    return demand.num_workers * each > most


def build_trial_rayjobs(
    sweep_id: str, trials: Mapping[str, Attempt], namespace: str, wheel_uri: str | None
) -> list[dict[str, Any]]:
    """The RayJobs of a sweep's trials, by trial id; `kubectl get rayjobs -l graftwork.dev/sweep=...` lists them."""
    return [_of_sweep(build_rayjob(trial, namespace, wheel_uri), sweep_id, name) for name, trial in trials.items()]


def check_trials(trials: Mapping[str, Attempt]) -> list[Finding]:
    """What keeps the trials from running beside each other."""
    found = []
    unqueued = [name for name, trial in trials.items() if trial.job.cluster.queue is None]
    if len(trials) > 1 and unqueued:
        found.append(refuse(
            "TRIALS-NO-QUEUE", "queue", f"{len(unqueued)} of {len(trials)} trials have none",
            "gangs that start at once hold a part of their machines each, and wait for the rest for ever",
            "queue: a LocalQueue of Kueue's (k8s/overlays/kueue)",
        ))  # fmt: skip
    ids = [trial.id for trial in trials.values()]
    for name in sorted({name for name in ids if ids.count(name) > 1}):
        found.append(
            refuse("TRIALS-ONE-NAME", "name", f"two trials are {name}", "one object a trial: equal trials are one")
        )
    return found


def _of_sweep(made: dict[str, Any], sweep_id: str, trial_id: str) -> dict[str, Any]:
    made["metadata"]["labels"] |= {SWEEP: label_value(sweep_id), TRIAL: label_value(trial_id)}
    return with_plan(made)
