"""`JobBackend` over a target and a job store: submission, fencing, status, logs and retries, for all targets."""

import contextlib
import difflib
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

import yaml

from graftwork.cluster.jobs.inputs import send
from graftwork.cluster.jobs.models import (
    Attempt,
    Finding,
    Job,
    JobPlan,
    JobStatus,
    JobTarget,
    ObservedState,
    TargetMachines,
    attempt_id,
    refuse,
)
from graftwork.cluster.jobs.store import (
    HEARTBEAT_S,
    SAVES,
    AttemptEnd,
    AttemptRecord,
    JobRecord,
    JobStore,
    StopReason,
    attempt_of,
    derive_state,
)
from graftwork.cluster.spec import ClusterSpec, quantity
from graftwork.errors import ClusterError, ConfigError, PreflightError, RunError, StorageError, StoreUnreachable
from graftwork.storage.store import Store, json_bytes

# Cost of a cluster by the user's price table: per hour, of a job as predicted, of a job at most.


def usd_per_hour(cluster: ClusterSpec) -> float | None:
    """Price of head and workers; None without prices, or where a GPU has none: its share would count as free."""
    prices = cluster.prices
    if prices is None or unpriced(cluster):
        return None
    usd = quantity(cluster.head.cpu) * prices.cpu_hour
    for group in cluster.workers:
        gpu_hour = prices.gpu_hour.get(group.gpu_type or "", prices.gpu_hour.get("default", 0.0))
        hour = quantity(group.cpu) * prices.cpu_hour + group.gpu * gpu_hour
        usd += group.count * hour * (prices.spot_factor if group.spot else 1.0)
    return usd


def unpriced(cluster: ClusterSpec) -> list[int]:
    """Numbers of the worker groups whose GPUs the price table does not have."""
    known = cluster.prices.gpu_hour if cluster.prices is not None else {}
    return [
        number
        for number, group in enumerate(cluster.workers)
        if group.gpu and (group.gpu_type or "") not in known and "default" not in known
    ]


def predicted_usd(job: Job) -> float | None:
    """None without prices or without a predicted time."""
    hour = usd_per_hour(job.cluster)
    return None if hour is None or job.demand.seconds is None else hour * job.demand.seconds / 3600


def most_usd(cluster: ClusterSpec) -> float | None:
    """By the budget or the deadline, whichever stops it first; None where neither does."""
    hour, limits = usd_per_hour(cluster), cluster.limits
    by_deadline = [hour * limits.deadline / 3600] if hour is not None and limits.deadline is not None else []
    bounds = [*by_deadline, *([limits.budget_usd] if limits.budget_usd is not None else [])]
    return min(bounds, default=None)


# Probe of a store before anything else is written: write, read, conditional put, delete.


def probe_store(root: str) -> list[Finding]:
    """Return the problems of a store on S3, found with a small object that is removed again. Targets check folders."""
    store = Store(root)
    if store.is_local:
        return []
    where, key, first = f"root {store.uri}", f"probe-{secrets.token_hex(8)}.json", json_bytes({"probe": 1})
    unconditional = ""
    try:
        if not store.create_bytes(first, key) or store.create_bytes(json_bytes({"probe": 2}), key):
            unconditional = "a second put of one key with If-None-Match: * was taken"
        elif store.find_bytes(key) != first:
            return [
                refuse(
                    "STORE-READS-ANOTHER",
                    where,
                    "what was written is not what is read",
                    "a job's record is read as it was written",
                    "look at what caches it",
                )
            ]
    except StorageError as error:
        code, problem, rule = "STORE-FAILS", f"{error.subject}: {error.problem}", error.rule
        if isinstance(error, StoreUnreachable):
            code, problem, rule = "STORE-UNREACHABLE", error.problem, "all of a job reach its store"
        elif isinstance(error.__cause__, PermissionError):
            code, rule = "STORE-DENIED", "a job reads, writes, lists and deletes below its root"
        if code != "STORE-FAILS" or "NotImplemented" not in error.problem:
            return [refuse(code, where, problem, rule, error.hint)]
        unconditional = "it knows no put with If-None-Match: *"
    finally:
        with contextlib.suppress(StorageError):  # the probe has found it, or the owner of the store finds it
            store.delete(key)
    if not unconditional:
        return []
    return [
        refuse(
            "STORE-NO-CONDITIONAL-PUT",
            where,
            unconditional,
            "of all who start an attempt one must win",
            "use a server that knows conditional puts, as S3 does since 2024",
        )
    ]


POLL_INTERVAL_S = 1.0
CLEAN_END_S = 5.0
"""How long a driver that is asked to end may take before its place removes it."""
SAVED_END_S = 30.0
"""The same, where it makes a checkpoint first."""
SURE_S = 3 * HEARTBEAT_S
"""How long a job looks lost before those who wait for it or follow it go by that."""


