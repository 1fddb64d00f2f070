"""Ray cluster as a target, through its Jobs API: the driver is the job, on the head.

`run_command` runs a command that is no job, e.g. the demo, and prints its output here.
"""

import contextlib
import datetime
import email.utils
import hashlib
import re
import secrets
import shlex
import socket
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from graftwork.cluster.jobs.checks import gpu_memory_findings, gpu_share_findings, nvme_findings, secret_findings
from graftwork.cluster.jobs.inputs import path_findings
from graftwork.cluster.jobs.models import (
    Attempt,
    Demand,
    Finding,
    Findings,
    Job,
    ObservedState,
    TargetMachines,
    refuse,
    warn,
)
from graftwork.cluster.jobs.packaging import build_wheel, relative, shipped, zipped
from graftwork.cluster.session import JOB, host_and_port, is_loopback, token, without_target
from graftwork.cluster.spec import ClusterSpec
from graftwork.cluster.targets.ray_jobs_api import ENDED, JobsApi, RayNode, exit_code
from graftwork.errors import ClusterError, Interrupted
from graftwork.planning.hardware import GIB, gpu_called
from graftwork.planning.memory import HEADROOM
from graftwork.storage.store import Store

ENTRYPOINT = "python -c 'from graftwork.cli import main; main()'"
VERBS = ("train", "tune", "serve", "compare", "quantize", "chat", "demo")
"""Commands that take a `--target`. The others start no Ray."""
STOP_S = 8.0
STARTS_S = 1.0
"""A pending job that is asked to end may be about to start, and then ends by itself."""
DROP_S = 20.0
DROP = "-drop"
"""Ends the id of the job that ends another one; such jobs are deleted at once."""
POLL_INTERVAL_S = 0.2
PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")
"""What a shell takes as it is: Ray gives an entrypoint to one."""
NETWORK_DISKS = ("nfs", "cifs", "smb", "ceph", "lustre", "gpfs", "beegfs", "glusterfs", "fuse", "9p", "virtiofs", "afs")
CLOCK_S = 5.0
"""A driver counts as silent after 20 s by the reader's clock."""
PYTHON = (3, 11)
WITHOUT_TOKEN_S = 5.0


