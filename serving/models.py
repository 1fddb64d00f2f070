"""Models of an endpoint: their listing, the published adapters of its base, and what the owner does with them.

`ModelList` runs in the ingress, `AdapterSource` and `Registry` in each replica. The methods of `Registry` take and
return JSON bodies of the admin API, for they are called through a handle.
"""

import asyncio
import json
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

from graftwork.artifacts import manifest, publish
from graftwork.artifacts.manifest import AdapterManifest
from graftwork.artifacts.registry import Listing, resolve
from graftwork.errors import ArtifactError, DataError, StorageError
from graftwork.prompts.render import PromptSpec
from graftwork.serving.adapter_cache import AdapterCache
from graftwork.serving.api.errors import ApiError, unknown_model
from graftwork.serving.api.openai_protocol import Json
from graftwork.serving.arms import Catalog, warm
from graftwork.serving.engine import Engine
from graftwork.serving.router import EngineBackend
from graftwork.serving.spec import ServeSpec
from graftwork.storage.store import Store, cache_root

FRESH_S = 1.0
"""Time for which a listing is served again."""
SHARE = 20
"""And as many times as long as reading it took: a listing of many adapters then takes 5 % of a core at most."""
COMPARED = 1000
"""Names that a wrong one is compared with: 10 us each."""


class ModelList:
    """Listing of GET /v1/models, one for an endpoint; the store is read at most once a second."""

    def __init__(self, catalog: Catalog, backend: EngineBackend) -> None:
        self._catalog, self._backend = catalog, backend
        self._listed_models: Json = {"adapters": [], "ready_at": 0}
        self._fresh_until, self._changes, self._reads = 0.0, 0, 0
        self._response: tuple[object, bytes] = (None, b"")
        self._reading = asyncio.Lock()

    def forget(self) -> None:
        """Read the store for the next listing: an adapter or an alias of it has changed."""
        self._fresh_until, self._changes = 0.0, self._changes + 1

    async def listing(self, others: list[Json]) -> bytes:
        """Body of GET /v1/models: base, arms, every adapter by alias and version, and the others. Raises ApiError."""
        await self._read()
        key = self._reads, self._catalog.changes, [card["id"] for card in others]
        if self._response[0] != key:
            self._response = (
                key,
                json.dumps(
                    {"object": "list", "data": [*self._cards(), *others]}, ensure_ascii=False, separators=(",", ":")
                ).encode(),
            )
        return self._response[1]

    async def card(self, model: str) -> Json | None:
        """One of them, without a listing. Raises ApiError."""
        adapter = model.startswith(f"{self._catalog.base}:")
        found = await self._backend.call("models", self._catalog.ref(model) if adapter else "")
        cards = self._catalog.cards(found["adapters"], found["ready_at"])
        return next((card for card in cards if card["id"] == model), None)

    async def unknown(self, model: str, others: Iterable[str] = ()) -> ApiError:
        """404 that names the nearest model that exists, by its whole name or by its adapter's. others: experiments."""
        with suppress(ApiError):  # the model is unknown even so
            await self._read()
        names = [*others, *(card["id"] for card in self._cards())][:COMPARED]
        by_short = {name.removeprefix(f"{self._catalog.base}:"): name for name in reversed(names)}
        near = get_close_matches(model.removeprefix(f"{self._catalog.base}:"), by_short, 1)
        meant = f"Did you mean {by_short[near[0]]}? " if near else ""
        return unknown_model(model, f"{meant}{self._catalog.forms()} GET /v1/models lists them all.")

    async def _read(self) -> None:
        async with self._reading:
            if time.monotonic() >= self._fresh_until:
                changes, began = self._changes, time.monotonic()
                self._listed_models = await self._backend.call("models")
                self._reads, ended = self._reads + 1, time.monotonic()
                if changes == self._changes:
                    self._fresh_until = ended + max(FRESH_S, SHARE * (ended - began))

    def _cards(self) -> list[Json]:
        return self._catalog.cards(self._listed_models["adapters"], self._listed_models["ready_at"])


@dataclass(frozen=True)
class AdapterSource:
    """Adapters of a store made for the base with this digest: resolved, checked against the base, fetched.

    All methods block: call them off the event loop.
    """

    store: Store
    base_digest: str

    @cached_property
    def _listing(self) -> Listing:
        return Listing(self.store)

    def resolve(self, ref: str) -> AdapterManifest:
        """The manifest that `task@alias` or `task@version` means now. Raises ArtifactError, of which UnknownAdapter."""
        found = resolve(self.store, ref)
        publish.require_base(found, self.base_digest)
        return found

    def fetch(self, found: AdapterManifest) -> Path:
        """Its files in a folder here, of the right sizes; the worked examples of its training prompt are read too."""
        try:
            warm(trained_prompt(found), None)
        except (DataError, StorageError) as error:
            raise ArtifactError(f"adapter {found.task}@{found.version}: its training prompt", error.text()) from error
        return publish.bring(self.store, found)

    def discard_damaged(self, found: AdapterManifest) -> None:
        """Forget a copy that isn't as published, so that the next request brings it again."""
        publish.discard_damaged(self.store, found)

    def list_published(self) -> list[tuple[AdapterManifest, list[str]]]:
        """Every version for this base with the aliases that point at it, as the store is now."""
        return [(m, aliases) for m, aliases in self._listing.read() if m.base_digest == self.base_digest]

    def describe_version(self, ref: str, followed: str | None) -> "Published":
        """As `as_served` gives it for one `task@alias-or-version`; nothing where there is no such version.

        followed: the version that requests for it get, where one is followed.
        """
        task, _, name = ref.partition("@")
        for wanted in (f"{task}@{followed}", ref) if followed else (ref,):
            try:
                manifest = self.resolve(wanted)
            except ArtifactError:  # unknown, damaged or of another base: no listing has it
                continue
            return [(manifest, [] if name == manifest.version else [name])]
        return []


