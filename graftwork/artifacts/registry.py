"""Published adapters: resolved by alias or version, listed, verified and fetched, with their lineage.

The manifest is read first, and no byte is trusted that it does not cover.
"""

import difflib
import hashlib
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from graftwork.artifacts.manifest import (
    SUFFIX,
    VERSION_PATTERN,
    AdapterManifest,
    AliasRecord,
    aliases,
    check_names,
    content_version,
    parse_manifest,
    read_alias,
    version_key,
)
from graftwork.artifacts.verify import MANIFEST_FILE, MAX_TEXT_BYTES, SAFETENSORS_ONLY, problems
from graftwork.base import publish
from graftwork.errors import ArtifactError
from graftwork.storage.store import ALIAS_PATTERN, Store


def parents(manifest: AdapterManifest) -> tuple[str, ...]:
    """`task@version` of each adapter that this one was made from."""
    if manifest.parent is None:
        return manifest.merged_from
    own = manifest.parent if "@" in manifest.parent else f"{manifest.task}@{manifest.parent}"
    return (own, *manifest.merged_from)


def tree(store: Store, manifest: AdapterManifest) -> dict[str, Any]:
    """The version, how it was made, and the same of each that it was made from; JSON-ready.

    One that was removed since is named and marked. Versions are digests of their content, so no circle can be.
    """
    below: list[dict[str, Any]] = []
    for ref in parents(manifest):
        try:
            below.append(tree(store, resolve(store, ref)))
        except UnknownAdapter:
            below.append({"ref": ref, "made": "removed since"})
    return {"ref": manifest.ref, "made": _describe_origin(manifest), "run": manifest.run, "from": below}


def base(store: Store, digest: str) -> dict[str, Any]:
    """The base below: its digest, and where it was trained here its place, its run and its own base."""
    for name in store.list("bases"):
        for version in store.list("bases", name):
            found = publish.find(store, name, version) if digest.startswith(version) else None
            if found is not None:
                place = publish.place(store, name, version)
                return {
                    "digest": digest,
                    "place": place,
                    "run": found.run,
                    "from": base(store, found.parent_digest) | {"uri": found.parent_uri},
                }
    return {"digest": digest}


def _describe_origin(manifest: AdapterManifest) -> str:
    merge = manifest.method.get("merge")
    if isinstance(merge, dict):
        weights = merge["weights"]
        assert isinstance(weights, list), "a merge records its weights"
        return f"merged by {merge['method']}, weights {', '.join(map(str, weights))}"
    how = f"trained: {manifest.method.get('objective', 'sft')}, {manifest.method.get('kind', 'lora')}"
    below = manifest.method.get("stacked_on")
    return how + (", going on" if manifest.parent else "") + (f", on top of {below}" if below else "")


T = TypeVar("T")
READERS = 8
"""Files that are opened at once: a store over the network answers each after some time. s3fs keeps 10 connections."""
Key = tuple[str, str]
"""A task, and a version or an alias of it."""
Stamps = dict[tuple[str, ...], str]
"""The files of a key, each with a mark that changes with its content (`Store.tree`)."""
CachedReads = dict[Key, tuple[Stamps, T | None]]
"""Value read of each key when its files had these stamps; None where they are damaged."""

log = logging.getLogger("graftwork.artifacts.publish")


