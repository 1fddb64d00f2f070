"""Heartbeat of a driver: it writes to the store that the driver lives, and which events it has seen.

A thread writes both, so that a slow store delays nothing.
"""

import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from graftwork.cluster.jobs.fencing import Fence
from graftwork.cluster.jobs.store import HEARTBEAT_S, Heartbeat, JobStore
from graftwork.errors import StorageError
from graftwork.storage.store import json_bytes


class HeartbeatThread:
    """Beats every HEARTBEAT_S until it is closed. What an outage holds back is told after it."""

    def __init__(self, runs: JobStore, fence: Fence, progress: Callable[[], str], usd: Callable[[], float | None]):
        self._runs, self._fence, self._progress, self._usd = runs, fence, progress, usd
        self._events: deque[tuple[str, dict[str, Any]]] = deque()
        self._wake, self._closed, self._leaving = threading.Event(), False, False
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def note(self, what: str, **facts: Any) -> None:
        """Keep an event, soon."""
        self._events.append((what, {"start": self._fence.start, **facts}))
        self._wake.set()

    def leave(self) -> None:
        """This machine is being taken away: the workers save and go, and a silence from now on is no crash."""
        self._leaving = True
        self.note("machine-leaves")

    def close(self, timeout_s: float) -> None:
        """Everything is told at return, or the time is over."""
        self._closed = True
        self._wake.set()
        self._thread.join(timeout=timeout_s)

    def _run(self) -> None:
        while not self._closed:
            self._send()
            self._wake.wait(HEARTBEAT_S)
            self._wake.clear()
        self._send()

    def _send(self) -> None:
        beat = Heartbeat(
            time.time(),
            self._fence.start,
            socket.gethostname(),
            os.getpid(),
            self._progress(),
            self._usd(),
            self._leaving,
        )
        try:
            if self._leaving:
                self._runs.store.create_bytes(
                    json_bytes({"at": time.time()}), *self._fence.folder, "leave", f"{self._fence.start}.json"
                )
            self._runs.store.write_json(asdict(beat), *self._fence.folder, "heartbeat.json")
            while self._events:
                what, facts = self._events[0]
                self._runs.note(self._fence.job_id, self._fence.attempt, what, **facts)
                self._events.popleft()
        except StorageError as error:
            print(f"the store is not told: {error.problem}", file=sys.stderr)
