"""Records of a job in its store (spec, attempts, drivers, heartbeat, log, end), and the state derived from them.

Everything here outlives the cluster. Written by clients (`job.json`, `attempts/`, `cancel.json`) and by the driver (the
rest), each key whole, on a disk and on S3 alike:

    jobs/<job_id>/job.json                      what was asked, created once
    jobs/<job_id>/spec.yaml                     the stage's whole spec, as the driver runs it
    jobs/<job_id>/attempts/<n>.json             created once: of all clients one starts attempt n
    jobs/<job_id>/a<n>/starts/<k>.json          created once by the k-th driver of the attempt; the highest is valid
    jobs/<job_id>/a<n>/heartbeat.json           every HEARTBEAT_S
    jobs/<job_id>/a<n>/logs/<k>-<000001>.txt    what it printed, at most LOG_BEHIND_S behind; the last one grows
    jobs/<job_id>/a<n>/events/<ms>-<what>.json  what happened to it, for people
    jobs/<job_id>/a<n>/cancel.json              it is asked to end, and why
    jobs/<job_id>/a<n>/leave/<k>.json           the machine of its k-th driver is taken away: save and go
    jobs/<job_id>/a<n>/ended.json               it has ended, and how
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

from graftwork.cluster.jobs.models import Attempt, Demand, Job, JobState, ObservedState
from graftwork.cluster.spec import ClusterSpec
from graftwork.errors import ConfigError
from graftwork.storage.store import Store, json_bytes

HEARTBEAT_S = 5.0
SILENT_S = 20.0
"""A driver that was heard and is silent for longer is taken for lost: four heartbeats."""
LOG_BEHIND_S = 3.0
AT_ONCE = 16
"""Jobs that are read at a time from S3."""
A = TypeVar("A")
B = TypeVar("B")

SAVES = frozenset({"train"})
"""Kinds that make a checkpoint and go when the store asks them to (fencing.py)."""

StopReason = Literal["user", "deadline", "budget", "pending", "superseded"]


@dataclass(frozen=True)
class JobRecord:
    """job.json: what was asked."""

    job_id: str
    name: str
    kind: str
    digest: str
    on: str
    created_at: float
    cluster: Mapping[str, Any]
    demand: Mapping[str, Any]

    def job(self, root: str, spec: Mapping[str, Any]) -> Job:
        """The job it is the record of."""
        return Job(
            self.name,
            self.kind,
            self.digest,
            root,
            spec,
            ClusterSpec.model_validate(self.cluster),
            Demand(**self.demand),
        )


@dataclass(frozen=True)
class Heartbeat:
    """heartbeat.json. `at` is the clock of the machine where the driver runs."""

    at: float
    start: int
    host: str
    pid: int
    progress: str = ""
    usd: float | None = None
    """What the job has cost so far, by the price table, earlier attempts included."""
    leaving: bool = False
    """Its machine is being taken away."""


@dataclass(frozen=True)
class AttemptEnd:
    """ended.json."""

    at: float
    exit_code: int
    """Of a command that a signal killed: 128 and its number, as a shell says it."""
    reason: StopReason | None = None
    """Why it was stopped; None where it ended by itself."""
    message: str = ""
    """The last error that it printed."""
    out_of_memory: bool = False


@dataclass(frozen=True)
class AttemptRecord:
    """What the store holds of one attempt, read together. The times are by the reader's clock."""

    number: int
    submitted_at: float
    started_at: float | None
    """When the first driver started."""
    heartbeat: Heartbeat | None
    cancel: StopReason | None
    ended: AttemptEnd | None
    silent_s: float | None = None
    """Since a driver was last heard, or started, by the store's clock alone. None before the first."""
    clock_off_s: float = 0.0
    """How far the clock of the driver's machine is ahead of the reader's, a slow write included."""


@dataclass(frozen=True)
class Event:
    """events/<ms>-<what>.json."""

    at: float
    what: str
    """started, asked-to-end, machine-leaves, ended, retry."""
    facts: Mapping[str, Any]


