"""The state of a job over all that can be known of it at once."""

import itertools
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from graftwork.cluster.jobs.models import ENDED, ObservedState
from graftwork.cluster.jobs.store import (
    ARRIVES_S,
    COMES_UP,
    HELD_BACK,
    OVER,
    SILENT_S,
    AttemptEnd,
    AttemptRecord,
    DerivedState,
    Heartbeat,
    JobStore,
    StopReason,
    derive_state,
)
from tests.jobs import command_job

NOW = 1_000_000.0
JOB = ("", "PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED")
DEPLOYMENT = (
    "",
    "New",
    "Initializing",
    "Running",
    "Complete",
    "Failed",
    "ValidationFailed",
    "Suspending",
    "Suspended",
    "Retrying",
    "Waiting",
)
REASONS = (
    "",
    "SubmissionFailed",
    "DeadlineExceeded",
    "AppFailed",
    "JobDeploymentStatusTransitionGracePeriodExceeded",
    "ValidationFailed",
    "JobStatusCheckTimeoutExceeded",
    "PreRunningDeadlineExceeded",
)
SEEN = (None, *(ObservedState(*words) for words in itertools.product(JOB, DEPLOYMENT, REASONS)))
SEEN_SHORT = (None, *(ObservedState(*words) for words in itertools.product(JOB, DEPLOYMENT)))
"""Beside an end that the driver wrote, no reason matters."""
CANCEL: tuple[StopReason | None, ...] = (None, "user", "deadline", "budget", "pending")
ENDS = (
    None,
    AttemptEnd(NOW, 0),
    AttemptEnd(NOW, 1),
    AttemptEnd(NOW, 137, out_of_memory=True),
    AttemptEnd(NOW, 1, "user"),
    AttemptEnd(NOW, 1, "budget"),
    AttemptEnd(NOW, 0, "deadline"),
)
HEARD = (None, 0.0, SILENT_S, SILENT_S + 1, 10_000.0)
BEATS = ((False, False), (True, False), (True, True))
"""A heartbeat was written; it said that the machine leaves."""
REST = (CANCEL, HEARD, BEATS, (1.0, ARRIVES_S + 1))
ALL = itertools.chain(itertools.product((None,), SEEN, *REST), itertools.product(ENDS[1:], SEEN_SHORT, *REST))


def record(
    cancel: StopReason | None, ended: AttemptEnd | None, heard: float | None, beat: bool, leaving: bool, ago: float
) -> AttemptRecord:
    """`heard` without `beat`: a driver started and has not been heard since."""
    heartbeat = Heartbeat(NOW - heard, 1, "host", 7, leaving=leaving) if heard is not None and beat else None
    started = NOW - heard if heard is not None else None
    return AttemptRecord(1, NOW - ago, started, heartbeat, cancel, ended, heard)


def test_every_combination_has_one_sensible_state() -> None:
    counted = 0
    for ended, seen, cancel, heard, (beat, leaving), ago in ALL:
        known = record(cancel, ended, heard, beat, leaving, ago)
        found = derive_state(known, seen, NOW)
        _check(found, known, seen, ago)
        counted += 1
    assert counted == (529 + 6 * 67) * 5 * 5 * 3 * 2


