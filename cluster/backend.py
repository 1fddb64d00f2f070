"""What every place that runs whole commands can do: a Ray by its Jobs API now, KubeRay behind the same verbs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

JobState = Literal["pending", "running", "succeeded", "failed", "stopped"]
ENDED: frozenset[JobState] = frozenset({"succeeded", "failed", "stopped"})


@dataclass(frozen=True)
class JobRequest:
    """A graftwork command to run elsewhere."""

    argv: Sequence[str]
    """Arguments after `graftwork`, without `--on`."""
    files: Sequence[Path] = ()
    """Local files that the arguments name: shipped to the same path relative to the job's folder."""


@dataclass(frozen=True)
class JobStatus:
    """Where a job is. `exit_code` is that of the command, once it has ended by itself."""

    job_id: str
    state: JobState
    message: str = ""
    exit_code: int | None = None


class Backend(Protocol):
    """Runs commands on a cluster. Every verb raises ClusterError when the cluster is out of reach or refuses us."""

    def submit(self, request: JobRequest) -> str:
        """Start a job and return its id."""

    def status(self, job_id: str) -> JobStatus:
        """Where a job is now."""

    def logs(self, job_id: str) -> Iterator[str]:
        """What a job prints, piece by piece, until it has ended."""

    def cancel(self, job_id: str) -> None:
        """End a job; nothing happens when it has ended."""

    def list(self) -> list[JobStatus]:
        """The jobs that the cluster knows of."""
