"""Where a job is, judged from all that is known: pure, so that every combination can be tested.

The store's `ended.json` is the driver's own word and comes first. Without it the place's word counts, and where that
says nothing of an end, the heartbeat: Ray keeps a job whose driver died with the head as RUNNING for about a minute.
"""

from dataclasses import dataclass

from graftwork.cluster.backend import JobState
from graftwork.cluster.place import Seen
from graftwork.cluster.run_store import SILENT_S, AttemptRecord

ARRIVES_S = 120.0
"""An attempt that its place does not show so long after its submission never arrived there."""
STARTING = frozenset({"", "New", "Initializing", "Waiting", "Retrying"})


@dataclass(frozen=True)
class Judged:
    """A state and what it was judged by, for people."""

    state: JobState
    why: str


def judge(record: AttemptRecord, seen: Seen | None, now: float) -> Judged:
    """The state of an attempt. `seen` is None where its place does not know it; `now` by the reader's clock."""
    if record.ended is not None:
        return _by_its_end(record)
    if seen is None:
        return _unknown_to_its_place(record, now)
    if seen.deployment_status in ("Suspending", "Suspended"):
        return Judged(
            "suspended" if record.started_at is not None else "queued", f"its place holds it back{_said(seen)}"
        )
    if seen.deployment_status in ("Failed", "ValidationFailed") or seen.job_status in ("FAILED", "STOPPED"):
        return _ended_there(record, seen)
    if seen.job_status == "SUCCEEDED":
        return Judged("succeeded", "its place says so; the driver's own word is missing")
    return _at_work(record, seen, now)


def _by_its_end(record: AttemptRecord) -> Judged:
    ended = record.ended
    assert ended is not None
    if ended.reason == "user":
        return Judged("cancelled", "cancelled by a person")
    if ended.reason is not None:
        return Judged("stopped", ended.message or f"stopped by its limit: {ended.reason}")
    return Judged("succeeded" if ended.exit_code == 0 else "failed", ended.message or f"exit code {ended.exit_code}")


def _unknown_to_its_place(record: AttemptRecord, now: float) -> Judged:
    silent_s = _silent_s(record, now)
    if silent_s is not None and silent_s <= SILENT_S:
        return Judged("running", "its driver is heard, though its place does not show it")
    if record.cancel is not None:
        return _cancelled(record)
    if silent_s is not None:
        return Judged("lost", f"its driver was last heard {silent_s:.0f} s ago, and its place does not know it")
    if now - record.submitted_at <= ARRIVES_S:
        return Judged("submitted", "recorded; its place does not show it yet")
    return Judged("lost", f"submitted {now - record.submitted_at:.0f} s ago, and its place does not know it")


def _ended_there(record: AttemptRecord, seen: Seen) -> Judged:
    """The driver writes its own end before its place can know of one: without it, it died."""
    if record.cancel is not None:
        return _cancelled(record)
    if seen.job_status == "STOPPED":
        return Judged("cancelled", f"stopped by hand in its place{_said(seen)}")
    if record.heartbeat is not None and not seen.reason.endswith("DeadlineExceeded"):
        return Judged("lost", f"its driver died without a word{_said(seen)}")
    return Judged("failed", f"its place says {seen.deployment_status or seen.job_status}{_said(seen)}")


def _at_work(record: AttemptRecord, seen: Seen, now: float) -> Judged:
    silent_s = _silent_s(record, now)
    if silent_s is not None and silent_s <= SILENT_S:
        ending = f"; asked to end: {record.cancel}" if record.cancel else ""
        return Judged("running", f"its driver was heard {max(silent_s, 0):.0f} s ago{ending}")
    if seen.deployment_status in STARTING and seen.deployment_status:
        again = " again" if record.started_at is not None else ""
        return Judged("pending", f"its cluster comes up{again}{_said(seen)}")
    if silent_s is not None:
        return Judged("lost", f"its driver was last heard {silent_s:.0f} s ago{_said(seen)}")
    if seen.job_status == "RUNNING":
        return Judged("running", "its driver starts")
    return Judged("pending", f"it waits for its driver{_said(seen)}")


def _silent_s(record: AttemptRecord, now: float) -> float | None:
    """Since the driver was last heard; since its start where it has not been heard again."""
    if record.heartbeat is not None:
        return now - record.heartbeat.at
    return now - record.started_at if record.started_at is not None else None


def _cancelled(record: AttemptRecord) -> Judged:
    if record.cancel == "user":
        return Judged("cancelled", "cancelled by a person")
    return Judged("stopped", f"stopped by its limit: {record.cancel}")


def _said(seen: Seen) -> str:
    said = ": ".join(part for part in (seen.reason, seen.message.strip()) if part)
    return f" ({said})" if said else ""
