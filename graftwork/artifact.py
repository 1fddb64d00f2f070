"""Adapters: published whole or not at all, named by their content, found by alias, never unpickled.

    adapters/<task>/<version>/{adapter_config.json, adapter_model.safetensors, manifest.json}
    aliases/<task>/<alias>.json

The manifest is created last and only once, so a version is visible exactly when it is whole, on a disk and on S3 alike.
A version is a digest of its content, so two publishers of the same content write the same bytes and need no lock.
"""

import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from pathlib import Path

from graftwork import artifact_alias, artifact_check, artifact_manifest, extra_tokens
from graftwork.artifact_alias import aliases, before, check_names, roll_back, version_key
from graftwork.artifact_check import MANIFEST_FILE
from graftwork.artifact_listing import list_adapters
from graftwork.artifact_manifest import AdapterManifest, FileEntry
from graftwork.artifact_read import (
    UnknownAdapter,
    locate,
    open_adapter,
    open_sound,
    read_files,
    require_sound,
    resolve,
    sha256,
    unknown,
    verify,
)
from graftwork.errors import ArtifactError
from graftwork.rope import mark_of
from graftwork.storage import Store, json_bytes

__all__ = [
    "AdapterManifest",
    "FileEntry",
    "UnknownAdapter",
    "adopt",
    "aliases",
    "before",
    "fetch",
    "list_adapters",
    "locate",
    "open_adapter",
    "promote",
    "publish",
    "remove",
    "require_base",
    "resolve",
    "roll_back",
    "verify",
]

_PUBLISH_ATTEMPTS = 3

log = logging.getLogger("graftwork.artifact")


def publish(
    store: Store,
    task: str,
    folder: Path,
    *,
    base_digest: str,
    quant: Mapping[str, object],
    template_digest: str,
    tokenizer_digest: str,
    method: Mapping[str, object],
    prompt: Mapping[str, object],
    data_fingerprint: str,
    metrics: Mapping[str, float],
    run: str,
    provenance: Mapping[str, object],
    parent: str | None = None,
    merged_from: Sequence[str] = (),
    alias: str | None = None,
    template_date: date | None = None,
) -> AdapterManifest:
    """Make a PEFT folder a version of `task`, then point `alias` at it. Returns what is published.

    Publishing equal content again changes nothing but the alias and returns the manifest of the first time; a version
    found damaged is written again, with a warning. Killed at any moment it leaves the version whole or invisible.
    Raises ArtifactError (the folder, a name, NaN in weights or metrics), StorageError (disk full, store unreachable).
    """
    check_names(task, *([alias] if alias else []))
    files = artifact_check.read_folder(folder)
    entries = {name: {"sha256": sha256(data), "size_bytes": len(data)} for name, data in files.items()}
    manifest = artifact_manifest.build(
        task,
        {
            "base_digest": base_digest,
            "quant": quant,
            "template_digest": template_digest,
            "tokenizer_digest": tokenizer_digest,
            "method": method,
            "prompt": prompt,
            "template_date": template_date.isoformat() if template_date else None,
            "files": entries,
            "data_fingerprint": data_fingerprint,
            "metrics": {name: float(value) for name, value in metrics.items()},
            "run": run,
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "provenance": provenance,
            "parent": parent,
            "merged_from": list(merged_from),
        },
    )
    published = _make_visible(store, manifest, files)
    if alias:
        promote(store, task, alias, published.version)
    return published


def adopt(store: Store, manifest: AdapterManifest, files: Mapping[str, bytes]) -> AdapterManifest:
    """Make a version that was published elsewhere, its files checked, one of this store. Returns what stands here.

    One that is here already stays, or is written again where it is damaged. Raises ArtifactError, StorageError.
    """
    check_names(manifest.task, manifest.version)
    return _make_visible(store, manifest, files)


def fetch(store: Store, task: str, version: str) -> Path:
    """Folder on this machine that holds the verified version: the store's own, or for S3 a copy in the cache.

    Raises ArtifactError when any byte differs from the manifest.
    """
    manifest = open_adapter(store, task, version)
    if store.is_local:
        require_sound(manifest, read_files(store, manifest))
        return store.local_dir(*version_key(task, manifest.version))
    cache = Store(str(store.local_dir()))
    if not _is_cached(cache, manifest):
        files = read_files(store, manifest)
        require_sound(manifest, files)
        _write(cache, manifest, files, replace=True)
    return cache.local_dir(*version_key(task, manifest.version))


