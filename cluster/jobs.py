"""An existing Ray by its Jobs API; and commands that are no jobs of ours (study, demo), run there and followed here."""

import contextlib
import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from graftwork.cluster.address import refused, require_reachable, user_token, without_on
from graftwork.cluster.shipping import relative, shipped
from graftwork.errors import ClusterError, Interrupted, RunError

POLL_S = 1.0
ANSWER_S = 10.0
AGENT_S = 120.0
"""How long the agent that runs jobs may come up after the dashboard: 10 to 90 s on a loaded machine (Ray 2.60)."""
ENTRYPOINT = "python -c 'from graftwork.cli import main; main()'"

T = TypeVar("T")


@dataclass(frozen=True)
class RayJob:
    """A job as the Jobs API shows it."""

    submission_id: str
    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED."""
    message: str = ""
    exit_code: int | None = None


ENDED = frozenset({"STOPPED", "SUCCEEDED", "FAILED"})


class JobsApi:
    """The jobs of the Ray whose dashboard is at http(s)://HOST:PORT. Build it inside `user_token()`."""

    def __init__(self, on: str) -> None:
        """Raises ClusterError within some 10 s when the address does not answer or refuses the token."""
        self.on = on.rstrip("/")
        require_reachable(on)
        _require_welcome(self.on)
        from ray.job_submission import JobSubmissionClient

        for name in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
            logging.getLogger(name).setLevel(logging.WARNING)  # two lines an upload
        self._client: Any = self._asked(lambda: JobSubmissionClient(self.on))

    def submit(self, entrypoint: str, working_dir: Path, submission_id: str | None = None) -> str:
        """Start a job in that folder, or find the one of that id. Returns its id.

        A Ray that has just started has no agent for jobs yet: it refuses, takes nothing, and is asked again.
        """
        end = time.monotonic() + AGENT_S
        environment = {"working_dir": str(working_dir)}
        while True:
            try:
                job_id: str = self._asked(
                    lambda: self._client.submit_job(
                        entrypoint=entrypoint, runtime_env=environment, submission_id=submission_id
                    )
                )
            except ClusterError as error:
                if submission_id is not None and "already exists" in error.found:
                    return submission_id
                if "No available agent" not in error.found or time.monotonic() > end:
                    raise
                time.sleep(POLL_S)
            else:
                return job_id

    def status(self, job_id: str) -> RayJob:
        """Where a job is now."""
        return _ray_job(job_id, self._asked(lambda: self._client.get_job_info(job_id)))

    def logs(self, job_id: str) -> Iterator[str]:
        """What the job prints, about a second behind, until it has ended."""
        shown = 0
        while True:
            ended = self.status(job_id).status in ENDED
            text: str = self._asked(lambda: self._client.get_job_logs(job_id))
            if len(text) > shown:
                yield text[shown:]
                shown = len(text)
            if ended:
                return
            time.sleep(POLL_S)

    def stop(self, job_id: str) -> None:
        """End a job; nothing happens when it has ended."""
        self._asked(lambda: self._client.stop_job(job_id))

    def list(self) -> list[RayJob]:
        """The jobs that were submitted to this Ray."""
        found = self._asked(self._client.list_jobs)
        return [_ray_job(info.submission_id, info) for info in found if info.submission_id]

    def _asked(self, ask: Callable[[], T]) -> T:
        """Ray's client raises RuntimeError for an HTTP error, ConnectionError and AuthenticationError."""
        from ray.exceptions import AuthenticationError

        try:
            return ask()
        except AuthenticationError as error:
            raise refused(self.on, str(error)) from None
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ClusterError(
                f"--on {self.on}", f"its Jobs API failed ({str(error).strip()[-500:]})",
                "the dashboard of a Ray 2.60 with ray[default] answers there", "look at the cluster's dashboard log",
            ) from error  # fmt: skip


def run_command(on: str, argv: Sequence[str]) -> int:
    """Run `graftwork ARGV` on the Ray at `on`, print what it prints, return its exit code.

    Files that the arguments name are shipped; data and root must be reachable from the cluster (s3:// or a shared
    folder). Ctrl-C ends the job there, and what it committed stays valid. Raises ClusterError, Interrupted, RunError.
    """
    files = [Path(argument) for argument in argv if Path(argument).is_file()]
    named = [str(relative(Path(a))) if Path(a).is_file() else a for a in without_on(argv)]
    with user_token():
        jobs = JobsApi(on)
        with shipped(files) as folder:
            job_id = jobs.submit(f"{ENTRYPOINT} {shlex.join(_on_auto(named))}", folder)
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
        return _exit_code(jobs.status(job_id))


def _exit_code(job: RayJob) -> int:
    if job.exit_code is not None:
        return job.exit_code
    if job.status == "SUCCEEDED":
        return 0
    raise RunError(f"job {job.submission_id}", f"it is {job.status} without an exit code ({job.message})")


def _on_auto(argv: Sequence[str]) -> list[str]:
    """The command on the Ray that runs the job. Verbs without `--on` start no Ray, so they are left as they are."""
    verbs = ("train", "tune", "serve", "compare", "quantize", "chat", "demo", "study")
    return [*argv, "--on", "auto"] if argv and argv[0] in verbs else list(argv)


def _require_welcome(on: str) -> None:
    """Ask for the version with a time limit, which Ray's own client does not have."""
    import httpx
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

    try:
        answer = httpx.get(f"{on}/api/version", headers=get_auth_headers_if_auth_enabled({}), timeout=ANSWER_S)
    except httpx.HTTPError as error:
        raise ClusterError(
            f"--on {on}", f"something listens there but gives no answer ({error!r})",
            "the HTTP address of a Ray dashboard is needed, usually port 8265", "check host and port",
        ) from None  # fmt: skip
    if answer.status_code in (401, 403):
        raise refused(on, f"{answer.status_code} {answer.text}")


def _ray_job(job_id: str, info: Any) -> RayJob:
    return RayJob(job_id, info.status.value, info.message or "", info.driver_exit_code)