def _check(found: DerivedState, known: AttemptRecord, seen: ObservedState | None, ago: float) -> None:
    what = (found, known, seen)
    heard = known.silent_s is not None
    alive = known.silent_s is not None and known.silent_s <= SILENT_S
    assert found.why, what
    if known.ended is not None:  # the driver's own word wins
        stopped = {"user": "cancelled", None: "failed" if known.ended.exit_code else "succeeded"}
        assert found.state == stopped.get(known.ended.reason, "stopped"), what
        assert (found.cause == "oom") == known.ended.out_of_memory, what
        return
    up = seen is not None and seen.deployment_status in COMES_UP
    held = seen is not None and seen.deployment_status in HELD_BACK
    over = (
        seen is not None
        and not up
        and not held
        and (seen.deployment_status in OVER or seen.job_status in ("FAILED", "STOPPED", "SUCCEEDED"))
    )
    if found.state == "running":
        assert alive, what
        assert not over, what
        assert not held, what
    if alive and not over and not held:
        assert found.state == "running", what
    assert (found.state in ("queued", "suspended")) == held, what
    assert (found.state == "submitted") == (seen is None and not heard and known.cancel is None and ago < ARRIVES_S)
    if found.state == "pending":
        assert up or (seen is not None and not heard), what
    assert (found.state == "lost") == _is_lost(known, seen, over, up or held, ago), what
    assert (found.cause in ("lost", "preempted")) == (found.state == "lost"), what
    if found.cause == "preempted":
        assert known.heartbeat is not None, what
        assert known.heartbeat.leaving, what
    if known.cancel is not None and (over or (seen is None and not alive)):
        succeeded = seen is not None and seen.job_status == "SUCCEEDED"
        assert found.state == ("succeeded" if succeeded else "cancelled" if known.cancel == "user" else "stopped"), what
    if over:
        assert found.state in ENDED, what


def _is_lost(known: AttemptRecord, seen: ObservedState | None, over: bool, not_there: bool, ago: float) -> bool:
    if seen is not None and over:
        by_limit = seen.reason.endswith("DeadlineExceeded")
        own_end = seen.job_status in ("SUCCEEDED", "STOPPED")
        return known.silent_s is not None and known.cancel is None and not by_limit and not own_end
    if seen is None and known.cancel is not None:
        return False
    if known.silent_s is None:
        return seen is None and ago > ARRIVES_S
    return known.silent_s > SILENT_S and not not_there


@pytest.mark.parametrize("off_s", [-600.0, 600.0])
def test_a_clock_that_is_off_neither_kills_nor_revives_and_is_said(off_s: float) -> None:
    beat = Heartbeat(NOW + off_s, 1, "host", 7)
    fresh = AttemptRecord(1, NOW - 60, NOW - 50, beat, None, None, 2.0, off_s)
    found = derive_state(fresh, ObservedState("RUNNING"), NOW)
    assert found.state == "running"
    assert f"600 s {'ahead of' if off_s > 0 else 'behind'}" in found.why
    dead = derive_state(replace(fresh, silent_s=90.0), ObservedState("RUNNING"), NOW)
    assert (dead.state, dead.cause) == ("lost", "lost")
    assert "last heard 90 s ago" in dead.why


@pytest.mark.parametrize("off_s", [-600.0, 600.0])
def test_a_beat_is_as_old_as_the_store_says_whatever_its_machine_says(tmp_path: Path, off_s: float) -> None:
    runs, job = JobStore(str(tmp_path)), command_job(str(tmp_path), ["true"])
    runs.record(job, "local")
    runs.open_attempt(job.job_id, 1)
    beat = Heartbeat(time.time() + off_s, 1, "host", 7)
    runs.store.write_json(asdict(beat), "jobs", job.job_id, "a1", "heartbeat.json")
    found = runs.latest(job.job_id)
    assert found.silent_s is not None
    assert found.silent_s < SILENT_S
    assert found.clock_off_s == pytest.approx(off_s, abs=10)
    assert derive_state(found, ObservedState("RUNNING"), time.time()).state == "running"


def test_a_job_whose_ray_lost_its_head_is_retried_as_lost() -> None:
    said = "[2026-11-26 E 1 1] rpc_client.h:204: Failed to connect to GCS within 15 seconds. GCS may have been killed."
    found = derive_state(AttemptRecord(1, 0.0, 1.0, None, None, AttemptEnd(2.0, 1, message=said)), None, 3.0)
    assert (found.state, found.cause) == ("failed", "lost")
    assert "the head of its Ray died under it" in found.why
