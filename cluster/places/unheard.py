"""A place that does not answer, so that its jobs can be judged by what the store knows of them."""

from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from graftwork.cluster.backend import Attempt, Finding, Job
from graftwork.cluster.place import Seen
from graftwork.errors import ClusterError


class UnheardPlace:
    """Shows every attempt and nothing of it but that: heartbeat and ends in the store decide. All else raises."""

    def __init__(self, on: str, error: ClusterError) -> None:
        self.on, self._error = on, error

    def observe(self, attempt_ids: Collection[str]) -> dict[str, Seen]:
        """All of them, with nothing said."""
        return {name: Seen(message=f"{self.on} does not answer") for name in attempt_ids}

    def check(self, job: Job) -> list[Finding]:
        """Raises the ClusterError of the place, as all below."""
        self._raise()

    def objects(self, attempt: Attempt) -> list[Mapping[str, Any]]:
        """Raises."""
        self._raise()

    def current(self, attempt: Attempt) -> list[Mapping[str, Any]]:
        """Raises."""
        self._raise()

    def start(self, attempt: Attempt) -> None:
        """Raises."""
        self._raise()

    def stop(self, attempt_id: str) -> None:
        """Raises."""
        self._raise()

    def doctor(self) -> list[Finding]:
        """Raises."""
        self._raise()

    def _raise(self) -> NoReturn:
        raise self._error
