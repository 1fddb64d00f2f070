"""What a command prints: passed on, and kept in the store in pieces that are at most LOG_BEHIND_S behind."""

import subprocess
import sys
import threading
import time

from graftwork.cluster.run_store import LOG_BEHIND_S
from graftwork.storage import Store


class Output:
    """Reads a child's output in a thread until it ends; another thread writes the pieces."""

    def __init__(self, store: Store, folder: tuple[str, ...], start: int, child: "subprocess.Popen[bytes]") -> None:
        self._store, self._folder, self._start, self._child = store, folder, start, child
        self._pending, self._piece, self._lock = bytearray(), 0, threading.Lock()
        self._tail = b""
        self._read = threading.Thread(target=self._reading, name="output", daemon=True)
        self._read.start()
        self._write = threading.Thread(target=self._writing, name="output-store", daemon=True)
        self._write.start()

    def progress(self) -> str:
        """The last line it printed."""
        lines = [line for line in self._tail.decode(errors="replace").splitlines() if line.strip()]
        return lines[-1][:200] if lines else ""

    def last_error(self) -> str:
        """The last error that it printed, in the form of `GraftworkError.text`; else the last line."""
        return self.progress()

    def close(self) -> None:
        """Everything it printed is in the store at return."""
        self._read.join(timeout=5)
        self._flush()

    def _reading(self) -> None:
        assert self._child.stdout is not None
        while data := self._child.stdout.read1(65536):  # type: ignore[attr-defined]
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
            with self._lock:
                self._pending += data
                self._tail = (self._tail + data)[-4096:]

    def _writing(self) -> None:
        while self._read.is_alive():
            time.sleep(LOG_BEHIND_S)
            self._flush()

    def _flush(self) -> None:
        with self._lock:
            data, self._pending = bytes(self._pending), bytearray()
            if not data:
                return
            self._piece += 1
            name = f"{self._start:03d}-{self._piece:06d}.txt"
        self._store.write_bytes(data, *self._folder, name)
