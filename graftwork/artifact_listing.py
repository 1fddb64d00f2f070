"""What a store holds, read again at the cost of two listings: only what has changed since is opened."""

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from graftwork import artifact_alias
from graftwork.artifact_check import MANIFEST_FILE
from graftwork.artifact_manifest import AdapterManifest
from graftwork.artifact_read import open_adapter
from graftwork.errors import ArtifactError
from graftwork.storage import Store

T = TypeVar("T")
READERS = 8
"""Files that are opened at once: a store over the network answers each after some time. s3fs keeps 10 connections."""
Key = tuple[str, str]
"""A task, and a version or an alias of it."""
Stamps = dict[tuple[str, ...], str]
"""The files of a key, each with a mark that changes with its content (`Store.tree`)."""
Kept = dict[Key, tuple[Stamps, T | None]]
"""What was read of each key when its files had these stamps; None where they are damaged."""

log = logging.getLogger("graftwork.artifact")


class Listing:
    """The visible versions of a store and the aliases that point at them. Threads may read it at once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._versions: Kept[AdapterManifest] = {}
        self._aliases: Kept[str] = {}

    def read(self) -> list[tuple[AdapterManifest, list[str]]]:
        """Every visible version, by task and then by age, each with its aliases, sorted. Raises StorageError.

        What is damaged is left out with a warning that names it, once for each time that it changes.
        """
        # without a manifest it was never finished, or is being published right now
        visible = {key: stamps for key, stamps in self._keys("adapters").items() if (MANIFEST_FILE,) in stamps}
        self._versions = versions = _opened(visible, self._versions, self._open)
        self._aliases = aliases = _opened(self._keys("aliases"), self._aliases, self._target)
        named: dict[tuple[str, str | None], list[str]] = defaultdict(list)
        for (task, alias), (_, version) in sorted(aliases.items()):
            named[task, version].append(alias)
        manifests = [manifest for _, manifest in versions.values() if manifest is not None]
        manifests.sort(key=lambda manifest: (manifest.task, manifest.created_at, manifest.version))
        return [(manifest, named[manifest.task, manifest.version]) for manifest in manifests]

    def _keys(self, kind: str) -> dict[Key, Stamps]:
        found: dict[Key, Stamps] = defaultdict(dict)
        for (task, *parts), stamp in self._store.tree(kind).items():
            if kind == "aliases" and len(parts) == 1 and parts[0].endswith(artifact_alias.SUFFIX):
                found[task, parts[0].removesuffix(artifact_alias.SUFFIX)][()] = stamp
            elif kind == "adapters" and len(parts) > 1:
                found[task, parts[0]][tuple(parts[1:])] = stamp
        return found

    def _open(self, task: str, version: str) -> AdapterManifest:
        return open_adapter(self._store, task, version)

    def _target(self, task: str, alias: str) -> str | None:
        return artifact_alias.read(self._store, task, alias)


def list_adapters(store: Store) -> list[AdapterManifest]:
    """Every visible version, by task and then by age. A damaged one is left out with a warning that names it."""
    return [manifest for manifest, _ in Listing(store).read()]


def _opened(now: Mapping[Key, Stamps], before: Kept[T], read: Callable[[str, str], T | None]) -> Kept[T]:
    found = {key: before[key] for key, stamps in now.items() if key in before and before[key][0] == stamps}
    fresh = [key for key in now if key not in found]
    with ThreadPoolExecutor(READERS, "listing") as readers:
        for key, value in zip(fresh, readers.map(lambda key: _readable(key, read), fresh), strict=True):
            found[key] = (now[key], value)
    return found


def _readable(key: Key, read: Callable[[str, str], T | None]) -> T | None:
    try:
        return read(*key)
    except ArtifactError as error:
        log.warning("left out: %s", error)
        return None
