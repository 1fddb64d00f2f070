"""Publication of adapters: whole or not at all, named by their content, never unpickled.

    adapters/<task>/<version>/{adapter_config.json, adapter_model.safetensors, manifest.json}
    aliases/<task>/<alias>.json

The manifest is created last and only once, so a version is visible exactly when it is whole, on a disk and on S3 alike.
A version is a digest of its content, so two publishers of the same content write the same bytes and need no lock.
"""

import hashlib
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime
from pathlib import Path

from graftwork.artifacts.manifest import (
    AdapterManifest,
    FileEntry,
    aliases,
    build_manifest,
    check_names,
    content_version,
    parse_manifest,
    point_alias,
    version_key,
)
from graftwork.artifacts.registry import (
    REPUBLISH,
    UnknownAdapter,
    open_adapter,
    open_sound,
    read_files,
    require_sound,
    unknown,
    verify_adapter,
)
from graftwork.artifacts.verify import MANIFEST_FILE, MAX_TEXT_BYTES, is_adapter_file, read_folder
from graftwork.base.source import parse_digest
from graftwork.errors import ArtifactError
from graftwork.storage.local import file_sha256, tmp_name
from graftwork.storage.store import Store, json_bytes

_PUBLISH_ATTEMPTS = 3

log = logging.getLogger("graftwork.artifacts.publish")


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
    require_current: Callable[[], None] = lambda: None,
) -> AdapterManifest:
    """Make a PEFT folder a version of `task`, then point `alias` at it. Returns what is published.

    Publishing equal content again changes nothing but the alias and returns the manifest of the first time; a version
    found damaged is written again, with a warning. Killed at any moment it leaves the version whole or invisible.
    `require_current` is called directly before the manifest is written and before the alias moves; it raises where the
    caller has been replaced.
    Raises ArtifactError (the folder, a name, NaN in weights or metrics), StorageError (disk full, store unreachable).
    """
    check_names(task, *([alias] if alias else []))
    files = read_folder(folder)
    manifest = build_manifest(
        task,
        {
            "base_digest": base_digest,
            "quant": quant,
            "template_digest": template_digest,
            "tokenizer_digest": tokenizer_digest,
            "method": method,
            "prompt": prompt,
            "template_date": template_date.isoformat() if template_date else None,
            "files": {
                name: {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
                for name, data in files.items()
            },
            "data_fingerprint": data_fingerprint,
            "metrics": {name: float(value) for name, value in metrics.items()},
            "run": run,
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "provenance": provenance,
            "parent": parent,
            "merged_from": list(merged_from),
        },
    )
    published = adopt(store, manifest, files, require_current)
    if alias:
        require_current()
        promote(store, task, alias, published.version)
    return published


def adopt(
    store: Store,
    manifest: AdapterManifest,
    files: Mapping[str, bytes],
    require_current: Callable[[], None] = lambda: None,
) -> AdapterManifest:
    """Add a version to this store, its files checked. Returns the manifest of this store.

    A version that is here already stays; a damaged one is written again. It is written until it reads back sound: a
    `remove` or a bad disk may be at work at the same time. Raises ArtifactError, StorageError.
    """
    check_names(manifest.task, manifest.version)
    for _ in range(_PUBLISH_ATTEMPTS):
        is_damaged = False
        if store.exists(*version_key(manifest.task, manifest.version), MANIFEST_FILE):
            try:
                return open_sound(store, manifest.task, manifest.version)
            except UnknownAdapter:  # removed meanwhile
                pass
            except ArtifactError as error:
                is_damaged = True
                log.warning("%s is damaged (%s): written again", manifest.ref, error.problem)
        _write(store, manifest, files, require_current, replace=is_damaged)
    return open_sound(store, manifest.task, manifest.version)


def fetch(store: Store, task: str, version: str) -> Path:
    """Folder on this machine that holds the verified version: the store's own, or for S3 a copy in the cache.

    Raises ArtifactError when any byte differs from the manifest.
    """
    manifest = open_adapter(store, task, version)
    if store.is_local:
        require_sound(manifest, read_files(store, manifest))
        return store.local_dir(*version_key(task, manifest.version))
    cache = Store(str(store.local_dir()))
    known = cache.exists(*version_key(task, manifest.version), MANIFEST_FILE)
    if not known or verify_adapter(cache, task, manifest.version):
        files = read_files(store, manifest)
        require_sound(manifest, files)
        _write(cache, manifest, files, replace=True)
    return cache.local_dir(*version_key(task, manifest.version))


def promote(store: Store, task: str, alias: str, version: str) -> None:
    """Let `task@alias` point at a version (or at where another alias points). Readers see the old one or the new.

    Raises ArtifactError: unknown or damaged version, an alias that looks like a version.
    """
    check_names(task, alias)
    point_alias(store, task, alias, open_adapter(store, task, version).version)


def require_base(manifest: AdapterManifest, base_digest: str) -> None:
    """Raise ArtifactError unless the adapter was trained on this very base."""
    weights, stretch, rows = parse_digest(base_digest)
    own_weights, own_stretch, own_rows = parse_digest(manifest.base_digest)
    if weights == own_weights and stretch == own_stretch and rows != own_rows:
        raise ArtifactError(
            f"adapter {manifest.ref}",
            f"it was trained with base.extra_tokens={own_rows}, this base has {rows}",
            "an adapter's trained rows follow those of the base",
            f"set base.extra_tokens={own_rows}, or serve it on an endpoint of its own",
        )
    if weights == own_weights and stretch != own_stretch:
        raise ArtifactError(
            f"adapter {manifest.ref}",
            f"it was trained with RoPE scaling {own_stretch}, this base has {stretch}",
            "all requests of an endpoint share one set of rotations",
            f"set base.rope_scaling as in run {manifest.run}, or serve it on an endpoint of its own",
        )
    plain, own_plain = (digest.partition(".template-")[0] for digest in (base_digest, manifest.base_digest))
    if plain == own_plain and manifest.base_digest != base_digest:
        raise ArtifactError(
            f"adapter {manifest.ref}",
            "it was trained with another chat template of this base",
            "an adapter answers prompts of the template that it was trained with",
            f"set base.chat_template as in run {manifest.run}",
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


def _write(
    store: Store,
    manifest: AdapterManifest,
    files: Mapping[str, bytes],
    require_current: Callable[[], None] = lambda: None,
    *,
    replace: bool,
) -> None:
    """Files first, manifest last. `replace` overwrites a manifest and deletes what does not belong there."""
    key = version_key(manifest.task, manifest.version)
    for name, data in files.items():
        store.write_bytes(data, *key, name)
    text = json_bytes(manifest.model_dump(mode="json"))
    require_current()
    if not replace:
        store.create_bytes(text, *key, MANIFEST_FILE)
        return
    store.write_bytes(text, *key, MANIFEST_FILE)
    for name in store.children(*key).keys() - {*files, MANIFEST_FILE}:
        store.delete(*key, name)


def _require_unused(store: Store, task: str, version: str) -> None:
    names = [alias for alias, target in aliases(store, task).items() if target == version]
    if names:
        raise ArtifactError(
            f"remove {task}@{version}",
            f"{', '.join(names)} points at it",
            "a version that an alias points at stays",
            f"move the alias first: graftwork adapters promote {task}@OTHER {names[0]}",
        )


# `bring` reads no file that is here already: the loader of the weights compares the bytes that it uses with the
# manifest, and `discard_damaged` removes a bad copy. A download streams into a temporary file, is compared there and
# renamed afterwards: no reader sees half a file, and a full disk leaves nothing behind.


def bring(store: Store, manifest: AdapterManifest) -> Path:
    """Folder here that holds the version's files, each of the manifest's size. Blocks.

    Raises ArtifactError (a file is gone, a link, of another size or, after a download, of another content) and
    StorageError (no space, the store is out of reach).
    """
    key = version_key(manifest.task, manifest.version)
    folder = store.local_dir(*key)
    for name, entry in manifest.files.items():
        if _is_here(folder / name, entry):
            continue
        if store.is_local:
            found = f"{name} is missing, a link, or not {entry.size_bytes} bytes long"
            rule = "a version holds exactly the files of its manifest"
            raise ArtifactError(f"adapter folder {folder}", found, rule, REPUBLISH)
        _download(store, manifest, name, folder / name)
    return folder


def discard_damaged(store: Store, manifest: AdapterManifest) -> None:
    """Removes what is not as published from the cached copy. A local root is its owner's: nothing is removed there."""
    if store.is_local:
        return
    folder = store.local_dir(*version_key(manifest.task, manifest.version))
    for name, entry in manifest.files.items():
        path = folder / name
        if path.is_file() and file_sha256(path) != entry.sha256:
            path.unlink(missing_ok=True)


def _download(store: Store, manifest: AdapterManifest, name: str, target: Path) -> None:
    entry = manifest.files[name]
    tmp = target.parent / tmp_name()
    try:
        store.download_file(tmp, *version_key(manifest.task, manifest.version), name)
        if file_sha256(tmp) != entry.sha256:
            found = f"{name}: sha256 differs from the manifest's"
            raise ArtifactError(f"adapter {manifest.ref}", found, "every byte is as published", REPUBLISH)
        os.replace(tmp, target)
    finally:
        tmp.unlink(missing_ok=True)


def _is_here(path: Path, entry: FileEntry) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size == entry.size_bytes


# `register` copies a version of another store. Its folder must be under an allowed root and contain only
# `adapter_config.json`, `manifest.json` and `*.safetensors`. Names and sizes come from the listing, and the manifest is
# checked (ids, base, content digest) before any weights are read; their bytes are then compared with it, and their
# headers and shapes with the config.


_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_NEXT = "publish it with `graftwork train`, or copy a whole adapters/TASK/VERSION folder"


def allowed_place(uri: str, roots: Sequence[str]) -> tuple[Store, tuple[str, ...]]:
    """Return the root that contains `uri`, and the key below it. Raises ArtifactError for any other place.

    What follows the root is plain names between single slashes: no `..`, no percent sign, no link on the way.
    """
    for root in roots:
        store = Store(root)
        prefix = store.uri.rstrip("/") + "/"
        written = uri.removeprefix("file://") if store.is_local else uri
        if not written.startswith(prefix):
            continue
        parts = tuple(written.removeprefix(prefix).split("/"))
        if all(_PART.fullmatch(part) for part in parts):
            _refuse_links(store, parts)
            return store, parts
    raise ArtifactError(
        f"adapter at {uri[:200]!r}",
        "it is under none of the allowed roots, or its path isn't plain",
        f"adapters are taken from {', '.join(roots)}; below, names match {_PART.pattern}",
        "add its root to adapter_roots of the serve spec",
    )


def take(
    store: Store,
    uri: str,
    roots: Sequence[str],
    *,
    base_digest: str,
    max_bytes: int,
    check: Callable[[AdapterManifest, Mapping[str, bytes]], None],
) -> AdapterManifest:
    """Make the version at `uri` one of the store's. One that is there already is checked as well, and stays.

    check: called with the sound files before anything is written; raises what refuses them. Raises ArtifactError that
    says what is wrong, StorageError (out of reach, no space); then the store is as before.
    """
    source, parts = allowed_place(uri, roots)
    manifest = _manifest(source, parts, uri)
    require_base(manifest, base_digest)
    size = sum(entry.size_bytes for entry in manifest.files.values())
    if size > max_bytes:
        raise ArtifactError(f"adapter at {uri}", f"{size} bytes", f"an adapter has at most {max_bytes} bytes here")
    files = {name: source.read_bytes(*parts, name) for name in manifest.files}
    require_sound(manifest, files)
    check(manifest, files)
    return adopt(store, manifest, files)


def _manifest(source: Store, parts: tuple[str, ...], uri: str) -> AdapterManifest:
    """The manifest of a folder whose listing agrees with it; nothing else has been read."""
    sizes = source.children(*parts)
    asked = f"adapter at {uri}"
    strange = sorted(n for n in sizes if n != MANIFEST_FILE and not is_adapter_file(n))
    if strange or MANIFEST_FILE not in sizes:
        found = f"{strange[0][:80]} does not belong there" if strange else f"no {MANIFEST_FILE}"
        raise ArtifactError(asked, found, f"a place holds {MANIFEST_FILE} and the files it names alone", _NEXT)
    if (sizes[MANIFEST_FILE] or 0) > MAX_TEXT_BYTES:
        raise ArtifactError(asked, f"{MANIFEST_FILE} has {sizes[MANIFEST_FILE]} bytes", f"at most {MAX_TEXT_BYTES}")
    manifest = parse_manifest(asked, source.read_bytes(*parts, MANIFEST_FILE))
    content = content_version(manifest.model_dump(mode="json"))
    if content != manifest.version:
        found = f"version {manifest.version}, but its content is {content}"
        raise ArtifactError(asked, found, "a version is the digest of its content", _NEXT)
    expected = {name: entry.size_bytes for name, entry in manifest.files.items()}
    present = {name: size for name, size in sizes.items() if name != MANIFEST_FILE}
    if present != expected:
        wrong = sorted(n for n in expected.keys() | present.keys() if expected.get(n) != present.get(n))
        found = f"{wrong[0]} has {present.get(wrong[0])} bytes, the manifest has {expected.get(wrong[0])}"
        raise ArtifactError(asked, found, "a place holds exactly the files of its manifest", _NEXT)
    return manifest


def _refuse_links(store: Store, parts: tuple[str, ...]) -> None:
    if not store.is_local:
        return
    folder = Path(store.path(*parts))
    places = [folder, *folder.iterdir()] if folder.is_dir() else [folder]
    linked = [path for path in places if path.is_symlink()]
    if linked or os.path.realpath(folder) != os.path.join(os.path.realpath(store.uri), *parts):
        raise ArtifactError(
            f"adapter at {folder}",
            f"{(linked or [folder])[0].name} is a link, or is reached through one",
            "a registered folder is under an allowed root, without links",
            "copy it there",
        )
