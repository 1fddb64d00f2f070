"""adapter_config.json as data: read once, every key honoured, known to be without effect here, or refused by name."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from graftwork.artifact_check import CONFIG_FILE, MAX_TEXT_BYTES
from graftwork.errors import ArtifactError
from graftwork.serving.engine.adapter_bytes import read_bytes
from graftwork.serving.engine.adapters.pattern import pattern_problem

Names = tuple[str, ...] | str
"""Name suffixes, or one regular expression, or "all-linear"."""

BOOKKEEPING = frozenset(
    {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
)
"""Keys of every kind that decide nothing about the answers."""


@dataclass(frozen=True)
class ConfigFile:
    """The parsed file. `path` begins its errors."""

    path: Path
    values: Mapping[str, object]

    @classmethod
    def read(cls, folder: Path, sha256: str | None = None) -> "ConfigFile":
        """Raises ArtifactError where it is no JSON object, or not the file that the manifest names."""
        path = folder / CONFIG_FILE
        data = read_bytes(path, sha256, most=MAX_TEXT_BYTES)
        try:
            config = json.loads(data.decode())
        except (ValueError, RecursionError) as error:
            rule = "an adapter folder holds a readable adapter_config.json"
            raise ArtifactError(str(path), str(error), rule) from error
        if not isinstance(config, dict):
            raise ArtifactError(str(path), type(config).__name__, "adapter_config.json holds one JSON object")
        return cls(path, config)

    def make_error(self, key: str, rule: str, hint: str | None = None, value: object = None) -> ArtifactError:
        """The error for one key. value: the part of it that is wrong, where not all of it is."""
        text = repr(self.values.get(key) if value is None else value)
        found = f"{key}={text if len(text) < 120 else text[:117] + '...'}"
        move = hint or f"train the adapter without {key}, or serve it merged as its own base"
        return ArtifactError(str(self.path), found, rule, move)

    def require_known(self, honoured: Iterable[str], idle: Iterable[str], why: Mapping[str, str]) -> None:
        """Refuses every key that is neither honoured, nor idle here, nor at a value with which peft does nothing."""
        known = BOOKKEEPING.union(honoured, idle)
        for key, value in self.values.items():
            if key not in known and value and not (key == "bias" and value == "none"):
                raise self.make_error(key, why.get(key, "this setting is not served"))

    def names(self, key: str) -> Names:
        """A list of module names, or one regular expression."""
        return self._names(key, self.values.get(key))

    def optional_names(self, key: str) -> Names:
        """The same, where the key may be absent, null or empty."""
        return self._names(key, self.values.get(key) or [])

    def numbers(self, key: str) -> dict[str, float]:
        """A mapping of module patterns to numbers; absent and null are empty."""
        value = self.values.get(key)
        if value is None:
            return {}
        if isinstance(value, dict) and all(is_positive(number) for number in value.values()):
            for pattern in value:
                self._require_quick(key, pattern)
            return dict(value)
        raise self.make_error(key, f"{key} maps module patterns to numbers above 0")

    def positive_int(self, key: str, default: int | None = None) -> int:
        """A whole number from 1."""
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.make_error(key, f"{key} is a whole number from 1")
        return value

    def _require_quick(self, key: str, pattern: str) -> None:
        if problem := pattern_problem(pattern):
            raise self.make_error(key, problem, "write the module names out", pattern)

    def _names(self, key: str, value: object) -> Names:
        if isinstance(value, str):
            if value != "all-linear":
                self._require_quick(key, value)
            return value
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            return tuple(value)
        raise self.make_error(key, f"{key} is a list of names or one regular expression")


def is_positive(number: object) -> TypeGuard[int | float]:
    """Whether it is a number above 0 that a float32 holds; JSON as Python reads it has NaN and Infinity too."""
    return isinstance(number, int | float) and not isinstance(number, bool) and 0 < number < 3e38


@dataclass(frozen=True)
class Targets:
    """Which linears peft puts an adapter on."""

    names: Names
    excluded: Names
    some_layers: bool
    """Only some layers are adapted (`layers_to_transform`)."""

    @classmethod
    def from_config(cls, config: ConfigFile) -> "Targets":
        """From target_modules, exclude_modules and layers_to_transform."""
        some = config.values.get("layers_to_transform") is not None
        return cls(config.names("target_modules"), config.optional_names("exclude_modules"), some)

    def include(self, module: str) -> bool:
        """Whether peft would put an adapter on this linear."""
        if self.excluded and matches_module(self.excluded, module):
            return False
        return self.names == "all-linear" or matches_module(self.names, module)

    def check(self, found: Iterable[str], linears: Iterable[str], config: ConfigFile, weights: Path) -> None:
        """What the config targets, what the file holds and what the base has must agree."""
        held, base = set(found), set(linears)
        rule = "an adapter sits on the base's inner linears (not on embeddings or the output layer)"
        _refuse_any(held - base, "target", rule, weights)
        targeted = {name for name in base if self.include(name)}
        _refuse_any(held - targeted, "weights for", "every tensor belongs to a module of target_modules", weights)
        if not self.some_layers:
            rule = "every module that target_modules names has its tensors"
            _refuse_any(targeted - held, "no weights for", rule, weights)
        for name in self.names if isinstance(self.names, tuple) else ():
            if not any(matches_module((name,), module) for module in base):
                raise config.make_error("target_modules", "every target is a linear of the base", value=name)


def matches_module(names: Sequence[str] | str, module: str) -> bool:
    """Whether a list of suffixes, or a regular expression, means this module."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _refuse_any(modules: set[str], what: str, rule: str, weights: Path) -> None:
    if modules:
        raise ArtifactError(str(weights), f"{what} {min(modules)} ({len(modules)} such)", rule)
