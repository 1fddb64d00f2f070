"""Commands that are no jobs of ours (demo): run at an existing Ray by its Jobs API, and followed here."""

import contextlib
import secrets
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from graftwork.cluster.address import JOB, without_target
from graftwork.cluster.jobs_api import JobsApi, exit_code
from graftwork.cluster.shipping import relative, shipped
from graftwork.cluster.wheel import zipped
from graftwork.errors import ClusterError, Interrupted

ENTRYPOINT = "python -c 'from graftwork.cli import main; main()'"


def run_command(on: str, argv: Sequence[str]) -> int:
    """Run `graftwork ARGV` on the Ray at `on`, print what it prints, return its exit code.

    Files that the arguments name are shipped; data and root must be reachable from the cluster (s3:// or a shared
    folder). Ctrl-C ends the job there, and what it committed stays valid. Raises ClusterError, Interrupted, RunError.
    """
    files = [Path(argument) for argument in argv if Path(argument).is_file()]
    named = [str(relative(Path(a))) if Path(a).is_file() else a for a in without_target(argv)]
    job_id = f"graftwork-{secrets.token_hex(6)}"
    with JobsApi(on) as jobs:
        with shipped(files) as folder:
            package = zipped(
                {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            )
        jobs.submit(f"{ENTRYPOINT} {shlex.join(_inside(named))}", package, job_id)
        print(f"job {job_id} at {jobs.on}", file=sys.stderr)
        try:
            for text in jobs.logs(job_id):
                print(text, end="", flush=True)
        except KeyboardInterrupt:
            with contextlib.suppress(ClusterError):
                jobs.stop(job_id)
            raise Interrupted(
                f"job {job_id}", f"stopped at {on} by Ctrl-C", "what was committed stays valid",
                "run the same command: it continues from there",
            ) from None  # fmt: skip
        return exit_code(jobs.status(job_id), job_id)


def _inside(argv: Sequence[str]) -> list[str]:
    """The command on the Ray that runs the job. Verbs without `--target` start no Ray, so they are left as they are."""
    verbs = ("train", "tune", "serve", "compare", "quantize", "chat", "demo")
    return [*argv, "--target", JOB] if argv and argv[0] in verbs else list(argv)