class JobStore:
    """The jobs of one root. Cheap to build. Raises StorageError, StoreUnreachable."""

    def __init__(self, root: str, patience_s: float = 0.0) -> None:
        self.store = Store(root, patience_s)

    def record(self, job: Job, on: str) -> JobRecord:
        """Create the record of a job once, and return the record in the store."""
        key = ("jobs", job.job_id)
        dump = job.cluster.model_dump(mode="json")
        new = JobRecord(job.job_id, job.name, job.kind, job.digest, on, time.time(), dump, asdict(job.demand))
        self.store.create_bytes(json_bytes(dict(job.spec)), *key, "spec.yaml")  # JSON is YAML
        if self.store.create_bytes(json_bytes(asdict(new)), *key, "job.json"):
            return new
        return self.job(job.job_id)

    def amend(self, record: JobRecord) -> None:
        """Another cluster for the attempts to come of a job that has ended: other limits, more machines."""
        self.store.write_json(asdict(record), "jobs", record.job_id, "job.json")

    def job(self, job_id: str) -> JobRecord:
        """Raises ConfigError where it was never submitted."""
        found = self.store.find_bytes("jobs", job_id, "job.json")
        if found is None:
            raise ConfigError(
                f"job {job_id}",
                f"the store {self.store.uri} has no such job",
                "a job is named <name>-<hash>, as `jobs ls` lists it",
                f"graftwork jobs ls --root {self.store.uri}",
            )
        return JobRecord(**json.loads(found))

    def jobs(self) -> list[JobRecord]:
        """The records of all jobs of the store."""
        return self.of_many(self.job, self.job_ids())

    def of_many(self, ask: Callable[[A], B], items: Sequence[A]) -> list[B]:
        """Call `ask` for each item: in turn on a disk; many at once on S3, where a round trip is the cost."""
        if self.store.is_local or len(items) < 2:
            return [ask(item) for item in items]
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="jobs") as pool:
            return list(pool.map(ask, items))

    def job_ids(self) -> list[str]:
        """All jobs of the store."""
        return self.store.list("jobs")

    def spec(self, job_id: str) -> Mapping[str, Any]:
        """The stage's spec."""
        spec: Mapping[str, Any] = self.store.read_json("jobs", job_id, "spec.yaml")
        return spec

    def attempts(self, job_id: str) -> list[int]:
        """Numbers of its attempts, ascending."""
        names = self.store.list("jobs", job_id, "attempts")
        return sorted(int(name.removesuffix(".json")) for name in names)

    def open_attempt(self, job_id: str, number: int) -> bool:
        """Create an attempt; True for one of all callers. A later attempt fences off the earlier ones."""
        record = json_bytes({"number": number, "submitted_at": time.time()})
        return self.store.create_bytes(record, "jobs", job_id, "attempts", f"{number}.json")

    def attempt(self, job_id: str, number: int) -> AttemptRecord:
        """Return the record of an attempt."""
        return self._attempt(job_id, number, self.store.ages("jobs", job_id), time.time())

    def latest(self, job_id: str) -> AttemptRecord:
        """Return the record of the latest attempt, in one listing and one or two reads. Number 0 before the first."""
        ages, now = self.store.ages("jobs", job_id), time.time()
        numbers = [int(key[1].removesuffix(".json")) for key in ages if key[0] == "attempts"]
        if not numbers:  # its client was killed before it opened one
            return AttemptRecord(0, now - ages.get(("job.json",), 0.0), None, None, None, None)
        return self._attempt(job_id, max(numbers), ages, now)

    def _attempt(self, job_id: str, number: int, ages: Mapping[tuple[str, ...], float], now: float) -> AttemptRecord:
        here = f"a{number}"

        def read(name: str) -> Any:
            return self.store.read_json("jobs", job_id, here, name) if (here, name) in ages else None

        starts = sorted(age for key, age in ages.items() if key[:2] == (here, "starts"))
        cancel, ended = read("cancel.json"), read("ended.json")
        given = read("heartbeat.json")
        beat = Heartbeat(**given) if given is not None else None
        heard = [age for age in (ages.get((here, "heartbeat.json")), *starts[:1]) if age is not None]
        off = beat.at - (now - ages[here, "heartbeat.json"]) if beat is not None else 0.0
        return AttemptRecord(
            number,
            now - ages[("attempts", f"{number}.json")],
            now - starts[-1] if starts else None,
            beat,
            cancel["reason"] if cancel else None,
            AttemptEnd(**ended) if ended else None,
            min(heard, default=None),
            off,
        )

    def logs(self, job_id: str, number: int, shown: dict[str, int] | None = None) -> Iterator[str]:
        """Yield the output that is not yet shown, in order. Updates `shown`, the bytes shown of each piece."""
        shown = {} if shown is None else shown
        folder = ("jobs", job_id, f"a{number}", "logs")
        for name, size in sorted(self.store.children(*folder).items()):
            if (size or 0) > shown.get(name, 0):
                data = self.store.read_bytes(*folder, name)
                yield data[shown.get(name, 0) :].decode(errors="replace")
                shown[name] = len(data)

    def note(self, job_id: str, number: int, what: str, **facts: Any) -> None:
        """Write an event."""
        at = time.time()
        key = ("jobs", job_id, f"a{number}", "events", f"{round(at * 1000):015d}-{what}.json")
        self.store.write_json({"at": at, "what": what, "facts": facts}, *key)

    def events(self, job_id: str, number: int) -> list[Event]:
        """Return the events of an attempt, in order."""
        folder = ("jobs", job_id, f"a{number}", "events")
        return [Event(**self.store.read_json(*folder, name)) for name in self.store.list(*folder)]

    def ask_to_end(self, job_id: str, number: int, reason: StopReason) -> None:
        """Request the end of an attempt; its driver reads the request within two seconds. The first reason stays."""
        asked = json_bytes({"at": time.time(), "reason": reason})
        self.store.create_bytes(asked, "jobs", job_id, f"a{number}", "cancel.json")

    def cancel_reason(self, job_id: str, number: int) -> StopReason | None:
        """Return the reason of a requested end; None without a request."""
        asked = self.store.find_bytes("jobs", job_id, f"a{number}", "cancel.json")
        reason: StopReason | None = json.loads(asked)["reason"] if asked is not None else None
        return reason

    def end(self, job_id: str, number: int, ended: AttemptEnd) -> None:
        """Record the end of an attempt. The first record stays."""
        self.store.create_bytes(json_bytes(asdict(ended)), "jobs", job_id, f"a{number}", "ended.json")


