"""Admin routes: what the owner does with adapters, on every replica.

A change is stored first and is answered when every replica follows it. What can fail fails before anything has changed:
a version is loaded everywhere before an alias moves to it.
"""

from collections import defaultdict
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from graftwork.serving.api.auth import read_body
from graftwork.serving.api.errors import bad_request
from graftwork.serving.api.openai_protocol import Json, parse
from graftwork.serving.live_config import LiveConfig
from graftwork.serving.router import EngineBackend
from graftwork.storage.store import NAME_PATTERN

ADMIN = "/v1/admin/"
ADMIN_PREFIX = f"{ADMIN}adapters"
ADMIN_CONFIG = f"{ADMIN}config"
ON_EACH = ("load", "unload", "pin", "unpin", "refresh")
"""Verbs that each replica does for itself."""
Handler = Callable[[Request], Coroutine[Any, Any, Response]]
Route = tuple[str, Handler, type[BaseModel]]
"""Path, handler and body of a POST route."""
_TIERS = ("store", "disk", "host", "slot")


class RegisterRequest(BaseModel):
    """Body of POST /v1/admin/adapters/register."""

    model_config = ConfigDict(strict=True, extra="forbid")
    uri: Annotated[str, Field(min_length=1, max_length=1024)]
    """Folder of a published version, under one of the spec's `adapter_roots`."""
    alias: Annotated[str, Field(pattern=NAME_PATTERN)] | None = None


class AdapterRequest(BaseModel):
    """Body of load, unload, pin, unpin, rollback and refresh."""

    model_config = ConfigDict(strict=True, extra="forbid")
    adapter: Annotated[str, Field(min_length=1, max_length=256)]
    """`task@alias` or `task@version`; `task` means `task@latest`."""


class PromoteRequest(AdapterRequest):
    """Body of POST /v1/admin/adapters/promote."""

    version: Annotated[str, Field(pattern=NAME_PATTERN)]
    """The new target of `adapter` (`task@alias`): a version, or another alias of the task."""


class Admin:
    """One method a route."""

    def __init__(self, live: LiveConfig, backend: EngineBackend) -> None:
        self._live, self._catalog, self._backend = live, live.catalog, backend

    def routes(self) -> list[Route]:
        """(path, handler, body) of every POST route."""
        found: list[Route] = [
            ("register", self.register, RegisterRequest),
            ("promote", self.promote, PromoteRequest),
            ("rollback", self.rollback, AdapterRequest),
        ]
        found += [(verb, self._on_each(verb), AdapterRequest) for verb in ON_EACH]
        return [(f"{ADMIN_PREFIX}/{verb}", handler, body) for verb, handler, body in found]

    async def register(self, request: Request) -> Response:
        """POST .../register: take a version into the store. An alias given with it moves as by `promote`."""
        body = parse(RegisterRequest, await read_body(request))
        made = await self._backend.call("registry", "register", body.uri)
        if body.alias is None:
            return _list_response([made])
        return await self._move(f"{made['task']}@{body.alias}", made["version"], "promote", made["version"])

    async def promote(self, request: Request) -> Response:
        """POST .../promote: move an alias; new requests follow it on every replica when this returns."""
        body = parse(PromoteRequest, await read_body(request))
        ref = self._alias(body.adapter)
        return await self._move(ref, body.version, "promote", body.version)

    async def rollback(self, request: Request) -> Response:
        """POST .../rollback: the alias points at the version before again."""
        ref = self._alias(parse(AdapterRequest, await read_body(request)).adapter)
        before = await self._backend.call("registry", "before", ref)
        return await self._move(ref, before["version"], "roll_back")

    async def listing(self) -> Response:
        """GET .../: every registered version: aliases, tier, state, bytes, requests."""
        registered = await self._backend.call("registry", "registered")
        replicas = await self._backend.each("adapters")
        held: defaultdict[str, list[Json]] = defaultdict(list)
        for adapters in replicas:
            for adapter in adapters:
                held[adapter["version"]].append(adapter)
        return _list_response([_merge_replicas(row, held[row["version"]]) for row in registered])

    async def config(self) -> Response:
        """GET /v1/admin/config: which live config is served, and which was refused, why."""
        return JSONResponse(self._live.status())

    async def _move(self, ref: str, version: str, verb: str, *args: str) -> Response:
        task = ref.partition("@")[0]
        await self._backend.each("registry", "load", f"{task}@{version}")
        moved = await self._backend.call("registry", verb, ref, *args)
        swaps = await self._backend.each("refresh", ref)
        # a replica's own `old`: the store's alias may have moved before it refreshed, as when training published
        return _list_response([{**moved, "old": s["old"] or moved["old"], "swap_ms": s["swap_ms"]} for s in swaps])

    def _on_each(self, verb: str) -> Handler:
        async def handle(request: Request) -> Response:
            ref = self._catalog.ref(parse(AdapterRequest, await read_body(request)).adapter)
            if verb == "refresh":
                return _list_response(await self._backend.each("refresh", ref))
            return _list_response(await self._backend.each("registry", verb, ref))

        handle.__doc__ = f"POST .../{verb}, on every replica."
        return handle

    def _alias(self, name: str) -> str:
        ref = self._catalog.ref(name)
        if "@" not in name:
            raise bad_request("Name the alias that shall move: task@alias.", param="adapter", code="invalid_value")
        return ref


def _merge_replicas(registered: Json, held: list[Json]) -> Json:
    """One version over all replicas. The tier is the highest it has anywhere."""
    tiers = [registered["tier"], *("slot" if h.get("in_slot") else "host" for h in held if h["state"] != "loading")]
    states = {h["state"] for h in held}
    state = next((state for state in ("ready", "loading", "draining") if state in states), "registered")
    return {
        **registered,
        "tier": max(tiers, key=_TIERS.index),
        "state": state,
        "pinned": any(h["pinned"] for h in held),
        "running": sum(h["running"] for h in held),
        "host_bytes": max((h.get("size_bytes", 0) for h in held), default=0),
        "replicas": len(held),
    }


def _list_response(rows: list[Json]) -> Response:
    return JSONResponse({"object": "list", "data": rows})
