"""Reading adapters: by alias or version, the manifest first, no byte trusted that the manifest does not cover."""

import difflib
import hashlib
import re
from collections.abc import Mapping

from graftwork import artifact_alias, artifact_check, artifact_manifest
from graftwork.artifact_alias import aliases, check_names, version_key
from graftwork.artifact_check import MANIFEST_FILE
from graftwork.artifact_manifest import VERSION_PATTERN, AdapterManifest
from graftwork.errors import ArtifactError
from graftwork.storage import ALIAS_PATTERN, Store

REPUBLISH = "publish the same content again, which writes it anew, or remove it: graftwork adapters rm"


class UnknownAdapter(ArtifactError):
    """No adapter of that name is published."""


def open_adapter(store: Store, task: str, ref: str) -> AdapterManifest:
    """The manifest behind an alias or a version, with the list of files and their sizes checked; no weights are read.

    Raises ArtifactError: unknown, a manifest that contradicts itself or its folder, a file too many, cut or grown.
    """
    version = version_of(store, task, ref)
    asked, key = f"adapter {task}@{ref}", version_key(task, version)
    sizes = store.children(*key)
    manifest_size = sizes.pop(MANIFEST_FILE, None)
    if manifest_size is None:
        raise unknown(store, task, ref)
    if manifest_size > artifact_check.MAX_TEXT_BYTES:
        raise ArtifactError(
            asked,
            f"{MANIFEST_FILE} has {manifest_size} bytes",
            f"at most {artifact_check.MAX_TEXT_BYTES} are read",
            REPUBLISH,
        )
    data = store.find_bytes(*key, MANIFEST_FILE)
    if data is None:
        raise unknown(store, task, ref)
    manifest = artifact_manifest.parse(asked, data)
    if (manifest.task, manifest.version) != (task, version) or manifest.content_version() != version:
        raise ArtifactError(
            asked,
            f"its manifest is that of {manifest.ref}, content {manifest.content_version()}",
            "folder, manifest and content digest agree",
            REPUBLISH,
        )
    expected = {name: entry.size_bytes for name, entry in manifest.files.items()}
    wrong = [
        f"{name}: {_format(sizes, name)}, the manifest says {_format(expected, name)}"
        for name in sorted(expected.keys() | sizes.keys())
        if sizes.get(name, -1) != expected.get(name, -1)
    ]
    if wrong:
        raise ArtifactError(asked, "; ".join(wrong), "a version holds exactly the files of its manifest", REPUBLISH)
    return manifest


def resolve(store: Store, name: str) -> AdapterManifest:
    """`open_adapter` of `task@alias` or `task@version`."""
    return open_adapter(store, *_split(name))


def locate(store: Store, name: str) -> tuple[str, str]:
    """Task and version that `task@alias` or `task@version` means, the version itself not opened: it may be damaged."""
    task, ref = _split(name)
    return task, version_of(store, task, ref)


def verify(store: Store, task: str, ref: str) -> list[str]:
    """All that is wrong with a version, every byte read; empty when it is sound. ArtifactError when it is unknown."""
    version = version_of(store, task, ref)
    if not store.exists(*version_key(task, version), MANIFEST_FILE):
        raise unknown(store, task, ref)
    try:
        manifest = open_adapter(store, task, version)
        return _content_problems(manifest, read_files(store, manifest))
    except ArtifactError as error:
        return [error.problem]


def open_sound(store: Store, task: str, version: str) -> AdapterManifest:
    manifest = open_adapter(store, task, version)
    require_sound(manifest, read_files(store, manifest))
    return manifest


def read_files(store: Store, manifest: AdapterManifest) -> dict[str, bytes]:
    """Every file of the manifest, unchecked. ArtifactError where one was removed meanwhile."""
    key = version_key(manifest.task, manifest.version)
    found = {name: store.find_bytes(*key, name) for name in manifest.files}
    files = {name: data for name, data in found.items() if data is not None}
    if len(files) < len(found):
        gone = ", ".join(sorted(found.keys() - files.keys()))
        raise ArtifactError(f"adapter {manifest.ref}", f"{gone}: removed meanwhile", "", REPUBLISH)
    return files


def require_sound(manifest: AdapterManifest, files: Mapping[str, bytes]) -> None:
    found = _content_problems(manifest, files)
    if found:
        raise ArtifactError(
            f"adapter {manifest.ref}",
            "; ".join(found),
            f"every byte is as published; {artifact_check.SAFETENSORS_ONLY}",
            REPUBLISH,
        )


def unknown(store: Store, task: str, ref: str) -> UnknownAdapter:
    tasks = store.list("adapters")
    if task not in tasks:
        found = f"no adapter of task {task!r} in {store.uri}; tasks: {', '.join(tasks) or 'none'}"
        near = [f"{name}@{ref}" for name in difflib.get_close_matches(task, tasks, n=1)]
    else:
        known = aliases(store, task)
        named = [f"{alias} ({target})" for alias, target in known.items()]
        found = f"no such version; aliases: {', '.join(named) or 'none'}"
        near = [f"{task}@{alias}" for alias in difflib.get_close_matches(ref, [*known], n=1)]
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UnknownAdapter(
        f"adapter {task}@{ref}", found, "an adapter is published before it is used",
        f"{hint}List adapters: graftwork adapters ls; train one: graftwork train",
    )  # fmt: skip


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _content_problems(manifest: AdapterManifest, files: Mapping[str, bytes]) -> list[str]:
    changed = [
        f"{name}: sha256 differs from the manifest's"
        for name, data in files.items()
        if sha256(data) != manifest.files[name].sha256
    ]
    return changed + list(artifact_check.problems(files))


def version_of(store: Store, task: str, ref: str) -> str:
    """The version that an alias names, or the version itself. ArtifactError for an unknown alias or an odd name."""
    check_names(task, ref)
    if re.fullmatch(VERSION_PATTERN, ref):
        return ref
    target = artifact_alias.read(store, task, ref)
    if target is None:
        raise unknown(store, task, ref)
    return target


def _split(name: str) -> tuple[str, str]:
    if not re.fullmatch(ALIAS_PATTERN, name):
        raise ArtifactError(
            f"adapter {name[:140]!r}",
            "it is no adapter name",
            f"names match {ALIAS_PATTERN}",
            "write task@alias or task@version",
        )
    task, _, ref = name.partition("@")
    return task, ref


def _format(sizes: Mapping[str, int | None], name: str) -> str:
    if name not in sizes:
        return "no such file"
    return "a folder" if sizes[name] is None else f"{sizes[name]} bytes"