def promote(store: Store, task: str, alias: str, version: str) -> None:
    """Let `task@alias` point at a version (or at where another alias points). Readers see the old one or the new.

    Raises ArtifactError: unknown or damaged version, an alias that looks like a version.
    """
    check_names(task, alias)
    artifact_alias.point(store, task, alias, open_adapter(store, task, version).version)


def require_base(manifest: AdapterManifest, base_digest: str) -> None:
    """Raise ArtifactError unless the adapter was trained on this very base."""
    (weights, stretch), (own_weights, own_stretch) = mark_of(base_digest), mark_of(manifest.base_digest)
    rows, own_rows = extra_tokens.count_of(base_digest), extra_tokens.count_of(manifest.base_digest)
    if weights == own_weights and stretch == own_stretch and rows != own_rows:
        raise ArtifactError(
            f"adapter {manifest.ref}",
            f"it was trained with base.extra_tokens={own_rows}, this base has {rows}",
            "an adapter's trained rows lie behind those of the base",
            f"set base.extra_tokens={own_rows}, or serve it on an endpoint of its own",
        )
    if weights == own_weights and stretch != own_stretch:
        raise ArtifactError(
            f"adapter {manifest.ref}",
            f"it was trained with RoPE scaling {own_stretch}, this base has {stretch}",
            "all requests of an endpoint share one set of rotations",
            f"set base.rope_scaling as in run {manifest.run}, or serve it on an endpoint of its own",
        )
    if manifest.base_digest != base_digest:
        raise ArtifactError(
            f"adapter {manifest.ref}",
            f"it was trained on base {manifest.base_digest}, this base is {base_digest}",
            "an adapter works only on the weights and tokenizer that it was trained on",
            f"set base: to the model of run {manifest.run}, or train {manifest.task} again on this base",
        )


def remove(store: Store, task: str, version: str) -> None:
    """Delete a version. Refused (ArtifactError) while an alias points at it, also when that happens meanwhile."""
    check_names(task, version)
    key = version_key(task, version)
    if not store.exists(*key):
        raise unknown(store, task, version)
    _require_unused(store, task, version)
    manifest = store.find_bytes(*key, MANIFEST_FILE)
    store.delete(*key, MANIFEST_FILE)  # invisible first; `promote` writes its alias first and then looks here
    try:
        _require_unused(store, task, version)
    except ArtifactError:
        if manifest is not None:
            store.create_bytes(manifest, *key, MANIFEST_FILE)
        raise
    store.delete(*key)


def _make_visible(store: Store, manifest: AdapterManifest, files: Mapping[str, bytes]) -> AdapterManifest:
    """Write until the version reads back sound: a `remove` or a bad disk may be at work at the same time."""
    for _ in range(_PUBLISH_ATTEMPTS):
        damaged: list[str] = []
        if store.exists(*version_key(manifest.task, manifest.version), MANIFEST_FILE):
            damaged = verify(store, manifest.task, manifest.version)
            if not damaged:
                return open_adapter(store, manifest.task, manifest.version)
            log.warning("%s is damaged (%s): written again", manifest.ref, "; ".join(damaged))
        _write(store, manifest, files, replace=bool(damaged))
    return open_sound(store, manifest.task, manifest.version)


def _write(store: Store, manifest: AdapterManifest, files: Mapping[str, bytes], *, replace: bool) -> None:
    """Files first, manifest last. `replace` overwrites a manifest and deletes what does not belong there."""
    key = version_key(manifest.task, manifest.version)
    for name, data in files.items():
        store.write_bytes(data, *key, name)
    text = json_bytes(manifest.model_dump(mode="json"))
    if not replace:
        store.create_bytes(text, *key, MANIFEST_FILE)
        return
    store.write_bytes(text, *key, MANIFEST_FILE)
    for name in store.children(*key).keys() - {*files, MANIFEST_FILE}:
        store.delete(*key, name)


def _is_cached(cache: Store, manifest: AdapterManifest) -> bool:
    known = cache.exists(*version_key(manifest.task, manifest.version), MANIFEST_FILE)
    return known and not verify(cache, manifest.task, manifest.version)


def _require_unused(store: Store, task: str, version: str) -> None:
    names = [alias for alias, target in aliases(store, task).items() if target == version]
    if names:
        raise ArtifactError(
            f"remove {task}@{version}",
            f"{', '.join(names)} points at it",
            "a version that an alias points at stays",
            f"move the alias first: graftwork adapters promote {task}@OTHER {names[0]}",
        )
