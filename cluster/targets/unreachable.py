"""Target that does not answer: the state of its jobs is derived from the store."""

from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from graftwork.cluster.jobs.models import Attempt, Finding, Job, JobTarget, ObservedState, TargetMachines
from graftwork.cluster.spec import ClusterSpec
from graftwork.errors import ClusterError


class UnheardPlace:
    """Shows every attempt and nothing of it but that: heartbeat and ends in the store decide. Nothing can be done."""

    def __init__(self, on: str, error: ClusterError, known: JobTarget | None = None) -> None:
        """`known` builds the objects, which needs no answer."""
        self.on, self._error, self._known = on, error, known

    def observe(self, attempt_ids: Collection[str]) -> dict[str, ObservedState]:
        """All of them, with nothing said."""
        return {name: ObservedState(message=f"{self.on} does not answer") for name in attempt_ids}

    def machines(self, cluster: ClusterSpec) -> TargetMachines:
        """Raises the ClusterError of the place."""
        self._raise()

    def check(self, job: Job) -> list[Finding]:
        """Nothing can be checked."""
        return []

    def objects(self, attempt: Attempt) -> list[Mapping[str, Any]]:
        """As the place itself would make them."""
        return self._known.objects(attempt) if self._known is not None else []

    def current(self, attempt: Attempt) -> list[Mapping[str, Any]]:
        """What is there is not known."""
        return []

    def start(self, attempt: Attempt) -> None:
        """Raises the ClusterError of the place, as all below."""
        self._raise()

    def stop(self, attempt_id: str) -> None:
        """Raises."""
        self._raise()

    def doctor(self) -> list[Finding]:
        """Raises."""
        self._raise()

    def _raise(self) -> NoReturn:
        raise self._error