def run_command(on: str, argv: Sequence[str]) -> int:
    """Run `graftwork ARGV` on the Ray at `on`, print what it prints, return its exit code.

    Files that the arguments name are shipped; data and root must be reachable from the cluster (s3:// or a shared
    folder). Ctrl-C ends the job there, and what it committed stays valid. Raises ClusterError, Interrupted, RunError.
    """
    files = [Path(argument) for argument in argv if Path(argument).is_file()]
    named = [str(relative(Path(a))) if Path(a).is_file() else a for a in without_target(argv)]
    named += ["--target", JOB] if named and named[0] in VERBS else []
    job_id = f"graftwork-{secrets.token_hex(6)}"
    with JobsApi(on) as jobs:
        with shipped(files) as folder:
            package = zipped(
                {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            )
        jobs.submit(f"{ENTRYPOINT} {shlex.join(named)}", package, job_id)
        print(f"job {job_id} at {jobs.on}", file=sys.stderr)
        try:
            for text in jobs.logs(job_id):
                print(text, end="", flush=True)
        except KeyboardInterrupt:
            with contextlib.suppress(ClusterError):
                jobs.stop(job_id)
            raise Interrupted(
                f"job {job_id}",
                f"stopped at {on} by Ctrl-C",
                "what was committed stays valid",
                "run the same command: it continues from there",
            ) from None
        return exit_code(jobs.status(job_id), job_id)


class RayJobsTarget:
    """Ray cluster at an address. Each call connects again, with the token of the environment."""

    def __init__(self, on: str, root: str) -> None:
        self.on, self._root = on.rstrip("/"), Store(root).uri

    def machines(self, cluster: ClusterSpec) -> TargetMachines:
        """The nodes that are alive now."""
        with JobsApi(self.on) as jobs:
            return machines_of(self.on, jobs.nodes())

    def check(self, job: Job) -> list[Finding]:
        """That it answers and takes us, has what the workers ask for, and reaches what the job names."""
        with JobsApi(self.on) as jobs:
            return fit(job, self._root, jobs)

    def objects(self, attempt: Attempt) -> list[Mapping[str, Any]]:
        return []

    def current(self, attempt: Attempt) -> list[Mapping[str, Any]]:
        return []

    def doctor(self) -> list[Finding]:
        """Who may use it, its clock, its version, its agents and nodes."""
        with JobsApi(self.on) as jobs:
            return health(self._root, jobs)

    def start(self, attempt: Attempt) -> None:
        """Send the wheel as the job's folder and start the driver. `check` saw to it that a shell changes nothing."""
        entrypoint = f"python -m graftwork.cluster.jobs.driver {self._root} {attempt.job.job_id} {attempt.number} {JOB}"
        with JobsApi(self.on) as jobs:
            jobs.submit(entrypoint, build_wheel()[1], self.name(attempt.id))

    def observe(self, attempt_ids: Collection[str]) -> dict[str, ObservedState]:
        with JobsApi(self.on) as jobs:
            found = {job.submission_id: job for job in jobs.list()}
        names = {attempt_id: found.get(self.name(attempt_id)) for attempt_id in attempt_ids}
        return {attempt_id: ObservedState(job.status, message=job.message) for attempt_id, job in names.items() if job}

    def stop(self, attempt_id: str) -> None:
        """Stop the job and see that it has stopped; one that never started is taken out of Ray, with its record."""
        name = self.name(attempt_id)
        with JobsApi(self.on) as jobs:
            seen = jobs.status(name)
            if seen is None or seen.status in ENDED:
                return
            jobs.stop(name)
            if seen.status == "PENDING" and not _wait_for(STARTS_S, lambda: _has_left(jobs, name, "PENDING")):
                self._drop(jobs, name)
            elif not _wait_for(STOP_S, lambda: _has_ended(jobs, name)):
                raise ClusterError(
                    f"cancel {attempt_id} at {self.on}",
                    f"Ray did not stop it within {STOP_S:.0f} s",
                    "its driver gets SIGTERM, and is killed after 3 s",
                    "look at the dashboard; a head without memory answers and does nothing",
                )

    def name(self, attempt_id: str) -> str:
        """Of the attempt in Ray: the same job of another store is another one there."""
        return f"{attempt_id}-{hashlib.sha256(self._root.encode()).hexdigest()[:8]}"

    def _drop(self, jobs: JobsApi, pending: str) -> None:
        dropping = f"{pending}{DROP}"
        entrypoint = f"python -m graftwork.cluster.targets.ray_jobs {pending}"
        jobs.submit(entrypoint, build_wheel()[1], dropping)
        if not _wait_for(DROP_S, lambda: _has_ended(jobs, pending)):
            raise ClusterError(
                f"cancel {pending} at {self.on}",
                f"it is pending, and did not go within {DROP_S:.0f} s",
                "its driver ends at once should it ever start",
                "look at the dashboard: the head takes no jobs",
            )
        for name in (pending, dropping):
            if _wait_for(STOP_S, lambda: _has_ended(jobs, name)):  # noqa: B023  # called at once
                jobs.delete(name)


def _wait_for(timeout_s: float, done: Callable[[], bool]) -> bool:
    end = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(POLL_INTERVAL_S)
    return True


def _has_ended(jobs: JobsApi, name: str) -> bool:
    job = jobs.status(name)
    return job is None or job.status in ENDED


def _has_left(jobs: JobsApi, name: str, status: str) -> bool:
    job = jobs.status(name)
    return job is None or job.status != status


def fit(job: Job, root: str, jobs: JobsApi) -> list[Finding]:
    """Findings of a job. Raises ClusterError where the Ray does not answer or take us."""
    nodes = jobs.nodes()
    here = is_here(jobs.on, nodes)
    return [
        *secret_findings(job),
        *versions(jobs, job.cluster.ray_version),
        *workers(job, nodes),
        *roots(root, here),
        *path_findings(job.spec, shared=True, here=here),
    ]


def machines_of(on: str, nodes: Sequence[RayNode]) -> TargetMachines:
    """Resources that Ray hands out on the nodes."""
    return TargetMachines(
        owner=on,
        cpus=sum(node.total.get("CPU", 0.0) for node in nodes),
        memory_bytes=int(sum(node.total.get("memory", 0.0) for node in nodes)),
        gpus=sum(node.total.get("GPU", 0.0) for node in nodes),
        gpu_types=tuple(dict.fromkeys(node.gpu_type for node in nodes if node.total.get("GPU"))),
    )


def health(root: str, jobs: JobsApi) -> list[Finding]:
    """Findings of the Ray itself."""
    nodes = jobs.nodes()
    found = versions(jobs, ClusterSpec().ray_version)
    return [
        *found,
        *_agent_findings(nodes),
        *_clock_findings(jobs),
        *_access_findings(jobs.on),
        *roots(root, is_here(jobs.on, nodes)),
    ]


def is_here(on: str, nodes: Sequence[RayNode]) -> bool:
    """Whether the head is this machine. A tunnel makes another one look like it: its own name decides, if reported."""
    heads = [node.host for node in nodes if node.is_head and node.host]
    return heads[0] == socket.gethostname() if heads else is_loopback(host_and_port(on)[0])


def versions(jobs: JobsApi, wanted: str) -> list[Finding]:
    """Ray and Python there, against what the code needs."""
    metadata = jobs.json("/api/v0/cluster_metadata")["data"]
    ray, python = str(metadata.get("rayVersion", "")), str(metadata.get("pythonVersion", ""))
    found = []
    if ray.split(".")[:2] != wanted.split(".")[:2]:
        found.append(
            refuse(
                "RAY-VERSION",
                "ray_version",
                f"the cluster runs Ray {ray or '?'}",
                f"this code is for Ray {wanted}",
                f"set --target or `image` to a cluster with Ray {wanted}",
            )
        )
    if python and tuple(int(part) for part in python.split(".")[:2]) < PYTHON:
        found.append(
            refuse(
                "PYTHON-VERSION",
                "python",
                f"the cluster runs Python {python}",
                "this code needs 3.11 or newer",
                "set --target or `image` to a cluster with Python 3.11",
            )
        )
    return found


def workers(job: Job, nodes: Sequence[RayNode]) -> list[Finding]:
    """Whether the workers ever fit (error) and fit now (warning). A cluster that can grow may fit them later."""
    found = [finding for demand in job.demands for finding in _room_findings(demand, nodes)]
    return [*found, *_gpu_memory_findings(job, nodes), *gpu_share_findings(job), *nvme_findings(job, None)]


def _room_findings(demand: Demand, nodes: Sequence[RayNode]) -> list[Finding]:
    each = {
        "CPU": demand.cpus_per_worker,
        "GPU": demand.gpus_per_worker,
        "memory": demand.memory_bytes_per_worker / HEADROOM,
    }
    parts = [f"{each[name]:g} {name}" for name in ("CPU", "GPU") if each[name]]
    parts += [f"{demand.memory_bytes_per_worker / GIB:.1f} GiB"] if demand.memory_bytes_per_worker else []
    asked = f"{demand.num_workers} x {', '.join(parts)}"
    totals = [[node.total.get(name, 0) for name in ("CPU", "GPU", "memory")] for node in nodes]
    nodes_text = "; ".join(f"{cpu:g} CPU, {gpu:g} GPU, {memory / GIB:.1f} GiB" for cpu, gpu, memory in totals)
    if (ever := sum(_workers_on(node.total, each) for node in nodes)) < demand.num_workers:
        return [
            refuse(
                "CLUSTER-TOO-SMALL",
                "demand",
                f"{asked} asked; {ever} fit its nodes ({nodes_text})",
                "all workers run at the same time",
                f"num_workers={ever}, or a cluster with more or larger nodes"
                if ever
                else "smaller workers, or larger nodes",
            )
        ]
    free = [{name: node.free(name) for name in each} for node in nodes]
    if (now := sum(_workers_on(left, each) for left in free)) < demand.num_workers:
        return [
            warn(
                "CLUSTER-BUSY",
                "demand",
                f"{asked} asked; {now} fit what is free now",
                "workers wait until running jobs end",
                "wait, or set limits: {pending: 2h}",
            )
        ]
    return []


def _gpu_memory_findings(job: Job, nodes: Sequence[RayNode]) -> Findings:
    """Ray may place a worker on any node with a GPU, so each type has to hold it."""
    taken = job.demand.gpus_per_worker > 0
    for name in dict.fromkeys(node.gpu_type for node in nodes if taken and node.total.get("GPU")):
        gpu = gpu_called(name)
        yield from gpu_memory_findings(job, "nodes", name, None if gpu is None else gpu.memory_bytes)


def _workers_on(has: Mapping[str, float], each: Mapping[str, float]) -> int:
    """How many workers a node takes."""
    return int(min((has.get(name, 0.0) // value for name, value in each.items() if value), default=10**6))


def roots(root: str, here: bool) -> Findings:
    """Findings on the root: a shell passes it unchanged, and both sides reach the same folder."""
    if not PLAIN.fullmatch(root):
        yield refuse(
            "ROOT-NOT-PLAIN",
            "root",
            f"{root!r} has letters that a shell reads",
            "Ray gives an entrypoint to a shell: letters, digits and _@%+=:,./- alone",
            "set root to a path of those characters, e.g. s3://bucket/team-a",
        )
    if Store(root).is_local and not here and not any(_disk(root).startswith(kind) for kind in NETWORK_DISKS):
        yield refuse(
            "ROOT-NOT-SHARED",
            "root",
            f"{root} is a folder of this machine (disk: {_disk(root)})",
            "the head is another machine, and both keep the job's record there",
            "--set root=s3://BUCKET/PREFIX, or a folder on a network disk that both mount",
        )


def _disk(root: str) -> str:
    """Kind of the file system that holds a folder."""
    mounts = [part for part in psutil.disk_partitions(all=True) if Path(root).is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "?"


def _agent_findings(nodes: Sequence[RayNode]) -> Findings:
    if not any(node.is_head for node in nodes):
        yield refuse(
            "NO-HEAD",
            "nodes",
            "no head is alive",
            "drivers run on the head",
            "ray stop and ray start --head on the head's machine",
        )
    for node in nodes:
        if not node.host:
            found = refuse if node.is_head else warn
            yield found(
                "NO-AGENT",
                "nodes",
                "a node's dashboard agent is silent",
                "the head's agent starts jobs",
                "read dashboard_agent.log on that node; often the port of the agent is in use",
            )


def _clock_findings(jobs: JobsApi) -> Findings:
    before = time.time()
    answer = jobs.ask("GET", "/api/version")
    date = answer.headers.get("date") if answer is not None else None
    if date is None:
        return
    there = email.utils.parsedate_to_datetime(date).astimezone(datetime.UTC).timestamp()
    off_s = there - (before + time.time()) / 2
    if abs(off_s) > CLOCK_S:
        yield warn(
            "CLOCK-OFF",
            "clock",
            f"the head's clock is {off_s:+.0f} s from this one",
            "a driver is lost that is silent for 20 s by the reader's clock",
            "synchronise both clocks by NTP",
        )


def _access_findings(on: str) -> Findings:
    host, _ = host_and_port(on)
    try:
        trusted = not is_loopback(host)
        is_open = (
            httpx.get(f"{on.rstrip('/')}/api/jobs/", timeout=WITHOUT_TOKEN_S, trust_env=trusted).status_code == 200
        )
    except httpx.HTTPError:
        is_open = False
    if is_open:
        yield refuse(
            "OPEN-CLUSTER",
            on,
            "it accepts jobs without a token",
            "anyone who submits a job can run any program there (CVE-2023-48022, ShadowRay)",
            "start it with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, and keep port 8265 off public networks",
        )
    if on.startswith("http://") and not is_loopback(host) and token() is not None:
        yield warn(
            "TOKEN-IN-CLEAR",
            on,
            "the token travels unencrypted",
            "http to another machine can be read on the way",
            "use https, or a tunnel: ssh -L 8265:127.0.0.1:8265 HEAD",
        )


# `python -m graftwork.cluster.targets.ray_jobs SUBMISSION_ID` on a Ray: end the supervisor of a job that never started.
#
# The Jobs API says True to a stop of a pending job and does nothing (ray#58353); it would start whenever it can. Its
# supervisor is a named actor, which only somebody inside can kill; the API then shows the job as FAILED.


NAMESPACE = "SUPERVISOR_ACTOR_RAY_NAMESPACE"
NAME = "_ray_internal_job_actor_{}"
"""As of Ray 2.60, dashboard/modules/job/common.py and ray_constants.py."""


if __name__ == "__main__":
    import ray

    ray.init(address="auto", namespace=NAMESPACE, log_to_driver=False, logging_level="error")
    with contextlib.suppress(ValueError):  # it has ended by itself
        ray.kill(ray.get_actor(NAME.format(sys.argv[1])), no_restart=True)