class Listing:
    """The visible versions of a store and the aliases that point at them. Threads may read it at once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._versions: CachedReads[AdapterManifest] = {}
        self._aliases: CachedReads[AliasRecord] = {}

    def read(self) -> list[tuple[AdapterManifest, list[str]]]:
        """Every visible version, by task and then by age, each with its aliases, sorted. Raises StorageError.

        What is damaged is left out with a warning that names it, once for each time that it changes.
        """
        # without a manifest it was never finished, or is being published right now
        visible = {key: stamps for key, stamps in self._keys("adapters").items() if (MANIFEST_FILE,) in stamps}
        self._versions = versions = _read_changed(visible, self._versions, partial(open_adapter, self._store))
        self._aliases = aliases = _read_changed(self._keys("aliases"), self._aliases, partial(read_alias, self._store))
        named: dict[Key, list[str]] = defaultdict(list)
        for (task, alias), (_, record) in sorted(aliases.items()):
            if record is not None:
                named[task, record.version].append(alias)
        manifests = [manifest for _, manifest in versions.values() if manifest is not None]
        manifests.sort(key=lambda manifest: (manifest.task, manifest.created_at, manifest.version))
        return [(manifest, named[manifest.task, manifest.version]) for manifest in manifests]

    def _keys(self, kind: str) -> dict[Key, Stamps]:
        found: dict[Key, Stamps] = defaultdict(dict)
        for (task, *parts), stamp in self._store.tree(kind).items():
            if kind == "aliases" and len(parts) == 1 and parts[0].endswith(SUFFIX):
                found[task, parts[0].removesuffix(SUFFIX)][()] = stamp
            elif kind == "adapters" and len(parts) > 1:
                found[task, parts[0]][tuple(parts[1:])] = stamp
        return found


def _read_changed(
    now: Mapping[Key, Stamps], before: CachedReads[T], read: Callable[[str, str], T | None]
) -> CachedReads[T]:
    found = {key: before[key] for key, stamps in now.items() if key in before and before[key][0] == stamps}
    fresh = [key for key in now if key not in found]

    def read_sound(key: Key) -> T | None:
        try:
            return read(*key)
        except ArtifactError as error:
            log.warning("left out: %s", error)
            return None

    with ThreadPoolExecutor(READERS, "listing") as readers:
        for key, value in zip(fresh, readers.map(read_sound, fresh), strict=True):
            found[key] = (now[key], value)
    return found


REPUBLISH = "publish the same content again, which rewrites it, or remove it: graftwork adapters rm"


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
    if manifest_size > MAX_TEXT_BYTES:
        found = f"{MANIFEST_FILE} has {manifest_size} bytes"
        raise ArtifactError(asked, found, f"at most {MAX_TEXT_BYTES} are read", REPUBLISH)
    data = store.find_bytes(*key, MANIFEST_FILE)
    if data is None:
        raise unknown(store, task, ref)
    manifest = parse_manifest(asked, data)
    content = content_version(manifest.model_dump(mode="json"))
    if (manifest.task, manifest.version) != (task, version) or content != version:
        found = f"its manifest is that of {manifest.ref}, content {content}"
        raise ArtifactError(asked, found, "folder, manifest and content digest agree", REPUBLISH)
    expected = {name: entry.size_bytes for name, entry in manifest.files.items()}
    wrong = [
        f"{name}: {_format(sizes, name)}, the manifest has {_format(expected, name)}"
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


def verify_adapter(store: Store, task: str, ref: str) -> list[str]:
    """All that is wrong with a version, every byte read; empty when it is sound. ArtifactError when it is unknown."""
    version = version_of(store, task, ref)
    if not store.exists(*version_key(task, version), MANIFEST_FILE):
        raise unknown(store, task, ref)
    try:
        open_sound(store, task, version)
    except ArtifactError as error:
        return [error.problem]
    return []


def open_sound(store: Store, task: str, version: str) -> AdapterManifest:
    """`open_adapter`, and every byte read and checked. Raises ArtifactError that names all problems."""
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
    """Raise ArtifactError unless the files are those of the manifest and their content is an adapter's."""
    found = [
        f"{name}: sha256 differs from the manifest's"
        for name, data in files.items()
        if hashlib.sha256(data).hexdigest() != manifest.files[name].sha256
    ]
    if found := [*found, *problems(files)]:
        rule = f"every byte is as published; {SAFETENSORS_ONLY}"
        raise ArtifactError(f"adapter {manifest.ref}", "; ".join(found), rule, REPUBLISH)


def unknown(store: Store, task: str, ref: str) -> UnknownAdapter:
    """The error of a name that no version has, with the nearest one."""
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
        f"adapter {task}@{ref}",
        found,
        "an adapter is published before it is used",
        f"{hint}List adapters: graftwork adapters ls; train one: graftwork train",
    )


def version_of(store: Store, task: str, ref: str) -> str:
    """The version that an alias names, or the version itself. ArtifactError for an unknown alias or an odd name."""
    check_names(task, ref)
    if re.fullmatch(VERSION_PATTERN, ref):
        return ref
    record = read_alias(store, task, ref)
    if record is None:
        raise unknown(store, task, ref)
    return record.version


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
