"""Jobs for tests: a program of one's own, which needs no Ray inside."""

import sys
from collections.abc import Sequence
from typing import Any

from graftwork.cluster.jobs.backend import StoredBackend
from graftwork.cluster.jobs.models import ExecSpec, Job
from graftwork.cluster.jobs.store import JobStore
from graftwork.cluster.spec import ClusterSpec
from graftwork.cluster.targets.local import LocalTarget

TIMEOUT_S = 60.0


def command_job(root: str, argv: Sequence[str], *, name: str = "task", **cluster: Any) -> Job:
    """`argv` as a job; `cluster` are keys of the cluster's spec, e.g. limits={"deadline": "2s"}."""
    spec = ExecSpec(name=name, root=root, argv=tuple(argv))
    return Job(name, "exec", spec.identity(), root, spec.model_dump(mode="json"), ClusterSpec(**cluster))


def python_job(root: str, program: str, *, name: str = "task", **cluster: Any) -> Job:
    """A program in Python as a job."""
    return command_job(root, (sys.executable, "-u", "-c", program), name=name, **cluster)


def local_backend(root: str) -> StoredBackend:
    """The local place of a root."""
    return StoredBackend(LocalTarget(root), root)


def printed(root: str, job_id: str) -> str:
    """What the latest attempt printed, as far as it is stored."""
    runs = JobStore(root)
    return "".join(runs.logs(job_id, runs.attempts(job_id)[-1]))


def end_all_jobs(root: str) -> None:
    """Nothing of a test runs on after it, however it ended."""
    here = local_backend(root)
    for job_id in here.runs.job_ids():
        here.cancel(job_id)
        for number in here.runs.attempts(job_id):
            here.place.stop(f"{job_id}-a{number}")
