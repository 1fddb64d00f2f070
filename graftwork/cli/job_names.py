"""Which job a person means: its id, an attempt's, the beginning of one, or the bare name."""

import difflib
import re

from graftwork.cluster.backend import DIGEST_CHARS
from graftwork.cluster.run_store import JobStore
from graftwork.errors import ConfigError

_ATTEMPT = re.compile(r"^(?P<job>.+)-a(?P<number>[1-9][0-9]*)$")
_ID = re.compile(rf"^(?P<name>.+)-[0-9a-f]{{{DIGEST_CHARS}}}$")


def job_called(runs: JobStore, said: str) -> tuple[str, int | None]:
    """The job's id, and the attempt where one was named. A bare name is its latest job.

    Raises ConfigError for none (naming the nearest) and for several.
    """
    ids = runs.job_ids()
    attempt = _ATTEMPT.match(said)
    if attempt and (whole := _whole(runs, attempt["job"], ids)) is not None:
        return whole, _existing(runs, whole, int(attempt["number"]))
    if (whole := _whole(runs, said, ids)) is not None:
        return whole, None
    begun = [job_id for job_id in ids if said and job_id.startswith(said)]
    if len(begun) == 1:
        return begun[0], None
    if begun:
        rule = "JOB is an id, an attempt's, a beginning that is one job's alone, or a whole name"
        raise ConfigError(
            f"JOB {said}", f"{len(begun)} jobs begin so: {', '.join(begun[:5])}", rule, "write more of it"
        )
    raise _unknown(runs, said, ids)


def _whole(runs: JobStore, said: str, ids: list[str]) -> str | None:
    """Of an id or a bare name."""
    named = [said] if said in ids else [job_id for job_id in ids if _name(job_id) == said]
    return max(named, key=lambda job_id: runs.job(job_id).created_at) if named else None


def _existing(runs: JobStore, job_id: str, number: int) -> int:
    attempts = runs.attempts(job_id)
    if number not in attempts:
        known = ", ".join(map(str, attempts)) or "none"
        raise ConfigError(f"JOB {job_id}-a{number}", f"it has no attempt {number}", f"its attempts: {known}")
    return number


def _name(job_id: str) -> str:
    found = _ID.match(job_id)
    return found["name"] if found else job_id


def _unknown(runs: JobStore, said: str, ids: list[str]) -> ConfigError:
    near = difflib.get_close_matches(said, [*ids, *{_name(job_id) for job_id in ids}], n=1, cutoff=0.5)
    holds = f"the store {runs.store.uri} has {len(ids)} jobs and none of that name" if ids else (
        f"the store {runs.store.uri} has no jobs")  # fmt: skip
    return ConfigError(
        f"JOB {said}", f"{holds}; did you mean {near[0]!r}?" if near else holds,
        "--root (or GRAFTWORK_ROOT, or storage.uri in cluster.yaml) is the store that the job was submitted to",
        "graftwork jobs ls, there",
    )  # fmt: skip
