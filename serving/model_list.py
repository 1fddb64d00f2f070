"""Models of an endpoint for GET /v1/models: the store is listed at most once a second, and for one model not at all."""

import asyncio
import json
import time
from collections.abc import Iterable
from contextlib import suppress
from difflib import get_close_matches
from typing import Any

from graftwork.serving.api_error import ApiError, unknown_model
from graftwork.serving.backend import EngineBackend
from graftwork.serving.catalog import Catalog
from graftwork.serving.openai_responses import Json

FRESH_S = 1.0
"""How long a listing is served again."""
SHARE = 20
"""And as many times as long as reading it took: a listing of many adapters then takes 5 % of a core at most."""
COMPARED = 1000
"""Names that a wrong one is compared with: 10 us each."""


class ModelList:
    """One for an endpoint, in its ingress."""

    def __init__(self, catalog: Catalog, backend: EngineBackend) -> None:
        self._catalog, self._backend = catalog, backend
        self._found: dict[str, Any] = {"adapters": [], "ready_at": 0}
        self._fresh_until, self._changes, self._reads = 0.0, 0, 0
        self._rendered: tuple[object, bytes] = (None, b"")
        self._reading = asyncio.Lock()

    def forget(self) -> None:
        """Read the store for the next listing: an adapter or an alias of it has changed."""
        self._fresh_until, self._changes = 0.0, self._changes + 1

    async def listing(self, others: list[Json]) -> bytes:
        """Body of GET /v1/models: base, arms, every adapter by alias and version, and the others. Raises ApiError."""
        await self._read()
        key = self._reads, self._catalog.changes, [card["id"] for card in others]
        if self._rendered[0] != key:
            self._rendered = key, _compact({"object": "list", "data": [*self._cards(), *others]})
        return self._rendered[1]

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
                self._found = await self._backend.call("models")
                self._reads, ended = self._reads + 1, time.monotonic()
                if changes == self._changes:
                    self._fresh_until = ended + max(FRESH_S, SHARE * (ended - began))

    def _cards(self) -> list[Json]:
        return self._catalog.cards(self._found["adapters"], self._found["ready_at"])


def _compact(body: Json) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
