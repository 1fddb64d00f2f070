"""Taking a published version from another place into a store: looked at before it is read.

The place must lie under an allowed root and hold `adapter_config.json`, `manifest.json` and `*.safetensors` alone.
Names and sizes come from the listing, and the manifest is read and checked (ids, base, content digest) before any
weights; their bytes are then compared with it, and their headers and shapes with the config.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from graftwork import artifact, artifact_check, artifact_manifest, artifact_read
from graftwork.artifact_check import MANIFEST_FILE, MAX_TEXT_BYTES
from graftwork.artifact_manifest import AdapterManifest
from graftwork.errors import ArtifactError, ConfigError
from graftwork.storage import Store

_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_NEXT = "publish it with `graftwork train`, or copy a whole adapters/TASK/VERSION folder"


def allowed_place(uri: str, roots: Sequence[str]) -> tuple[Store, tuple[str, ...]]:
    """The root that `uri` lies under, and the key below it. Raises ArtifactError for any other place.

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
    raise ArtifactError(f"adapter at {uri[:200]!r}", "it lies under none of the allowed roots, or its path isn't plain",
                        f"adapters are taken from {', '.join(roots)}; below, names match {_PART.pattern}",
                        "add its root to adapter_roots of the serve spec")  # fmt: skip


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

    check: told the sound files before anything is written; raises what refuses them. Raises ArtifactError that says
    what is wrong, StorageError (out of reach, no space); then the store is as before.
    """
    source, parts = allowed_place(uri, roots)
    manifest = _manifest(source, parts, uri)
    artifact.require_base(manifest, base_digest)
    size = sum(entry.size_bytes for entry in manifest.files.values())
    if size > max_bytes:
        raise ArtifactError(f"adapter at {uri}", f"{size} bytes", f"an adapter has at most {max_bytes} bytes here")
    files = {name: source.read_bytes(*parts, name) for name in manifest.files}
    artifact_read.require_sound(manifest, files)
    check(manifest, files)
    return artifact.adopt(store, manifest, files)


def _manifest(source: Store, parts: tuple[str, ...], uri: str) -> AdapterManifest:
    """The manifest of a folder whose listing agrees with it; nothing else has been read."""
    sizes = source.children(*parts)
    asked = f"adapter at {uri}"
    strange = sorted(n for n in sizes if n != MANIFEST_FILE and not artifact_check.is_adapter_file(n))
    if strange or MANIFEST_FILE not in sizes:
        found = f"{strange[0][:80]} does not belong there" if strange else f"no {MANIFEST_FILE}"
        raise ArtifactError(asked, found, f"a place holds {MANIFEST_FILE} and the files it names alone", _NEXT)
    if (sizes[MANIFEST_FILE] or 0) > MAX_TEXT_BYTES:
        raise ArtifactError(asked, f"{MANIFEST_FILE} has {sizes[MANIFEST_FILE]} bytes", f"at most {MAX_TEXT_BYTES}")
    manifest = artifact_manifest.parse(asked, source.read_bytes(*parts, MANIFEST_FILE))
    if manifest.content_version() != manifest.version:
        found = f"version {manifest.version}, but its content is {manifest.content_version()}"
        raise ArtifactError(asked, found, "a version is the digest of its content", _NEXT)
    expected = {name: entry.size_bytes for name, entry in manifest.files.items()}
    present = {name: size for name, size in sizes.items() if name != MANIFEST_FILE}
    if present != expected:
        wrong = sorted(n for n in expected.keys() | present.keys() if expected.get(n) != present.get(n))
        found = f"{wrong[0]} has {present.get(wrong[0])} bytes, the manifest says {expected.get(wrong[0])}"
        raise ArtifactError(asked, found, "a place holds exactly the files of its manifest", _NEXT)
    return manifest


def _refuse_links(store: Store, parts: tuple[str, ...]) -> None:
    if not store.is_local:
        return
    folder = Path(store.path(*parts))
    places = [folder, *folder.iterdir()] if folder.is_dir() else [folder]
    linked = [path for path in places if path.is_symlink()]
    if linked or os.path.realpath(folder) != os.path.join(os.path.realpath(store.uri), *parts):
        raise ArtifactError(f"adapter at {folder}", f"{(linked or [folder])[0].name} is or lies behind a link",
                            "what is registered lies under an allowed root itself", "copy it there")  # fmt: skip


def check_roots(roots: Sequence[str]) -> None:
    """Raises ConfigError for a root that is no place."""
    for root in roots:
        if not root.strip():
            raise ConfigError("adapter_roots", "an empty root", "a root is a folder, file:// or s3://BUCKET/PREFIX")
        Store(root)
