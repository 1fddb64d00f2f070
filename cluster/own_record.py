"""Which nodes of own clusters run on this machine: one small file each, so that `cluster stop` finds them."""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from graftwork.errors import ClusterError
from graftwork.storage import cache_root

STOP_S = 40.0


@dataclass(frozen=True)
class Running:
    """A node's command."""

    pid: int
    started_at: float
    """By the kernel: another process of the same pid has another one."""
    role: str
    address: str
    """HOST:PORT of its head's GCS."""
    first_port: int


@contextlib.contextmanager
def recorded(role: str, address: str, first_port: int) -> Iterator[None]:
    """Have this process in the records for the time of the block."""
    import psutil

    mine = Running(os.getpid(), psutil.Process().create_time(), role, address, first_port)
    file = _folder() / f"{mine.pid}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asdict(mine)), encoding="utf-8")
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def running() -> list[Running]:
    """The nodes that live; records of killed ones are removed."""
    found = []
    for file in sorted(_folder().glob("*.json")):
        record = Running(**json.loads(file.read_text(encoding="utf-8")))
        if _lives(record):
            found.append(record)
        else:
            file.unlink(missing_ok=True)
    return found


def stop(records: list[Running]) -> None:
    """End them, workers first; nothing of them is left at return. Raises ClusterError for one that does not end."""
    import psutil

    processes = []
    for record in sorted(records, key=lambda each: each.role == "head"):
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(record.pid)
            process.terminate()
            processes.append(process)
    for process in psutil.wait_procs(processes, timeout=STOP_S)[1]:
        raise ClusterError("cluster stop", f"pid {process.pid} did not end within {STOP_S:.0f} s", "",
                           f"kill -9 {process.pid}: its processes go with it")  # fmt: skip


def _lives(record: Running) -> bool:
    import psutil

    try:
        return psutil.Process(record.pid).create_time() == record.started_at
    except psutil.NoSuchProcess:
        return False


def _folder() -> Path:
    return cache_root() / "own-clusters"
