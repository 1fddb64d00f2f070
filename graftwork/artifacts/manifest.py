"""Manifests and aliases of adapters: the record of a version, and one small file an alias, replaced atomically.

A version is the digest of its manifest's content.

`point_alias` writes the alias and then looks whether its version is still there; `publish.remove` hides the version and
then looks whether an alias points at it. Whichever order two processes run in, at least one of them sees the other and
steps back, so no lock is needed and none is left behind by a killed process.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from datetime import UTC, date, datetime
from typing import Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue

from graftwork.artifacts.verify import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE, is_adapter_file
from graftwork.config import canonical_json
from graftwork.errors import ArtifactError
from graftwork.storage.store import NAME_PATTERN, Store

VERSION_PATTERN = r"^[0-9a-f]{12}$"
_DIGEST_PATTERN = r"^[A-Za-z0-9:._-]{1,128}$"
_CONTENT = ("base_digest", "quant", "template_digest", "tokenizer_digest", "prompt", "files")


class FileEntry(BaseModel):
    """Digest and size of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0)


class AdapterManifest(BaseModel):
    """One adapter version: what decides its answers, and from `task` on the facts of how it came to be."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format: Literal[1] = 1
    version: str = Field(pattern=VERSION_PATTERN)
    """`content_version` of this manifest, unless somebody changed it."""
    base_digest: str = Field(pattern=_DIGEST_PATTERN)
    """The base model that the adapter was trained on and works on."""
    quant: dict[str, JsonValue]
    """Quantization of the base in training (QuantSpec)."""
    template_digest: str = Field(pattern=_DIGEST_PATTERN)
    tokenizer_digest: str = Field(pattern=_DIGEST_PATTERN)
    prompt: dict[str, JsonValue]
    """The prompt that it was trained with (PromptSpec)."""
    template_date: date | None = None
    """The day that the chat template wrote as today's in training, and writes in serving; null: it writes no date."""
    files: dict[str, FileEntry]

    task: str = Field(pattern=NAME_PATTERN)
    method: dict[str, JsonValue]
    """The adapter's spec (LoraSpec, ...), and `objective`: the kind of finetuning."""
    data_fingerprint: str
    """Digest of the training rows."""
    metrics: dict[str, FiniteFloat]
    """Measured in training."""
    run: str
    """The run that made it."""
    created_at: str
    """UTC, ISO 8601."""
    provenance: dict[str, JsonValue]
    """`provenance.collect` of the run."""
    parent: str | None = None
    """The version of this task that this one was trained from, or `task@version` of another."""
    merged_from: tuple[str, ...] = ()
    """`task@version` of each that this one was merged from."""

    @pydantic.field_validator("files")
    @classmethod
    def _only_adapter_files(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        wrong = [name[:80] for name in files if not is_adapter_file(name)]
        if wrong or not {CONFIG_FILE, WEIGHTS_FILE} <= set(files):
            raise ValueError(f"needs {CONFIG_FILE} and {WEIGHTS_FILE}, may not name {wrong}")
        return files

    @property
    def ref(self) -> str:
        """`task@version`."""
        return f"{self.task}@{self.version}"


def content_version(fields: Mapping[str, object]) -> str:
    """First 12 hex digits of a sha256 over what decides the answers: file digests, base, quant, tokenizer, prompt, and
    the template's date where it writes one."""
    content = {key: fields[key] for key in _CONTENT}
    if fields.get("template_date") is not None:
        content["template_date"] = fields["template_date"]
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()[:12]


def build_manifest(task: str, fields: Mapping[str, object]) -> AdapterManifest:
    """A manifest from plain fields, its version derived. Raises ArtifactError, e.g. for a metric that is NaN."""
    plain = json.loads(canonical_json({"task": task, **fields}))
    return parse_manifest(f"manifest of {task}", {"version": content_version(plain), **plain})


def parse_manifest(asked: str, source: bytes | Mapping[str, object]) -> AdapterManifest:
    """A manifest from its JSON or its fields. `asked` begins the ArtifactError of one that does not hold."""
    try:
        if isinstance(source, bytes):
            return AdapterManifest.model_validate_json(source)
        return AdapterManifest.model_validate(source)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "JSON"
        raise ArtifactError(
            asked,
            f"its manifest is not valid at {where}: {first['msg']}",
            "a manifest has exactly the fields of format 1",
            "publish the adapter again",
        ) from None


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
    records = {name: read_alias(store, task, name) for name in sorted(names)}
    return {name: record.version for name, record in records.items() if record is not None}


def point_alias(store: Store, task: str, alias: str, version: str) -> None:
    """Let the alias point at a version. ArtifactError when that version is not there, or vanishes meanwhile."""
    check_names(task, alias)
    if re.fullmatch(VERSION_PATTERN, alias):
        raise ArtifactError(f"alias {alias!r}", "it looks like a version", "12 hex digits name a version", "rename it")
    old = read_alias(store, task, alias)
    if old and old.version == version:
        return
    passed = (old.previous, *old.earlier) if old and old.previous else ()
    _move_alias(store, task, alias, old, version, (old.version, *passed) if old else ())


def before(store: Store, task: str, alias: str) -> str:
    """The version that the alias pointed at before. ArtifactError where there is none."""
    record = read_alias(store, task, alias)
    if record is None or record.previous is None:
        found = "no such alias" if record is None else f"{record.version} is the first it pointed at"
        raise ArtifactError(
            f"roll back {task}@{alias}",
            found,
            "an alias goes back to the version before",
            f"name the version: graftwork adapters promote {task}@VERSION {alias}",
        )
    return record.previous


def roll_back(store: Store, task: str, alias: str) -> tuple[str, str]:
    """Let the alias point at the version before, as an undo: a second call goes back one further. Returns (old, new).

    Raises ArtifactError where there is no version before, or it was removed; then the alias is unchanged.
    """
    version = before(store, task, alias)
    record = read_alias(store, task, alias)
    if record is None or record.previous != version:
        raise ArtifactError(f"roll back {task}@{alias}", "it was moved meanwhile", "", "look at it, then try again")
    _move_alias(store, task, alias, record, version, record.earlier)
    return record.version, version


def _move_alias(
    store: Store, task: str, alias: str, old: AliasRecord | None, version: str, passed: tuple[str, ...]
) -> None:
    now = datetime.now(UTC).isoformat(timespec="microseconds")
    previous = passed[0] if passed else None
    record = AliasRecord(version=version, previous=previous, earlier=passed[1:HISTORY], promoted_at=now)
    key = alias_key(task, alias)
    store.write_json(record.model_dump(mode="json"), *key)
    if store.exists(*version_key(task, version), MANIFEST_FILE):
        return
    if read_alias(store, task, alias) == record:  # else another process promoted after us
        if old is None:
            store.delete(*key)
        else:
            store.write_json(old.model_dump(mode="json"), *key)
    raise ArtifactError(
        f"promote {task}@{alias} to {version}",
        "that version was removed meanwhile",
        "an alias points at a published version; the alias is unchanged",
        "promote another version: graftwork adapters ls",
    )


def read_alias(store: Store, task: str, alias: str) -> AliasRecord | None:
    """The content of an alias file, None where there is no such alias. ArtifactError when it is damaged."""
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
