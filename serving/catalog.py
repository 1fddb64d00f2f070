"""Model names of the endpoint: the base, `BASE:task[@ref]`, `arm/NAME`; each means one arm record."""

import re
from datetime import datetime
from pathlib import PurePosixPath

from graftwork.serving.api_error import ApiError, unknown_model
from graftwork.serving.arms import Dump
from graftwork.serving.openai_responses import Json, model_card
from graftwork.serving.spec import ArmSpec, ServeSpec
from graftwork.storage import ALIAS_PATTERN

DEFAULT_ALIAS = "latest"
"""`BASE:task` means `BASE:task@latest`."""


def base_name(uri: str) -> str:
    """The base's model name: the last part of its URI, e.g. `SmolLM2.Q4_1` for `pypi://pkg/SmolLM2.Q4_1.gguf`."""
    return PurePosixPath(uri.rstrip("/")).name.removesuffix(".gguf")


class Catalog:
    """What one endpoint answers to."""

    def __init__(self, spec: ServeSpec) -> None:
        self.base = base_name(spec.base.uri)
        self._embedder = spec.embedder.model_name if spec.embedder else None
        self.changes = 0
        self.take(spec)

    def take(self, spec: ServeSpec) -> None:
        """Answer to these arms from now on."""
        self.changes += 1
        self._arms = {f"arm/{arm.name}": arm for arm in spec.arms}

    def arm(self, model: str) -> ArmSpec:
        """The arm behind a model name. Raises ApiError 404; whether its adapter exists is found out by the replica."""
        if model in self._arms:
            return self._arms[model]
        if model == self.base:
            return ArmSpec(name="base", max_new_tokens=None)
        if not model.startswith(f"{self.base}:"):
            raise self._unknown(model)
        return ArmSpec(name="adapter", adapter=self.ref(model), max_new_tokens=None)

    def ref(self, name: str) -> str:
        """`task@ref` from `task`, `task@ref` or either with `BASE:` before it. Raises ApiError 404 for no such form."""
        task = name.removeprefix(f"{self.base}:")
        ref = task if "@" in task else f"{task}@{DEFAULT_ALIAS}"
        if not re.fullmatch(ALIAS_PATTERN, ref):
            raise self._unknown(name)
        return ref

    def require_embedder(self, model: str) -> None:
        """Raises ApiError 404 for any model but the endpoint's embedder."""
        if self._embedder is None:
            raise unknown_model(model, "This endpoint has no embedder: its spec names one as `embedder:`.")
        if model != self._embedder:
            raise unknown_model(model, f"The embedder here: {self._embedder}.")

    def cards(self, adapters: list[Dump], created: int) -> list[Json]:
        """GET /v1/models: the base, the arms, each adapter by alias and version (`EngineReplica.models`).

        `created` is for base and arms.
        """
        cards = [model_card(self.base, created)]
        cards += [model_card(self._embedder, created, kind="embedder")] if self._embedder else []
        cards += [model_card(name, created, adapter=arm.adapter) for name, arm in self._arms.items()]
        for adapter in adapters:
            task, version, aliases = adapter["task"], adapter["version"], adapter["aliases"]
            names = [f"{self.base}:{task}"] if DEFAULT_ALIAS in aliases else []
            names += [f"{self.base}:{task}@{ref}" for ref in [*aliases, version]]
            stamp = seconds(adapter["created_at"])
            cards += [model_card(name, stamp, adapter=task, adapter_version=version) for name in names]
        return cards

    def forms(self) -> str:
        """The names that models have here, as a sentence."""
        return f"Models here: {', '.join([self.base, f'{self.base}:TASK', f'{self.base}:TASK@ALIAS', *self._arms])}."

    def _unknown(self, model: str) -> ApiError:
        return unknown_model(model, f"{self.forms()} GET /v1/models lists them all.")


def seconds(created_at: str) -> int:
    """Unix seconds of an ISO 8601 time."""
    return int(datetime.fromisoformat(created_at).timestamp())
