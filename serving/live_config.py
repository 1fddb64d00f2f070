"""Live configuration of an endpoint: arms, adapters kept ready, limits and experiments change while it serves.

A new config is checked and made ready in every engine first; then the ingress applies it, in one step between two
requests. A request keeps what it was admitted with. A refused config changes nothing; GET /v1/admin/config and the
metric `live_config_refused` report it.

Ray Serve ends a replica whose `reconfigure` raises, so a wrong config must never come back to it as an error (Ray 2.60,
serve/_private/deployment_state.py).

The store keeps the config that was last applied (`serving/<name>/live.json`); an ingress or an engine replica that
replaces another one begins with it.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Mapping
from typing import Any

from prometheus_client.core import Metric

from graftwork.cluster.kuberay.objects import LIVE
from graftwork.config import canonical_json, validate
from graftwork.errors import ConfigError
from graftwork.serving.ab_test.service import Experiments
from graftwork.serving.api.errors import ApiError, as_api_errors
from graftwork.serving.api.openai_protocol import Json
from graftwork.serving.api.rate_limits import RateLimits
from graftwork.serving.arms import Catalog
from graftwork.serving.metrics_export import counter, gauge
from graftwork.serving.router import EngineBackend
from graftwork.serving.spec import ServeSpec
from graftwork.storage.store import Store

log = logging.getLogger("ray.serve")
RETRY_S = 1.0
"""A store or an engine that can't answer now is asked again, until another config comes."""


class LiveConfig:
    """One for an endpoint, in its ingress. All methods run on the ingress' event loop."""

    def __init__(self, spec: ServeSpec, backend: EngineBackend) -> None:
        self.spec, self._backend = spec, backend
        """The spec as it is served now."""
        self.catalog, self.limits = Catalog(spec), RateLimits(spec.limits)
        self.experiments = Experiments(spec.root, self.catalog, backend)
        self._next_config: Mapping[str, Any] | None = None
        self._task: asyncio.Task[None] | None = None
        self._changed_at: float | None = None
        self._changes = 0
        self._refusal: Json | None = None

    async def open(self, tree: Mapping[str, Any]) -> None:
        """The first config that Serve gives. An ingress in another one's place begins with what that one took last.

        Raises ApiError where the config is wrong and there is none to fall back on.
        """
        with as_api_errors():
            found = await asyncio.to_thread(read_live_record, self.spec)
        if found is None:
            await self._persist(tree)
            return
        self._apply(found)
        if live_of(found) != tree:
            self.update(tree)

    def update(self, tree: Mapping[str, Any]) -> None:
        """A changed config. Returns at once; of several that come meanwhile the last one counts."""
        self._next_config = tree
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._follow())

    def start(self) -> None:
        """Start the experiments of an endpoint whose spec never changes."""
        if self.spec.experiments:
            self.update(live_of(self.spec))

    def status(self) -> Json:
        """Plain data: which config is taken, and which was refused, why."""
        changing = self._task is not None and not self._task.done()
        return {
            "config": digest(live_of(self.spec)),
            "taken_at": self._changed_at,
            "taken": self._changes,
            "changing": changing,
            "refused": self._refusal,
        }

    def families(self) -> list[Metric]:
        """Return the families of GET /metrics."""
        text = "1 while the newest live config is not the one that is served."
        return [
            gauge("live_config_refused", text, {(): 1 if self._refusal else 0}),
            counter("live_config_changes", "Live configs taken.", {(): self._changes}),
        ]

    async def _follow(self) -> None:
        while self._next_config is not None:
            tree, self._next_config = self._next_config, None
            try:
                await self._persist(tree)
            except ApiError as error:
                log.warning("live config %s is refused, the one before stays: %s", digest(tree), error)

    async def _persist(self, tree: Mapping[str, Any]) -> None:
        """Take it, however long the store or the engines can't answer; ends early where another one comes."""
        while True:
            try:
                await self._take(tree)
            except ApiError as error:
                waits = error.status >= 500
                self._refusal = {"config": digest(tree), "why": str(error), "code": error.code, "waits": waits}
                if not waits:
                    raise
            else:
                self._refusal = None
                return
            await asyncio.sleep(RETRY_S)
            if self._next_config is not None:
                return

    async def _take(self, tree: Mapping[str, Any]) -> None:
        """Raises ApiError; then everything is as it was."""
        before = self.spec
        try:
            spec = with_live(before, tree)
        except ConfigError as error:
            raise ApiError(400, error.text(), code="invalid_config") from None
        await self.experiments.check(spec.experiments, Catalog(spec))
        arms = [arm.model_dump(mode="json") for arm in spec.arms]
        await self._backend.each("prepare", arms, list(spec.adapters))
        self._apply(spec)
        try:
            for experiment in spec.experiments:
                was = next((one for one in before.experiments if one.name == experiment.name), None)
                await self.experiments.declare(experiment, was)
        except ApiError:
            self._apply(before)
            raise
        with as_api_errors():
            await asyncio.to_thread(Store(spec.root).write_json, live_of(spec), FOLDER, spec.name, FILE)
        self._changes, self._changed_at = self._changes + 1, time.time()

    def _apply(self, spec: ServeSpec) -> None:
        """No `await` here: between two requests."""
        self.spec = spec
        self.catalog.take(spec)
        self.limits.take(spec.limits)


FOLDER, FILE = "serving", "live.json"


def with_live(spec: ServeSpec, tree: Mapping[str, Any]) -> ServeSpec:
    """The spec with these live keys. Raises ConfigError for others, or where they do not fit the rest of it."""
    foreign = sorted(set(tree) - set(LIVE))
    if foreign:
        raise ConfigError(
            f"live config: {foreign[0]}",
            "not a live key",
            f"what may change is {', '.join(LIVE)}",
            "change the spec itself: its engines start again",
        )
    fixed = {key: value for key, value in spec.model_dump(mode="json").items() if key not in LIVE}
    return validate(ServeSpec, {**fixed, **tree}, where="live config")


def live_of(spec: ServeSpec) -> Json:
    """Its live keys."""
    return {key: value for key, value in spec.model_dump(mode="json").items() if key in LIVE}


def digest(tree: Mapping[str, Any]) -> str:
    """Return the name of a live config in messages and in GET /v1/admin/config."""
    return hashlib.sha256(canonical_json(dict(tree)).encode()).hexdigest()[:10]


def read_live_record(spec: ServeSpec) -> ServeSpec | None:
    """The spec with what was last taken; None where nothing was, or nothing that this version understands.

    Raises StorageError.
    """
    data = Store(spec.root).find_bytes(FOLDER, spec.name, FILE)
    if data is None:
        return None
    try:
        return with_live(spec, Store(spec.root).read_json(FOLDER, spec.name, FILE))
    except ConfigError:
        return None
