"""What the owner of an endpoint does with adapters, on one replica: register, load, pin, promote, roll back, unload.

Methods take and return plain data, for they are called through a handle. They raise ApiError.
"""

import asyncio
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from graftwork import artifact, artifact_alias, artifact_register
from graftwork.artifact import AdapterManifest
from graftwork.artifact_alias import version_key
from graftwork.serving.api_error import as_api_errors
from graftwork.serving.arms import Dump
from graftwork.serving.residency import AdapterCache
from graftwork.serving.source import AdapterSource, as_served
from graftwork.serving.spec import ServeSpec
from graftwork.storage import cache_root

VERBS = ("register", "load", "pin", "unpin", "unload", "promote", "before", "roll_back", "registered")
"""Methods that the ingress may name."""


class Checks(Protocol):
    """The part of the engine that knows what it can serve."""

    def check_adapter(self, folder: Path, digests: Mapping[str, str] | None = None) -> int:
        """Raises ArtifactError for an adapter that it can't serve exactly; the bytes that it would take."""


class Registry:
    """Adapters of one store in one replica."""

    def __init__(self, spec: ServeSpec, source: AdapterSource, residency: AdapterCache, engine: Checks) -> None:
        self._source, self._adapter_cache, self._engine = source, residency, engine
        self._roots = spec.adapter_roots or (source.store.uri,)
        self._max_bytes = spec.engine.host_cache_bytes

    async def register(self, uri: str, alias: str | None) -> Dump:
        """Take the version at `uri` into the store, where this engine can serve it, and let `alias` point at it."""
        with as_api_errors():
            manifest = await asyncio.to_thread(self._take, uri)
            if alias is not None:
                await asyncio.to_thread(artifact.promote, self._source.store, manifest.task, alias, manifest.version)
        return {"adapter": manifest.ref, "task": manifest.task, "version": manifest.version, "alias": alias}

    async def load(self, ref: str) -> Dump:
        """Bring the version into host memory."""
        with as_api_errors():
            pin = await self._adapter_cache.pin(ref)
            self._adapter_cache.release(pin)
        return {"adapter": ref, "version": pin.manifest.version}

    async def pin(self, ref: str) -> Dump:
        """Load it and keep it there."""
        with as_api_errors():
            return {"adapter": ref, "version": await self._adapter_cache.keep(ref)}

    async def unpin(self, ref: str) -> Dump:
        """It may go again when its room is needed."""
        with as_api_errors():
            return {"adapter": ref, "version": await self._adapter_cache.unkeep(ref)}

    async def unload(self, ref: str) -> Dump:
        """It leaves the engine, now or with its last request; it stays registered, and loads again when asked for."""
        with as_api_errors():
            return {"adapter": ref, "version": await self._adapter_cache.unload(ref)}

    async def promote(self, ref: str, version: str) -> Dump:
        """Let the alias `ref` point at a version (or at where another alias points), in the store."""
        task, alias = _named(ref)
        with as_api_errors():
            found = await asyncio.to_thread(self._source.resolve, f"{task}@{version}")
            old = await asyncio.to_thread(artifact_alias.read, self._source.store, task, alias)
            await asyncio.to_thread(artifact.promote, self._source.store, task, alias, found.version)
        return {"adapter": ref, "old": old, "new": found.version}

    async def before(self, ref: str) -> Dump:
        """The version that the alias pointed at before."""
        task, alias = _named(ref)
        with as_api_errors():
            return {"version": await asyncio.to_thread(artifact.before, self._source.store, task, alias)}

    async def roll_back(self, ref: str) -> Dump:
        """Let the alias point at the version before, in the store."""
        task, alias = _named(ref)
        with as_api_errors():
            old, new = await asyncio.to_thread(artifact.roll_back, self._source.store, task, alias)
        return {"adapter": ref, "old": old, "new": new}

    async def registered(self) -> list[Dump]:
        """Every version in the store that was made for this base, with what is known of it without loading.

        aliases: those that mean it here; in_store: those that mean it in the store, and will here after a swap.
        """
        with as_api_errors():
            found = await asyncio.to_thread(self._source.list_published)
        served = as_served(found, self._adapter_cache.resolved_refs())
        return [
            {
                "task": manifest.task, "version": manifest.version, "aliases": aliases,
                "in_store": sorted(set(there) - set(aliases)),
                "file_bytes": sum(entry.size_bytes for entry in manifest.files.values()),
                "created_at": manifest.created_at, "tier": "disk" if self._is_here(manifest) else "store",
            }
            for (manifest, there), (_, aliases) in zip(found, served, strict=True)
        ]  # fmt: skip

    def _take(self, uri: str) -> AdapterManifest:
        return artifact_register.take(
            self._source.store, uri, self._roots,
            base_digest=self._source.base_digest, max_bytes=self._max_bytes, check=self._check,
        )  # fmt: skip

    def _check(self, manifest: AdapterManifest, files: Mapping[str, bytes]) -> None:
        """The engine's own reading: ranks, shapes, keys that it can't honour. Nothing of it stays."""
        cache_root().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="register-", dir=cache_root()) as folder:
            for name, data in files.items():
                (Path(folder) / name).write_bytes(data)
            self._engine.check_adapter(Path(folder))

    def _is_here(self, manifest: AdapterManifest) -> bool:
        return self._source.store.local_dir(*version_key(manifest.task, manifest.version)).is_dir()


def _named(ref: str) -> tuple[str, str]:
    task, _, alias = ref.partition("@")
    return task, alias
