"""A backend that waits out an outage: each call is tried again, with longer pauses, until the patience is used up."""

import itertools
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from graftwork.errors import StoreUnreachable

if TYPE_CHECKING:
    from graftwork.storage import StorageBackend

T = TypeVar("T")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0


class RetryingBackend:
    """Every call of a backend, tried for `patience_s` seconds while its server cannot be reached."""

    def __init__(self, backend: "StorageBackend", patience_s: float) -> None:
        self._backend, self._patience_s = backend, patience_s

    def read(self, path: str) -> bytes | None:
        return self._retry(lambda: self._backend.read(path))

    def write(self, path: str, data: bytes) -> None:
        self._retry(lambda: self._backend.write(path, data))

    def create(self, path: str, data: bytes) -> bool:
        """An answer lost on its way leaves our own bytes there: then we are the one who created it."""
        calls = itertools.count()

        def create() -> bool:
            again = next(calls) > 0
            return self._backend.create(path, data) or (again and self._backend.read(path) == data)

        return self._retry(create)

    def append(self, path: str, line: bytes) -> None:
        self._backend.append(path, line)  # a second try could append twice; only disks append

    def exists(self, path: str) -> bool:
        return self._retry(lambda: self._backend.exists(path))

    def children(self, path: str) -> dict[str, int | None]:
        return self._retry(lambda: self._backend.children(path))

    def stamps(self, path: str) -> dict[str, str]:
        return self._retry(lambda: self._backend.stamps(path))

    def tree(self, path: str) -> dict[tuple[str, ...], str]:
        return self._retry(lambda: self._backend.tree(path))

    def ages(self, path: str) -> dict[tuple[str, ...], float]:
        return self._retry(lambda: self._backend.ages(path))

    def delete(self, path: str) -> None:
        self._retry(lambda: self._backend.delete(path))

    def put_file(self, local: Path, path: str) -> None:
        self._retry(lambda: self._backend.put_file(local, path))

    def get_file(self, path: str, local: Path) -> None:
        self._retry(lambda: self._backend.get_file(path, local))

    def _retry(self, call: Callable[[], T]) -> T:
        end, pause_s = time.monotonic() + self._patience_s, FIRST_PAUSE_S
        while True:
            try:
                return call()
            except StoreUnreachable:
                if time.monotonic() + pause_s > end:
                    raise
            time.sleep(pause_s * random.uniform(0.5, 1.0))  # workers that failed together come back apart
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
