"""Names that point at versions: one small file an alias, replaced atomically.

`point` writes the alias and then looks whether its version is still there; `artifact.remove` hides the version and then
looks whether an alias points at it. Whichever order two processes run in, at least one of them sees the other and
steps back, so no lock is needed and none is left behind by a killed process.
"""

import re
from datetime import UTC, datetime

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from graftwork.artifact_check import MANIFEST_FILE
from graftwork.artifact_manifest import VERSION_PATTERN
from graftwork.errors import ArtifactError
from graftwork.storage import NAME_PATTERN, Store, json_bytes

SUFFIX = ".json"
HISTORY = 20
"""Versions that an alias can be rolled back through."""


class AliasRecord(BaseModel):
    """The content of an alias file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str = Field(pattern=VERSION_PATTERN)
    previous: str | None = None
    """The version before, to which `roll_back` returns."""
    earlier: tuple[str, ...] = ()
    """Those before that one, newest first, up to HISTORY."""
    promoted_at: str


def version_key(task: str, version: str) -> tuple[str, str, str]:
    """Key of a version's folder."""
    return ("adapters", task, version)


def alias_key(task: str, alias: str) -> tuple[str, str, str]:
    """Key of an alias file."""
    return ("aliases", task, alias + SUFFIX)


def check_names(*names: str) -> None:
    """Raise ArtifactError for a task, alias or version that is no plain name (a path, an upper case letter)."""
    for name in names:
        if not re.fullmatch(NAME_PATTERN, name):
            raise ArtifactError(
                f"name {name[:80]!r}", "it is no task, alias or version", f"names match {NAME_PATTERN}", "rename it"
            )


def aliases(store: Store, task: str) -> dict[str, str]:
    """Every alias of a task with the version that it points at, sorted by name."""
    check_names(task)
    names = [name.removesuffix(SUFFIX) for name in store.list("aliases", task) if name.endswith(SUFFIX)]
    return {name: target for name in sorted(names) if (target := read(store, task, name)) is not None}


def read(store: Store, task: str, alias: str) -> str | None:
    """The version that an alias points at, None where there is no such alias. ArtifactError when it is damaged."""
    record = _record(store, task, alias)
    return record.version if record else None


def point(store: Store, task: str, alias: str, version: str) -> None:
    """Let the alias point at a version. ArtifactError when that version is not there, or vanishes meanwhile."""
    check_names(task, alias)
    if re.fullmatch(VERSION_PATTERN, alias):
        raise ArtifactError(f"alias {alias!r}", "it looks like a version", "12 hex digits name a version", "rename it")
    before = _record(store, task, alias)
    if before and before.version == version:
        return
    passed = (before.previous, *before.earlier) if before and before.previous else ()
    _move(store, task, alias, before, version, (before.version, *passed) if before else ())


def before(store: Store, task: str, alias: str) -> str:
    """The version that the alias pointed at before. ArtifactError where there is none."""
    record = _record(store, task, alias)
    if record is None or record.previous is None:
        found = "no such alias" if record is None else f"{record.version} is the first it pointed at"
        raise ArtifactError(f"roll back {task}@{alias}", found, "an alias goes back to the version before",
                            f"name the version: graftwork adapters promote {task}@VERSION {alias}")  # fmt: skip
    return record.previous


def roll_back(store: Store, task: str, alias: str) -> tuple[str, str]:
    """Let the alias point at the version before, as an undo: a second call goes back one further. Returns (old, new).

    Raises ArtifactError where there is no version before, or it was removed; then the alias stands as it was.
    """
    version = before(store, task, alias)
    record = _record(store, task, alias)
    if record is None or record.previous != version:
        raise ArtifactError(f"roll back {task}@{alias}", "it was moved meanwhile", "", "look at it, then try again")
    _move(store, task, alias, record, version, record.earlier)
    return record.version, version


def _move(
    store: Store, task: str, alias: str, before: AliasRecord | None, version: str, passed: tuple[str, ...]
) -> None:
    now = datetime.now(UTC).isoformat(timespec="microseconds")
    previous = passed[0] if passed else None
    record = AliasRecord(version=version, previous=previous, earlier=passed[1:HISTORY], promoted_at=now)
    _write(store, task, alias, record)
    if not store.exists(*version_key(task, version), MANIFEST_FILE):
        _step_back(store, task, alias, record, before)
        raise ArtifactError(
            f"promote {task}@{alias} to {version}",
            "that version was removed meanwhile",
            "an alias points at a version that is there; the alias stands as before",
            "promote another version: graftwork adapters ls",
        )


def _step_back(store: Store, task: str, alias: str, ours: AliasRecord, before: AliasRecord | None) -> None:
    if _record(store, task, alias) != ours:
        return  # somebody promoted after us
    if before is None:
        store.delete(*alias_key(task, alias))
    else:
        _write(store, task, alias, before)


def _write(store: Store, task: str, alias: str, record: AliasRecord) -> None:
    store.write_bytes(json_bytes(record.model_dump(mode="json")), *alias_key(task, alias))


def _record(store: Store, task: str, alias: str) -> AliasRecord | None:
    check_names(task, alias)
    data = store.find_bytes(*alias_key(task, alias))
    if data is None:
        return None
    try:
        return AliasRecord.model_validate_json(data)
    except pydantic.ValidationError:
        raise ArtifactError(
            f"alias {task}@{alias}",
            "its file is damaged",
            "an alias file names one version",
            f"delete {store.path(*alias_key(task, alias))} and promote again",
        ) from None