class StoredBackend:
    """`JobBackend` of one place and one store. Cheap to build: nothing is reached before the first verb."""

    def __init__(self, place: JobTarget, root: str) -> None:
        self.place, self.runs, self.on = place, JobStore(root), place.on

    def machines(self, cluster: ClusterSpec) -> TargetMachines:
        return self.place.machines(cluster)

    def plan(self, job: Job, *, reachable: bool = True) -> JobPlan:
        """What `submit` would do. Writes nothing that stays. `reachable` False: without the answers of the target."""
        store = probe_store(self.runs.store.uri)
        number = 0 if store else max(self.runs.attempts(job.job_id), default=0)
        attempt, cluster, seconds = Attempt(job, number or 1), job.cluster, job.demand.seconds
        objects = tuple(self.place.objects(attempt))
        old, new = (
            yaml.safe_dump_all([dict(one) for one in part], sort_keys=True).splitlines()
            for part in (self.place.current(attempt) if reachable else (), objects)
        )
        return JobPlan(
            job.job_id,
            attempt.number,
            exists=number > 0,
            cpus=cluster.cpus,
            gpus=cluster.gpus,
            memory_bytes=cluster.memory_bytes,
            gpu_hours=None if seconds is None else seconds / 3600 * cluster.gpus,
            usd=predicted_usd(job),
            most_usd=most_usd(cluster),
            objects=objects,
            diff="\n".join(difflib.unified_diff(old, new, "there", "planned", lineterm="")),
            findings=(*store, *(self.place.check(job) if reachable else ())),
        )

    def submit(self, job: Job) -> JobStatus:
        """Start the job, or find it.

        Raises PreflightError before anything is written, ConfigError for a job of another place.
        """
        try:
            started = self.runs.attempts(job.job_id)
        except StorageError:
            raise_errors(job, probe_store(self.runs.store.uri))
            raise
        if started:
            self._require_here(self.runs.job(job.job_id))
            found = self.status(job.job_id)
            if found.state != "submitted" and not (found.state == "lost" and found.started_at is None):
                return found  # else its client was killed before the place had it
        else:
            raise_errors(job, [*probe_store(self.runs.store.uri), *self.place.check(job)])
            for one in job.inputs:
                send(self.runs.store, one)
            self._require_here(self.runs.record(job, self.on))
            self.runs.open_attempt(job.job_id, 1)
        return self._start(attempt_of(self.runs, job.job_id, max(started, default=1)))

    def resubmit(self, job_id: str) -> JobStatus:
        """Start the next attempt of a job that has ended."""
        self._require_here(self.runs.job(job_id))
        status = self.status(job_id)
        if not status.ended:
            raise ConfigError(
                f"resubmit {job_id}",
                f"its attempt {status.attempt} is {status.state}",
                "one attempt at a time",
                f"graftwork jobs cancel {job_id} first, or wait for its end",
            )
        attempt = attempt_of(self.runs, job_id, status.attempt + 1)
        raise_errors(attempt.job, self.place.check(attempt.job))
        self.place.stop(f"{job_id}-a{status.attempt}")  # what a lost one left
        if self.runs.open_attempt(job_id, attempt.number):
            self.runs.note(job_id, attempt.number, "retry", of=status.attempt, was=status.state, cause=status.cause)
        return self._start(attempt)

    def _require_here(self, record: JobRecord) -> None:
        """A job stays in its place: another one could not see whether it runs there."""
        if record.on != self.on:
            raise ConfigError(
                f"job {record.job_id} --target {self.on}",
                f"it was submitted --target {record.on}",
                "a job runs in one place",
                f"--target {record.on}, another name, or another root",
            )

    def _start(self, attempt: Attempt) -> JobStatus:
        self.place.start(attempt)
        status = self.status(attempt.job.job_id)
        if status.attempt == attempt.number and status.ended:  # cancelled meanwhile
            self.place.stop(attempt.id)
        return status

    def status(self, job_id: str) -> JobStatus:
        return self._statuses([self.runs.job(job_id)])[0]

    def list(self) -> Sequence[JobStatus]:
        records = self.runs.jobs()
        mine = [record for record in records if record.on == self.on]
        return sorted(self._statuses(mine), key=lambda status: -(status.submitted_at or 0))

    def _statuses(self, records: Sequence[JobRecord]) -> Sequence[JobStatus]:
        job_ids = [record.job_id for record in records]
        attempts = dict(zip(job_ids, self.runs.of_many(self.runs.latest, job_ids), strict=True))
        alive = {job_id: attempt_id(job_id, a.number) for job_id, a in attempts.items() if a.ended is None}
        names = list(alive.values())
        try:
            seen = self.place.observe(names) if names else {}
        except ClusterError as error:  # out of reach: the heartbeat alone decides
            away = ObservedState(message=f"its place does not answer: {error.problem or error.subject}")
            seen = dict.fromkeys(names, away)
        again = [job_id for job_id, name in alive.items() if name not in seen or seen[name].job_status != "RUNNING"]
        attempts |= zip(again, self.runs.of_many(self.runs.latest, again), strict=True)  # what it wrote before that
        now = time.time()
        return [_status(record, attempts[record.job_id], seen, now) for record in records]

    def _confirm_status(self, job_id: str) -> JobStatus:
        """Its status; lost only where it stays so for `SURE_S`: a driver whose store was away beats again once it is
        back, and until then looks silent."""
        end = time.monotonic() + SURE_S
        while (status := self.status(job_id)).state == "lost" and time.monotonic() < end:
            time.sleep(POLL_INTERVAL_S)
        return status

    def logs(self, job_id: str, *, follow: bool = False, attempt: int | None = None) -> Iterator[str]:
        """What it printed, from the store; with `follow` until it has ended."""
        self.runs.job(job_id)
        shown: dict[int, dict[str, int]] = {}
        while True:
            ended = not follow or self._confirm_status(job_id).ended
            numbers = [attempt] if attempt is not None else self.runs.attempts(job_id)[-1:]
            for number in numbers:
                yield from self.runs.logs(job_id, number, shown.setdefault(number, {}))
            if ended:
                return
            time.sleep(POLL_INTERVAL_S)

    def cancel(self, job_id: str) -> JobStatus:
        """Ask the driver to end, give it `CLEAN_END_S`, then see to it that nothing is left."""
        return self._end(job_id, "user")

    def _end(self, job_id: str, reason: StopReason) -> JobStatus:
        status = self.status(job_id)
        if status.ended and status.state != "lost":
            return status
        number = max(status.attempt, 1)
        if status.attempt == 0:  # its client was killed before it opened one: nothing may start it any more
            self.runs.open_attempt(job_id, number)
        self.runs.ask_to_end(job_id, number, reason)
        if status.state == "running":
            end = time.monotonic() + (SAVED_END_S if status.kind in SAVES else CLEAN_END_S)
            while time.monotonic() < end and not self.status(job_id).ended:
                time.sleep(POLL_INTERVAL_S / 4)
        self.place.stop(f"{job_id}-a{number}")
        self.runs.end(
            job_id, number, AttemptEnd(time.time(), 1, reason, "it was lost" if status.state == "lost" else "")
        )
        return self.status(job_id)

    def wait(self, job_id: str, timeout_s: float | None = None) -> JobStatus:
        """Until it has ended, retrying as `cluster.retry` says; a job that stays pending too long is stopped."""
        began = time.monotonic()
        cluster = self.runs.job(job_id).job(self.runs.store.uri, {}).cluster
        while True:
            status = self._confirm_status(job_id)
            if status.ended:
                if status.cause not in cluster.retry.on or status.attempt >= cluster.retry.max_attempts:
                    return status
                status = self.resubmit(job_id)
            waits = status.state in ("submitted", "pending") and status.submitted_at is not None
            if waits and time.time() - (status.submitted_at or 0) > cluster.limits.pending:
                return self._end(job_id, "pending")
            if timeout_s is not None and time.monotonic() - began > timeout_s:
                raise RunError(
                    f"wait for {job_id}",
                    f"it is {status.state} after {timeout_s:.0f} s",
                    "the job goes on",
                    f"graftwork jobs wait {job_id}",
                )
            time.sleep(POLL_INTERVAL_S)


def raise_errors(job: Job, findings: Sequence[Finding]) -> None:
    """Raise PreflightError with all errors among the findings."""
    errors = [asdict(finding) for finding in findings if finding.level == "error"]
    if errors:
        raise PreflightError(f"{job.kind} {job.name}", errors)


def _status(record: JobRecord, attempt: AttemptRecord, seen: Mapping[str, ObservedState], now: float) -> JobStatus:
    judged = derive_state(attempt, seen.get(f"{record.job_id}-a{attempt.number}"), now)
    ended, beat = attempt.ended, attempt.heartbeat
    return JobStatus(
        record.job_id,
        attempt.number,
        judged.state,
        judged.why,
        ended.exit_code if ended is not None and ended.reason is None else None,
        record.kind,
        record.on,
        attempt.submitted_at,
        attempt.started_at,
        ended.at if ended else None,
        beat.at if beat else None,
        beat.progress if beat else "",
        judged.cause,
    )
