"""How long a plan, help, and the state of 1,000 jobs take, from the start of the process to its end.

    python -m benchmarks.plan_cold

Each round is a fresh process of each command, in turns: `import graftwork.cli` (less the bare interpreter), `graftwork
--help`, `graftwork plan` of a training spec on SmolLM2-135M whose base is in the cache (128 rows read and rendered),
the same with --target local, and `graftwork jobs ls` of a store on a disk with 1,000 jobs: 900 ended, 50 silent, 50
alive. `cpu_*`: CPU seconds of the same processes, which a busy machine disturbs less.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import Clock, figure, write
from graftwork.cluster.jobs.models import Job
from graftwork.cluster.jobs.store import AttemptEnd, JobStore
from graftwork.storage.store import json_bytes

ROOT = Path(__file__).parents[1]
SPEC = "examples/train-airport-card.yaml"
JOBS, ALIVE, SILENT = 1000, 50, 50
MAIN = "from graftwork.cli import main; main()"


def fill(root: str) -> None:
    """1,000 jobs as their drivers would have left them."""
    runs, now = JobStore(root), time.time()
    for number in range(JOBS):
        job = Job(f"job{number}", "exec", f"{number:064x}"[::-1], root, {"argv": ["true"]})
        runs.record(job, "local")
        runs.open_attempt(job.job_id, 1)
        folder = ("jobs", job.job_id, "a1")
        runs.store.create_bytes(json_bytes({"at": now, "host": "h", "pid": 1}), *folder, "starts", "1.json")
        beat = {
            "at": now if number < ALIVE else now - 900,
            "start": 1,
            "host": "h",
            "pid": 1,
            "progress": "step 4 of 9",
        }
        runs.store.write_json(beat, *folder, "heartbeat.json")
        if number >= ALIVE + SILENT:
            runs.end(job.job_id, 1, AttemptEnd(now, 0))


def took(*command: str) -> tuple[float, float]:
    """Seconds of one process, by the clock and of CPU."""
    began, before = time.perf_counter(), _cpu_s()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "COLUMNS": "200"})
    return time.perf_counter() - began, _cpu_s() - before


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    clock, found = Clock(), []
    with tempfile.TemporaryDirectory() as root:
        fill(root)
        commands = {
            "bare": [sys.executable, "-c", ""],
            "import_cli": [sys.executable, "-c", "import graftwork.cli"],
            "help": [sys.executable, "-c", MAIN, "--help"],
            "plan": [sys.executable, "-c", MAIN, "plan", SPEC],
            "plan_on": [sys.executable, "-c", MAIN, "plan", SPEC, "--target", "local"],
            "jobs_1000": [sys.executable, "-c", MAIN, "jobs", "ls", "--limit", "1000", "--root", root],
        }
        for command in commands.values():
            took(*command)  # compiles, converts the base, probes the machine's speed
        found = [{name: took(*command) for name, command in commands.items()} for _ in range(args.rounds)]
    figures = {}
    for column, prefix in enumerate(("", "cpu_")):
        for name in ("import_cli", "help", "plan", "plan_on", "jobs_1000"):
            less = [one["bare"][column] if name == "import_cli" else 0.0 for one in found]
            own = [one[name][column] - bare for one, bare in zip(found, less, strict=True)]
            figures[prefix + name] = figure(own, "s")
    write("plan_cold", args.out, figures, found, {"rounds": args.rounds, "jobs": JOBS, "spec": SPEC}, clock)


if __name__ == "__main__":
    main()
