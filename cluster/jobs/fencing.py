"""Fencing of an attempt: a later attempt, or a later start of the same one, replaces it permanently.

A limit, a user or the loss of its machine may also ask the attempt to end.
"""

import contextlib
import json
import os
import threading
from dataclasses import asdict, dataclass
from typing import Literal, Self

from graftwork.errors import RunError, StorageError
from graftwork.storage.store import Store

ENVIRONMENT = "GRAFTWORK_ATTEMPT"
"""Variable with the attempt that a driver's command works for."""
POLL_INTERVAL_S = 2.0
"""Interval at which `FenceMonitor` reads the store."""

FenceStopReason = Literal["superseded", "cancel", "leave"]


class SupersededError(RunError):
    """Another attempt, or another driver of this one, has taken over: nothing may be committed here any more."""


@dataclass(frozen=True)
class Fence:
    """Fence of one start of an attempt; cheap to build and to pickle. Its calls raise StorageError."""

    root: str
    job_id: str
    attempt: int
    start: int

    @classmethod
    def from_environment(cls) -> Self | None:
        """The attempt that this process works for; None outside of a job."""
        value = os.environ.get(ENVIRONMENT)
        return cls(**json.loads(value)) if value else None

    @property
    def folder(self) -> tuple[str, ...]:
        """Key of the attempt's folder."""
        return ("jobs", self.job_id, f"a{self.attempt}")

    def dump(self) -> str:
        """As it travels in the environment."""
        return json.dumps(asdict(self))

    def superseded(self, patience_s: float = 0.0) -> bool:
        """Whether another one was started since: then nothing may be committed any more."""
        store = Store(self.root, patience_s)
        later_attempt = ("jobs", self.job_id, "attempts", f"{self.attempt + 1}.json")
        later_start = (*self.folder, "starts", f"{self.start + 1}.json")
        return any(store.find_bytes(*key) is not None for key in (later_attempt, later_start))

    def require(self, patience_s: float = 0.0) -> None:
        """Raise SupersededError where another one was started: asked before anything is committed."""
        if self.superseded(patience_s):
            raise SupersededError(
                f"job {self.job_id}, attempt {self.attempt}, start {self.start}",
                "a later one has taken over",
                "one attempt at a time commits",
                f"graftwork jobs status {self.job_id} --root {self.root}",
            )

    def stop_reason(self, patience_s: float = 0.0) -> FenceStopReason | None:
        """Why to end now; None while nothing says so."""
        store = Store(self.root, patience_s)
        if self.superseded(patience_s):
            return "superseded"
        if store.find_bytes(*self.folder, "cancel.json") is not None:
            return "cancel"
        leave = store.find_bytes(*self.folder, "leave", f"{self.start}.json")
        return "leave" if leave is not None else None


class FenceMonitor:
    """Thread that reads the store, so that training never waits for it. Ends with its process."""

    def __init__(self, fence: Fence) -> None:
        self.fence, self._end = fence, threading.Event()
        self.stop_reason: FenceStopReason | None = None
        threading.Thread(target=self._poll, name="fence-monitor", daemon=True).start()

    def close(self) -> None:
        """Look no more."""
        self._end.set()

    def _poll(self) -> None:
        while self.stop_reason is None and not self._end.is_set():
            with contextlib.suppress(StorageError):  # an outage: nothing can be committed in it either
                self.stop_reason = self.fence.stop_reason()
            self._end.wait(POLL_INTERVAL_S)