def attempt_of(store: JobStore, job_id: str, number: int) -> Attempt:
    """The attempt with its job, as it was recorded."""
    return Attempt(store.job(job_id).job(store.store.uri, store.spec(job_id)), number)


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
        return _end_state(record)
    if seen is None:
        return _unseen_state(record, now)
    if seen.deployment_status in HELD_BACK:
        state: JobState = "suspended" if record.started_at is not None else "queued"
        return DerivedState(state, f"its place holds it back{_stop_note(record)}{_reason_note(seen)}")
    if seen.deployment_status in COMES_UP:
        again = " again" if record.started_at is not None else ""
        why = f"its cluster comes up{again}{_stop_note(record)}{_reason_note(seen)}"
        return _heartbeat_state(record) or DerivedState("pending", why)
    if seen.deployment_status == SERVES:
        return DerivedState("running", f"it serves{_stop_note(record)}{_reason_note(seen)}")
    if seen.job_status == "SUCCEEDED":
        return DerivedState("succeeded", "its place says so; the driver's own word is missing")
    if seen.deployment_status in OVER or seen.job_status in ("FAILED", "STOPPED"):
        return _target_end_state(record, seen)
    if record.silent_s is None:
        return DerivedState("pending", f"it waits for its driver{_stop_note(record)}{_reason_note(seen)}")
    return _heartbeat_state(record) or _lost_state(
        record, f"its driver was last heard {record.silent_s:.0f} s ago{_reason_note(seen)}"
    )


