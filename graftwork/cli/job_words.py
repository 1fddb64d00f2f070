"""A job in words: a line, its age, what it cost, what it left, and what one can do now."""

import re
import time
from collections.abc import Iterator

from graftwork.cluster.backend import JobStatus
from graftwork.cluster.run_store import JobStore
from graftwork.storage import DEFAULT_ROOT, Store

LEFT = re.compile(r"^(published |report: |report of the winner: |winner: |best: |serving at )", re.MULTILINE)
"""What the stages say last: where to find what they made."""


def line_of(status: JobStatus) -> str:
    """`cards-0123456789 attempt 2 on local: running; its driver was heard 3 s ago`."""
    why = f"; {status.why}" if status.why else ""
    return f"{status.job_id} attempt {status.attempt} on {status.on}: {status.state}{why}"


def root_flag(root: str) -> str:
    """` --root ROOT`, for a command that is to find the same store; empty for the default of this folder."""
    return "" if Store(root).uri == Store(DEFAULT_ROOT).uri else f" --root {root}"


def is_away(status: JobStatus) -> bool:
    """Whether its place was asked and did not answer, as `StoredBackend` says it."""
    return "its place does not answer" in status.why


def age(then: float | None, now: float | None = None) -> str:
    """Since `then`, in one unit: `8s`, `12m`, `3h`, `5d`; `-` for None."""
    if then is None:
        return "-"
    seconds = max((time.time() if now is None else now) - then, 0.0)
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size or (seconds >= size and unit == "m"):
            return f"{seconds // size:.0f}{unit}"
    return f"{seconds:.0f}s"


def when(then: float | None) -> str:
    """`2026-03-01 12:00:05 (3h ago)`, by this machine's clock and time zone."""
    if then is None:
        return "-"
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(then))} ({age(then)} ago)"


def left_behind(runs: JobStore, status: JobStatus) -> list[str]:
    """The lines of its log that name what it made: adapters, reports, the address it serves at."""
    if status.attempt == 0:
        return []
    text = "".join(runs.logs(status.job_id, status.attempt))
    return [line.rstrip() for line in text.splitlines() if LEFT.match(line)]


def next_commands(status: JobStatus, root: str) -> Iterator[str]:
    """Commands that make sense in its state."""
    job, flag = status.job_id, root_flag(root)
    if status.state in ("submitted", "queued", "pending"):
        yield f"graftwork jobs logs -f {job}{flag}"
        if not status.on.startswith("local"):
            yield f"graftwork doctor --target {status.on}, where it stays so"
        yield f"graftwork jobs cancel {job}{flag}"
    elif status.state in ("running", "suspended"):
        yield f"graftwork jobs logs -f {job}{flag}"
        yield f"graftwork jobs cancel {job}{flag}"
    elif status.state != "succeeded":
        yield f"graftwork jobs logs {job} --tail 40{flag}"
        yield f"graftwork jobs resubmit {job}{flag}: it goes on from the last checkpoint"
