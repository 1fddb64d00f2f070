"""How long it takes to say where 1,000 jobs are, on a disk and on a real S3 server (SeaweedFS, on this machine).

    python -m benchmarks.job_status

Each round is a fresh process that lists all jobs of a store: 9 of 10 have ended, each tenth is at work and is heard.
Each has a spec, an attempt, a start, a log in two pieces and three events. `disk` and `s3` are seconds from the first
call to the last status; the interpreter's start and our imports are a figure of their own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.record import Clock, Figure, figure, write

if TYPE_CHECKING:
    from graftwork.cluster.jobs.store import JobStore

STATES = ("succeeded", "failed", "cancelled", "running")


def fill(root: str, count: int) -> None:
    """Write the records of `count` jobs, those at work last: their heartbeats are to be fresh."""
    from concurrent.futures import ThreadPoolExecutor

    from graftwork.cluster.jobs.store import JobStore

    runs = JobStore(root)  # one client for all
    with ThreadPoolExecutor(8) as pool:
        for at_work in (False, True):
            numbers = [n for n in range(count) if (n % 10 == 9) == at_work]
            list(pool.map(lambda number: _job(runs, number), numbers))


def _job(runs: "JobStore", number: int) -> None:
    from graftwork.cluster.jobs.models import ExecSpec, Job
    from graftwork.cluster.jobs.store import AttemptEnd, Heartbeat

    root = runs.store.uri
    spec = ExecSpec(name=f"job-{number}", root=root, argv=("true",))
    job = Job(spec.name, "exec", spec.identity(), root, spec.model_dump(mode="json"))
    here = ("jobs", job.job_id, "a1")
    runs.record(job, "local")
    runs.open_attempt(job.job_id, 1)
    runs.store.write_json({"at": time.time()}, *here, "starts", "1.json")
    for piece in (1, 2):
        runs.store.write_bytes(b"a line\n" * 100, *here, "logs", f"001-{piece:06d}.txt")
    for what in ("started", "asked-to-end", "ended"):
        runs.note(job.job_id, 1, what)
    beat = Heartbeat(time.time(), 1, "host", 7, f"train job-{number}: 40 of 120, loss 1.21")
    runs.store.write_json(asdict(beat), *here, "heartbeat.json")
    if number % 10 != 9:
        runs.end(job.job_id, 1, AttemptEnd(time.time(), int(number % 10 > 5), "user" if number % 10 == 8 else None))


def child(root: str) -> dict[str, Any]:
    """One listing in this process, which has just started."""
    import psutil

    from graftwork.cluster.jobs.backend import StoredBackend
    from graftwork.cluster.targets.local import LocalTarget

    started = time.time() - psutil.Process().create_time()
    began, worked = time.perf_counter(), time.process_time()
    found = StoredBackend(LocalTarget(root), root).list()
    wall, cpu = time.perf_counter() - began, time.process_time() - worked
    states = [str(status.state) for status in found]
    return {
        "start": started,
        "wall": wall,
        "cpu": cpu,
        "jobs": len(found),
        **{name: states.count(name) for name in STATES},
    }


def measured(root: str, rounds: int, env: dict[str, str]) -> list[dict[str, Any]]:
    """`rounds` processes, one after the other."""
    command = [sys.executable, "-m", "benchmarks.job_status", "--child", root]
    told = {**os.environ, **env}
    done = [subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=told) for _ in range(rounds)]
    return [json.loads(one.stdout.splitlines()[-1]) for one in done]


def on_s3(jobs: int, rounds: int, environment: dict[str, str]) -> list[dict[str, Any]]:
    """The same on a server of its own."""
    from tests.s3_server import running

    with running() as server:
        os.environ.update(server.environment())
        root = f"s3://{server.bucket}/status"
        fill(root, jobs)
        return measured(root, rounds, environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--disk", action="store_true", help="the disk alone")
    parser.add_argument("--child", metavar="ROOT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child)))
        return
    clock = Clock()
    detail: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="gw-status-") as folder:
        environment = {"GRAFTWORK_CACHE": f"{folder}/cache"}
        fill(f"{folder}/root", args.jobs)
        detail["disk"] = measured(f"{folder}/root", args.rounds, environment)
        if not args.disk:
            detail["s3"] = on_s3(args.jobs, args.rounds, environment)
    assert all(one["jobs"] == args.jobs for found in detail.values() for one in found), detail
    figures: dict[str, Figure] = {place: figure([one["wall"] for one in found], "s") for place, found in detail.items()}
    figures["start"] = figure([one["start"] for one in detail["disk"]], "s")
    write("job_status", args.out, figures, detail, {"rounds": args.rounds, "jobs": args.jobs}, clock)


if __name__ == "__main__":
    main()