def _end_state(record: AttemptRecord) -> DerivedState:
    ended = record.ended
    assert ended is not None
    if ended.reason == "user":
        return DerivedState("cancelled", f"cancelled by a person{_message_note(ended.message)}")
    if ended.reason is not None:
        return DerivedState("stopped", f"stopped by its limit: {ended.reason}{_message_note(ended.message)}")
    if ended.exit_code == 0:
        return DerivedState("succeeded", "exit code 0")
    if ended.out_of_memory:
        return DerivedState(
            "failed", f"out of memory, exit code {ended.exit_code}{_message_note(ended.message)}", "oom"
        )
    if HEAD_GONE in ended.message:
        return DerivedState("failed", f"the head of its Ray died under it{_message_note(ended.message)}", "lost")
    return DerivedState("failed", ended.message or f"exit code {ended.exit_code}", "failed")


def _unseen_state(record: AttemptRecord, now: float) -> DerivedState:
    heard = _heartbeat_state(record)
    if heard is not None:
        return DerivedState("running", f"{heard.why}{_host_note(record)}, though its place does not show it")
    if record.cancel is not None:
        return _cancelled_state(record)
    if record.silent_s is not None:
        heard_at = f"its driver was last heard {record.silent_s:.0f} s ago{_host_note(record)}"
        return _lost_state(record, f"{heard_at}, and its place does not know it")
    waited_s = now - record.submitted_at
    if waited_s <= ARRIVES_S:
        return DerivedState("submitted", "recorded; its place does not show it yet")
    return DerivedState("lost", f"submitted {waited_s:.0f} s ago, and its place does not know it", "lost")


def _host_note(record: AttemptRecord) -> str:
    """Machine of the driver. Other machines see only the heartbeat of a job that runs with `--target local`."""
    return f" on {record.heartbeat.host}" if record.heartbeat is not None else ""


def _target_end_state(record: AttemptRecord, seen: ObservedState) -> DerivedState:
    """The driver writes its own end before its place can know of one: without it, it died."""
    if record.cancel is not None:
        return _cancelled_state(record)
    if seen.job_status == "STOPPED":
        return DerivedState("cancelled", f"stopped by hand in its place{_reason_note(seen)}")
    if seen.reason.endswith("DeadlineExceeded"):
        return DerivedState("stopped", f"stopped by its place{_reason_note(seen)}")
    if record.silent_s is not None:
        return _lost_state(record, f"its driver died without a word{_reason_note(seen)}")
    return DerivedState(
        "failed", f"its place says {seen.deployment_status or seen.job_status}{_reason_note(seen)}", "failed"
    )


def _heartbeat_state(record: AttemptRecord) -> DerivedState | None:
    """Running, where its driver was heard of late."""
    if record.silent_s is None or record.silent_s > SILENT_S:
        return None
    what = "was heard" if record.heartbeat is not None else "started"
    leaving = "; its machine is being taken away" if record.heartbeat and record.heartbeat.leaving else ""
    return DerivedState(
        "running", f"its driver {what} {record.silent_s:.0f} s ago{leaving}{_stop_note(record)}{_clock_note(record)}"
    )


def _lost_state(record: AttemptRecord, why: str) -> DerivedState:
    if record.heartbeat is not None and record.heartbeat.leaving:
        return DerivedState("lost", f"{why}; its machine was taken away", "preempted")
    return DerivedState("lost", f"{why}{_clock_note(record)}", "lost")


def _cancelled_state(record: AttemptRecord) -> DerivedState:
    if record.cancel == "user":
        return DerivedState("cancelled", "cancelled by a person")
    return DerivedState("stopped", f"stopped by its limit: {record.cancel}")


def _stop_note(record: AttemptRecord) -> str:
    return f"; asked to end: {record.cancel}" if record.cancel else ""


def _clock_note(record: AttemptRecord) -> str:
    off_s = record.clock_off_s
    if abs(off_s) <= CLOCK_OFF_S:
        return ""
    return f"; the clock of its machine is {abs(off_s):.0f} s {'ahead of' if off_s > 0 else 'behind'} this one"


def _message_note(message: str) -> str:
    return f": {message}" if message else ""


def _reason_note(seen: ObservedState) -> str:
    said = ": ".join(part for part in (seen.reason, seen.message.strip()) if part)
    return f" ({said})" if said else ""
