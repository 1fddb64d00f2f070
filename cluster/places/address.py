"""An existing Ray as a place, by its Jobs API: the driver is the job, on the head."""

import contextlib
import io
import tempfile
import time
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from graftwork.cluster.address import user_token
from graftwork.cluster.backend import Attempt, Finding, Job
from graftwork.cluster.jobs import ENDED, JobsApi
from graftwork.cluster.place import Seen
from graftwork.cluster.wheel import build_wheel
from graftwork.errors import ClusterError
from graftwork.storage import Store

STOP_S = 8.0


class AddressPlace:
    """Reached anew for each call, with the token of the environment."""

    def __init__(self, on: str, root: str) -> None:
        self.on, self._root = on.rstrip("/"), Store(root).uri

    def check(self, job: Job) -> list[Finding]:
        """That it answers and takes us."""
        with self._jobs():
            return []

    def objects(self, attempt: Attempt) -> list[Mapping[str, Any]]:
        """None."""
        return []

    def current(self, attempt: Attempt) -> list[Mapping[str, Any]]:
        """None."""
        return []

    def doctor(self) -> list[Finding]:
        """Nothing is looked at yet."""
        return []

    def start(self, attempt: Attempt) -> None:
        """Send the wheel's content as the job's folder and start the driver."""
        entrypoint = f"python -m graftwork.cluster.driver {self._root} {attempt.job.job_id} {attempt.number} auto"
        with self._jobs() as jobs, _unpacked() as folder:
            jobs.submit(entrypoint, folder, attempt.id)

    def observe(self, attempt_ids: Collection[str]) -> dict[str, Seen]:
        """One listing for all."""
        with self._jobs() as jobs:
            return {
                job.submission_id: Seen(job.status, message=job.message)
                for job in jobs.list()
                if job.submission_id in attempt_ids
            }

    def stop(self, attempt_id: str) -> None:
        """Stop the job and see that it has stopped: Ray answers True for a pending one and does nothing (ray#58353)."""
        with self._jobs() as jobs:
            if attempt_id not in {job.submission_id for job in jobs.list()}:
                return
            end = time.monotonic() + STOP_S
            while jobs.status(attempt_id).status not in ENDED:
                jobs.stop(attempt_id)
                if time.monotonic() > end:
                    raise ClusterError(f"cancel {attempt_id} at {self.on}", f"it did not stop within {STOP_S:.0f} s",
                                       "", "look at the dashboard; stop the cluster if it hangs")  # fmt: skip
                time.sleep(0.25)

    @contextlib.contextmanager
    def _jobs(self) -> Iterator[JobsApi]:
        with user_token():
            yield JobsApi(self.on)


@contextlib.contextmanager
def _unpacked() -> Iterator[Path]:
    """The wheel's content in a folder: Ray names what it sends by its content, and installs nothing."""
    _, wheel = build_wheel()
    with tempfile.TemporaryDirectory(prefix="gw-ship-") as name:
        zipfile.ZipFile(io.BytesIO(wheel)).extractall(name)
        yield Path(name)
