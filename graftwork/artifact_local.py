"""A published version on this machine: where it lies on a local root, a cached copy for one on S3.

Unlike `artifact.fetch` nothing is read that is here already: who loads the weights compares them with the manifest on
the bytes that are used, and `discard_damaged` takes a bad copy away. A download streams into a temporary file, is
compared there, and gets its name when it is right: no reader meets half a file, and a full disk leaves nothing behind.
"""

import hashlib
import os
import secrets
from pathlib import Path

from graftwork import artifact_read
from graftwork.artifact_alias import version_key
from graftwork.artifact_manifest import AdapterManifest, FileEntry
from graftwork.errors import ArtifactError
from graftwork.storage import Store
from graftwork.storage_local import TMP_PREFIX


def bring(store: Store, manifest: AdapterManifest) -> Path:
    """Folder here that holds the version's files, each of the manifest's size. Blocks.

    Raises ArtifactError (a file is gone, a link, of another size or, after a download, of another content) and
    StorageError (no space, the store is out of reach).
    """
    key = version_key(manifest.task, manifest.version)
    folder = store.local_dir(*key)
    for name, entry in manifest.files.items():
        if store.is_local:
            _require_plain(folder / name, entry)
        elif not _is_here(folder / name, entry):
            _download(store, manifest, name, folder / name)
    return folder


def discard_damaged(store: Store, manifest: AdapterManifest) -> None:
    """Removes what is not as published from the cached copy. A local root is its owner's: nothing is removed there."""
    if store.is_local:
        return
    folder = store.local_dir(*version_key(manifest.task, manifest.version))
    for name, entry in manifest.files.items():
        path = folder / name
        if path.is_file() and _digest(path) != entry.sha256:
            path.unlink(missing_ok=True)


def _download(store: Store, manifest: AdapterManifest, name: str, target: Path) -> None:
    entry = manifest.files[name]
    tmp = target.parent / f"{TMP_PREFIX}{os.getpid()}-{secrets.token_hex(6)}"
    try:
        store.download_file(tmp, *version_key(manifest.task, manifest.version), name)
        if _digest(tmp) != entry.sha256:
            found = f"{name}: sha256 differs from the manifest's"
            raise ArtifactError(f"adapter {manifest.ref}", found, "every byte is as published", artifact_read.REPUBLISH)
        os.replace(tmp, target)
    finally:
        tmp.unlink(missing_ok=True)


def _require_plain(path: Path, entry: FileEntry) -> None:
    if not _is_here(path, entry):
        found = f"{path.name} is missing, a link, or not {entry.size_bytes} bytes long"
        rule = "a version holds exactly the files of its manifest"
        raise ArtifactError(f"adapter folder {path.parent}", found, rule, artifact_read.REPUBLISH)


def _is_here(path: Path, entry: FileEntry) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size == entry.size_bytes


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
