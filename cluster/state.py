"""Where a job is, judged from all that is known: pure, so that every combination can be tested.

The store's `ended.json` is the driver's own word and comes first. Without it the place's word counts, and where that
says nothing of an end, the heartbeat: Ray keeps a job whose driver died with the head as RUNNING for about a minute.
How old a heartbeat is, is told by the store's clock alone: no machine's clock can make a job lost or keep it alive.
"""

from dataclasses import dataclass
from typing import Literal

from graftwork.cluster.backend import JobState
from graftwork.cluster.place import Seen
from graftwork.cluster.run_store import SILENT_S, AttemptRecord

ARRIVES_S = 120.0
"""An attempt that its place does not show so long after its submission never arrived there."""
CLOCK_OFF_S = 15.0
"""A clock that is further off is said, since the times that its machine writes into logs are."""
COMES_UP = frozenset({"New", "Initializing", "Waiting", "Retrying"})
"""Of KubeRay: the cluster is made, also again; `jobStatus` may still be the former one's."""
HELD_BACK = frozenset({"Suspending", "Suspended"})
SERVES = "Serving"
"""Ours, of an endpoint: it has no driver that could be heard."""
OVER = frozenset({"Complete", "Failed", "ValidationFailed"})
HEAD_GONE = "Failed to connect to GCS within"
"""The last words of a process whose Ray lost its head (Ray 2.60, rpc_client.h)."""

Cause = Literal["", "lost", "preempted", "oom", "failed"]
"""What a retry is for, in the words of `retry.on`; empty where nothing is to be retried."""


@dataclass(frozen=True)
class Judged:
    """A state and what it was judged by, for people."""

    state: JobState
    why: str
    cause: Cause = ""


def judge(record: AttemptRecord, seen: Seen | None, now: float) -> Judged:
    """The state of an attempt. `seen` is None where its place does not know it; `now` by the reader's clock."""
    if record.ended is not None:
        return _by_its_end(record)
    if seen is None:
        return _unknown_to_its_place(record, now)
    if seen.deployment_status in HELD_BACK:
        state: JobState = "suspended" if record.started_at is not None else "queued"
        return Judged(state, f"its place holds it back{_asked(record)}{_said(seen)}")
    if seen.deployment_status in COMES_UP:
        return _heard(record) or Judged("pending", f"its cluster comes up{_again(record)}{_asked(record)}{_said(seen)}")
    if seen.deployment_status == SERVES:
        return Judged("running", f"it serves{_asked(record)}{_said(seen)}")
    if seen.job_status == "SUCCEEDED":
        return Judged("succeeded", "its place says so; the driver's own word is missing")
    if seen.deployment_status in OVER or seen.job_status in ("FAILED", "STOPPED"):
        return _ended_there(record, seen)
    if record.silent_s is None:
        return Judged("pending", f"it waits for its driver{_asked(record)}{_said(seen)}")
    return _heard(record) or _lost(record, f"its driver was last heard {record.silent_s:.0f} s ago{_said(seen)}")


def _by_its_end(record: AttemptRecord) -> Judged:
    ended = record.ended
    assert ended is not None
    if ended.reason == "user":
        return Judged("cancelled", f"cancelled by a person{_more(ended.message)}")
    if ended.reason is not None:
        return Judged("stopped", f"stopped by its limit: {ended.reason}{_more(ended.message)}")
    if ended.exit_code == 0:
        return Judged("succeeded", "exit code 0")
    if ended.out_of_memory:
        return Judged("failed", f"out of memory, exit code {ended.exit_code}{_more(ended.message)}", "oom")
    if HEAD_GONE in ended.message:
        return Judged("failed", f"the head of its Ray died under it{_more(ended.message)}", "lost")
    return Judged("failed", ended.message or f"exit code {ended.exit_code}", "failed")


def _unknown_to_its_place(record: AttemptRecord, now: float) -> Judged:
    heard = _heard(record)
    if heard is not None:
        return Judged("running", f"{heard.why}{_from(record)}, though its place does not show it")
    if record.cancel is not None:
        return _cancelled(record)
    if record.silent_s is not None:
        heard_at = f"its driver was last heard {record.silent_s:.0f} s ago{_from(record)}"
        return _lost(record, f"{heard_at}, and its place does not know it")
    waited_s = now - record.submitted_at
    if waited_s <= ARRIVES_S:
        return Judged("submitted", "recorded; its place does not show it yet")
    return Judged("lost", f"submitted {waited_s:.0f} s ago, and its place does not know it", "lost")


def _from(record: AttemptRecord) -> str:
    """Machine of the driver. Other machines see only the heartbeat of a job that runs with `--target local`."""
    return f" on {record.heartbeat.host}" if record.heartbeat is not None else ""


def _ended_there(record: AttemptRecord, seen: Seen) -> Judged:
    """The driver writes its own end before its place can know of one: without it, it died."""
    if record.cancel is not None:
        return _cancelled(record)
    if seen.job_status == "STOPPED":
        return Judged("cancelled", f"stopped by hand in its place{_said(seen)}")
    if seen.reason.endswith("DeadlineExceeded"):
        return Judged("stopped", f"stopped by its place{_said(seen)}")
    if record.silent_s is not None:
        return _lost(record, f"its driver died without a word{_said(seen)}")
    return Judged("failed", f"its place says {seen.deployment_status or seen.job_status}{_said(seen)}", "failed")


def _heard(record: AttemptRecord) -> Judged | None:
    """Running, where its driver was heard of late."""
    if record.silent_s is None or record.silent_s > SILENT_S:
        return None
    what = "was heard" if record.heartbeat is not None else "started"
    leaving = "; its machine is being taken away" if record.heartbeat and record.heartbeat.leaving else ""
    return Judged("running", f"its driver {what} {record.silent_s:.0f} s ago{leaving}{_asked(record)}{_clock(record)}")


def _lost(record: AttemptRecord, why: str) -> Judged:
    if record.heartbeat is not None and record.heartbeat.leaving:
        return Judged("lost", f"{why}; its machine was taken away", "preempted")
    return Judged("lost", f"{why}{_clock(record)}", "lost")


def _cancelled(record: AttemptRecord) -> Judged:
    if record.cancel == "user":
        return Judged("cancelled", "cancelled by a person")
    return Judged("stopped", f"stopped by its limit: {record.cancel}")


def _asked(record: AttemptRecord) -> str:
    return f"; asked to end: {record.cancel}" if record.cancel else ""


def _again(record: AttemptRecord) -> str:
    return " again" if record.started_at is not None else ""


def _clock(record: AttemptRecord) -> str:
    off_s = record.clock_off_s
    if abs(off_s) <= CLOCK_OFF_S:
        return ""
    return f"; the clock of its machine is {abs(off_s):.0f} s {'ahead of' if off_s > 0 else 'behind'} this one"


def _more(message: str) -> str:
    return f": {message}" if message else ""


def _said(seen: Seen) -> str:
    said = ": ".join(part for part in (seen.reason, seen.message.strip()) if part)
    return f" ({said})" if said else ""
