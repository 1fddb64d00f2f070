"""State of a job, derived from all that is known: a pure function, so that every combination can be tested.

The driver's `ended.json` in the store comes first. Without it the state at the target counts, and where that shows no
end, the age of the heartbeat: Ray keeps a job whose driver died with the head as RUNNING for about a minute. The age is
measured by the store's clock alone: no machine's clock can make a job lost or keep it alive.
"""

from dataclasses import dataclass
from typing import Literal

from graftwork.cluster.jobs.models import JobState, ObservedState
from graftwork.cluster.jobs.store import SILENT_S, AttemptRecord

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
class DerivedState:
    """A state and what it was judged by, for people."""

    state: JobState
    why: str
    cause: Cause = ""


def derive_state(record: AttemptRecord, seen: ObservedState | None, now: float) -> DerivedState:
    """The state of an attempt. `seen` is None where its place does not know it; `now` by the reader's clock."""
    if record.ended is not None:
        return _by_its_end(record)
    if seen is None:
        return _unknown_to_its_place(record, now)
    if seen.deployment_status in HELD_BACK:
        state: JobState = "suspended" if record.started_at is not None else "queued"
        return DerivedState(state, f"its place holds it back{_stop_note(record)}{_reason_note(seen)}")
    if seen.deployment_status in COMES_UP:
        return _from_heartbeat(record) or DerivedState(
            "pending", f"its cluster comes up{_again_note(record)}{_stop_note(record)}{_reason_note(seen)}"
        )
    if seen.deployment_status == SERVES:
        return DerivedState("running", f"it serves{_stop_note(record)}{_reason_note(seen)}")
    if seen.job_status == "SUCCEEDED":
        return DerivedState("succeeded", "its place says so; the driver's own word is missing")
    if seen.deployment_status in OVER or seen.job_status in ("FAILED", "STOPPED"):
        return _ended_there(record, seen)
    if record.silent_s is None:
        return DerivedState("pending", f"it waits for its driver{_stop_note(record)}{_reason_note(seen)}")
    return _from_heartbeat(record) or _lost_state(
        record, f"its driver was last heard {record.silent_s:.0f} s ago{_reason_note(seen)}"
    )


def _by_its_end(record: AttemptRecord) -> DerivedState:
    ended = record.ended
    assert ended is not None
    if ended.reason == "user":
        return DerivedState("cancelled", f"cancelled by a person{_more(ended.message)}")
    if ended.reason is not None:
        return DerivedState("stopped", f"stopped by its limit: {ended.reason}{_more(ended.message)}")
    if ended.exit_code == 0:
        return DerivedState("succeeded", "exit code 0")
    if ended.out_of_memory:
        return DerivedState("failed", f"out of memory, exit code {ended.exit_code}{_more(ended.message)}", "oom")
    if HEAD_GONE in ended.message:
        return DerivedState("failed", f"the head of its Ray died under it{_more(ended.message)}", "lost")
    return DerivedState("failed", ended.message or f"exit code {ended.exit_code}", "failed")


def _unknown_to_its_place(record: AttemptRecord, now: float) -> DerivedState:
    heard = _from_heartbeat(record)
    if heard is not None:
        return DerivedState("running", f"{heard.why}{_from(record)}, though its place does not show it")
    if record.cancel is not None:
        return _cancelled(record)
    if record.silent_s is not None:
        heard_at = f"its driver was last heard {record.silent_s:.0f} s ago{_from(record)}"
        return _lost_state(record, f"{heard_at}, and its place does not know it")
    waited_s = now - record.submitted_at
    if waited_s <= ARRIVES_S:
        return DerivedState("submitted", "recorded; its place does not show it yet")
    return DerivedState("lost", f"submitted {waited_s:.0f} s ago, and its place does not know it", "lost")


def _from(record: AttemptRecord) -> str:
    """Machine of the driver. Other machines see only the heartbeat of a job that runs with `--target local`."""
    return f" on {record.heartbeat.host}" if record.heartbeat is not None else ""


def _ended_there(record: AttemptRecord, seen: ObservedState) -> DerivedState:
    """The driver writes its own end before its place can know of one: without it, it died."""
    if record.cancel is not None:
        return _cancelled(record)
    if seen.job_status == "STOPPED":
        return DerivedState("cancelled", f"stopped by hand in its place{_reason_note(seen)}")
    if seen.reason.endswith("DeadlineExceeded"):
        return DerivedState("stopped", f"stopped by its place{_reason_note(seen)}")
    if record.silent_s is not None:
        return _lost_state(record, f"its driver died without a word{_reason_note(seen)}")
    return DerivedState(
        "failed", f"its place says {seen.deployment_status or seen.job_status}{_reason_note(seen)}", "failed"
    )


def _from_heartbeat(record: AttemptRecord) -> DerivedState | None:
    """Running, where its driver was heard of late."""
    if record.silent_s is None or record.silent_s > SILENT_S:
        return None
    what = "was heard" if record.heartbeat is not None else "started"
    leaving = "; its machine is being taken away" if record.heartbeat and record.heartbeat.leaving else ""
    return DerivedState(
        "running", f"its driver {what} {record.silent_s:.0f} s ago{leaving}{_stop_note(record)}{_clock(record)}"
    )


def _lost_state(record: AttemptRecord, why: str) -> DerivedState:
    if record.heartbeat is not None and record.heartbeat.leaving:
        return DerivedState("lost", f"{why}; its machine was taken away", "preempted")
    return DerivedState("lost", f"{why}{_clock(record)}", "lost")


def _cancelled(record: AttemptRecord) -> DerivedState:
    if record.cancel == "user":
        return DerivedState("cancelled", "cancelled by a person")
    return DerivedState("stopped", f"stopped by its limit: {record.cancel}")


def _stop_note(record: AttemptRecord) -> str:
    return f"; asked to end: {record.cancel}" if record.cancel else ""


def _again_note(record: AttemptRecord) -> str:
    return " again" if record.started_at is not None else ""


def _clock(record: AttemptRecord) -> str:
    off_s = record.clock_off_s
    if abs(off_s) <= CLOCK_OFF_S:
        return ""
    return f"; the clock of its machine is {abs(off_s):.0f} s {'ahead of' if off_s > 0 else 'behind'} this one"


def _more(message: str) -> str:
    return f": {message}" if message else ""


def _reason_note(seen: ObservedState) -> str:
    said = ": ".join(part for part in (seen.reason, seen.message.strip()) if part)
    return f" ({said})" if said else ""
