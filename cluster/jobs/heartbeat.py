"""Reports of a driver to the store: heartbeat and events, and the output of its command.

Threads write them, so that a slow store delays nothing.
"""

import codecs
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict

from graftwork.cluster.jobs.fencing import Fence
from graftwork.cluster.jobs.store import HEARTBEAT_S, LOG_BEHIND_S, Heartbeat, JobStore
from graftwork.errors import StorageError
from graftwork.storage.store import Store, json_bytes


class HeartbeatThread:
    """Thread that beats every HEARTBEAT_S until it is closed. Events of an outage of the store are written after it."""

    def __init__(self, runs: JobStore, fence: Fence, progress: Callable[[], str], usd: Callable[[], float | None]):
        self._runs, self._fence, self._progress, self._usd = runs, fence, progress, usd
        self._events: deque[tuple[str, Mapping[str, object]]] = deque()
        self._wake, self._closed, self._leaving = threading.Event(), False, False
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def note(self, what: str, **facts: object) -> None:
        """Write an event, soon."""
        self._events.append((what, {"start": self._fence.start, **facts}))
        self._wake.set()

    def leave(self) -> None:
        """Report that this machine is reclaimed: the workers save and leave, and a later silence is no crash."""
        self._leaving = True
        self.note("machine-leaves")

    def close(self, timeout_s: float) -> None:
        """Write what is left; return at the time limit at the latest."""
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
            print(f"no heartbeat in the store: {error.problem}", file=sys.stderr)


PIECE_BYTES = 256 * 2**10
MOST_PIECE_BYTES = 4 * 2**20
"""Of a piece that is written at once, after an outage or in a flood."""
READ_S = 2.0
TAIL_BYTES = 64 * 2**10
PROGRESS = re.compile(r"\b\d[\d,]* of \d")
"""Pattern of the lines that report the progress of a stage."""


class OutputReader:
    """Reads a child's output in a thread until it ends; another thread writes the pieces."""

    def __init__(self, store: Store, folder: tuple[str, ...], start: int, child: "subprocess.Popen[bytes]") -> None:
        self._store, self._folder, self._start, self._child = store, folder, start, child
        self._spool = tempfile.TemporaryFile(prefix="gw-log-", buffering=0)  # noqa: SIM115  # as long as this
        self._lock = threading.Lock()
        self._spooled = self._stored = self._lost = 0
        self._piece, self._piece_number = b"", 1
        self._tail, self._progress = b"", ""
        self._ended = threading.Event()
        self._read = threading.Thread(target=self._read_output, name="output", daemon=True)
        self._write = threading.Thread(target=self._write_pieces, name="output-store", daemon=True)
        self._read.start()
        self._write.start()

    @property
    def progress(self) -> str:
        """Last line that reports progress, else the last line."""
        lines = [line for line in self._tail.decode(errors="replace").splitlines() if line.strip()]
        return self._progress or (lines[-1].strip()[:200] if lines else "")

    @property
    def under_way(self) -> bool:
        """Return whether the output has reported progress."""
        return bool(self._progress)

    def last_error(self) -> str:
        """The last error in the form of `GraftworkError.text`; else the last line, as a traceback ends."""
        return last_error(self._tail.decode(errors="replace"))

    def mentions(self, *words: str) -> bool:
        """Whether any of the words is in the last TAIL_BYTES."""
        return any(word.encode() in self._tail for word in words)

    def close(self, timeout_s: float) -> None:
        """Store the rest of the output, within the time limit. Does not wait for a process that keeps the pipe open."""
        self._read.join(timeout=READ_S)
        self._ended.set()
        self._write.join(timeout=timeout_s)

    def _read_output(self) -> None:
        assert self._child.stdout is not None
        while data := self._child.stdout.read1(65536):  # type: ignore[attr-defined]
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
            self._spool_data(data)
            self._tail = (self._tail + data)[-TAIL_BYTES:]
            reported = [line for line in data.decode(errors="replace").splitlines() if PROGRESS.search(line)]
            self._progress = reported[-1].strip()[:200] if reported else self._progress

    def _spool_data(self, data: bytes) -> None:
        """Append to the spool. The log counts what a full disk does not take; the command never waits."""
        said = f"\n[{self._lost} bytes were not stored: no room in {tempfile.gettempdir()}]\n" if self._lost else ""
        whole = said.encode() + data
        with self._lock:
            self._spool.seek(self._spooled)
            try:
                written = self._spool.write(whole) or 0
            except OSError:
                written = 0
            self._spooled += written
        left = len(data) - max(written - len(said.encode()), 0)
        self._lost = self._lost + left if written < len(whole) else 0

    def _write_pieces(self) -> None:
        while not self._ended.wait(LOG_BEHIND_S):
            self._store_all()
        self._store_all(last=True)

    def _store_all(self, *, last: bool = False) -> None:
        """Bring all that is spooled to the store. An outage leaves it for the next time."""
        try:
            while self._store_some(last):
                pass
        except StorageError as error:
            print(f"the log stays on this machine until the store is back: {error.problem}", file=sys.stderr)

    def _store_some(self, last: bool) -> bool:
        room = MOST_PIECE_BYTES - len(self._piece)
        with self._lock:
            self._spool.seek(self._stored)
            data = self._spool.read(room)
        data = data if last and len(data) < room else data[: complete_utf8_length(data)]
        if not data:
            return False
        piece = self._piece + data
        self._store.write_bytes(piece, *self._folder, f"{self._start:03d}-{self._piece_number:06d}.txt")
        self._stored += len(data)
        self._piece = piece
        if len(piece) >= PIECE_BYTES:
            self._piece, self._piece_number = b"", self._piece_number + 1
        with self._lock:
            if self._stored == self._spooled:
                self._spool.truncate(0)
                self._spooled = self._stored = 0
        return True


def complete_utf8_length(data: bytes) -> int:
    """Return the length without an incomplete UTF-8 character at the end."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data)
    return len(data) - len(decoder.getstate()[0])


def last_error(text: str) -> str:
    """The last error of ours in a text, with its rule and hint; else its last line."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    ends = [at for at, line in enumerate(lines) if line.startswith(("  Rule: ", "  Hint: "))]
    if ends:
        begins = [at for at in range(ends[-1]) if re.match(r"[A-Z]\w+: ", lines[at])]
        if begins:
            return "\n".join(lines[begins[-1] : ends[-1] + 1])[-2000:]
    return lines[-1].strip()[-500:] if lines else ""