Published = list[tuple[AdapterManifest, list[str]]]


def as_served(found: Published, followed: Mapping[str, str]) -> Published:
    """Return `AdapterSource.list_published` with each alias at the version that requests get: one that was moved in the
    store is followed only after a swap. followed: `AdapterCache.resolved_refs`."""
    names: dict[tuple[str, str], list[str]] = {(m.task, m.version): [] for m, _ in found}
    for one, aliases in found:
        for alias in aliases:
            version = followed.get(f"{one.task}@{alias}", one.version)
            names[one.task, version if (one.task, version) in names else one.version].append(alias)
    return [(one, sorted(names[one.task, one.version])) for one, _ in found]


def trained_prompt(manifest: AdapterManifest) -> PromptSpec:
    """The prompt that stood around the adapter's training rows."""
    return PromptSpec.model_validate(manifest.prompt)


VERBS = ("register", "load", "pin", "unpin", "unload", "promote", "before", "roll_back", "registered")
"""Methods that the ingress may name."""


class Registry:
    """Adapters of one store in one replica. All methods raise UserError."""

    def __init__(self, spec: ServeSpec, source: AdapterSource, adapter_cache: AdapterCache, engine: Engine) -> None:
        self._source, self._store, self._adapter_cache, self._engine = source, source.store, adapter_cache, engine
        self._roots = spec.adapter_roots or (source.store.uri,)
        self._max_bytes = spec.engine.host_cache_bytes

    async def register(self, uri: str) -> Json:
        """Take the version at `uri` into the store, where this engine can serve it."""
        taken = await asyncio.to_thread(
            publish.take,
            self._store,
            uri,
            self._roots,
            base_digest=self._source.base_digest,
            max_bytes=self._max_bytes,
            check=self._check,
        )
        return {"adapter": taken.ref, "task": taken.task, "version": taken.version, "alias": None}

    async def load(self, ref: str) -> Json:
        """Bring the version into host memory."""
        pin = await self._adapter_cache.pin(ref)
        self._adapter_cache.release(pin)
        return {"adapter": ref, "version": pin.manifest.version}

    async def pin(self, ref: str) -> Json:
        """Load the version, and never drop it to make room."""
        return {"adapter": ref, "version": await self._adapter_cache.keep(ref)}

    async def unpin(self, ref: str) -> Json:
        """It may go again when its room is needed."""
        return {"adapter": ref, "version": await self._adapter_cache.unkeep(ref)}

    async def unload(self, ref: str) -> Json:
        """It leaves the engine, now or with its last request; it stays registered, and loads again when asked for."""
        return {"adapter": ref, "version": await self._adapter_cache.unload(ref)}

    async def promote(self, ref: str, version: str) -> Json:
        """Let the alias `ref` point at a version (or at where another alias points), in the store."""
        task, _, alias = ref.partition("@")
        found = await asyncio.to_thread(self._source.resolve, f"{task}@{version}")
        old = await asyncio.to_thread(manifest.read_alias, self._store, task, alias)
        await asyncio.to_thread(publish.promote, self._store, task, alias, found.version)
        return {"adapter": ref, "old": old and old.version, "new": found.version}

    async def before(self, ref: str) -> Json:
        """The version that the alias pointed at before."""
        task, _, alias = ref.partition("@")
        return {"version": await asyncio.to_thread(manifest.before, self._store, task, alias)}

    async def roll_back(self, ref: str) -> Json:
        """Let the alias point at the version before, in the store."""
        task, _, alias = ref.partition("@")
        old, new = await asyncio.to_thread(manifest.roll_back, self._store, task, alias)
        return {"adapter": ref, "old": old, "new": new}

    async def registered(self) -> list[Json]:
        """Every version in the store that was made for this base, with what is known of it without loading.

        aliases: those that mean it here; in_store: those that mean it in the store, and will here after a swap.
        """
        found = await asyncio.to_thread(self._source.list_published)
        served = as_served(found, self._adapter_cache.resolved_refs())
        here = [self._store.local_dir(*manifest.version_key(one.task, one.version)).is_dir() for one, _ in found]
        return [
            {
                "task": one.task,
                "version": one.version,
                "aliases": aliases,
                "in_store": sorted(set(there) - set(aliases)),
                "file_bytes": sum(entry.size_bytes for entry in one.files.values()),
                "created_at": one.created_at,
                "tier": "disk"
                if self._store.local_dir(*manifest.version_key(one.task, one.version)).is_dir()
                else "store",
            }
            for (one, there), (_, aliases), is_here in zip(found, served, here, strict=True)
        ]

    def _check(self, _manifest: AdapterManifest, files: Mapping[str, bytes]) -> None:
        """The engine's own reading: ranks, shapes, keys that it can't honour. Nothing of it stays."""
        cache_root().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="register-", dir=cache_root()) as folder:
            for name, data in files.items():
                (Path(folder) / name).write_bytes(data)
            self._engine.check_adapter(Path(folder))
