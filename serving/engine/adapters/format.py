"""Forms of an adapter: its changes of the base as tensors, and adapter_config.json as data.

A reader fills `AdapterWeights` from files; the engine applies it row by row. Every key of the config is honoured, known
to be without effect here, or rejected by name. Its regular expressions come with a file: slow ones are not run.
Legend: R rank, I in, O out, K replaced rows, H hidden, N virtual tokens, V vocabulary, D head size.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

import torch

from graftwork.artifacts.verify import CONFIG_FILE, MAX_TEXT_BYTES
from graftwork.errors import ArtifactError
from graftwork.serving.engine.adapters.weights_file import read_bytes


@dataclass(frozen=True)
class LinearShape:
    """in and out features of one linear of the base."""

    in_features: int
    out_features: int


@dataclass(frozen=True)
class SiteWeights:
    """LoRA of one linear. a_RI: [rank, in], b_OR: [out, rank]; delta(x) = (x @ a.T @ b.T) * scaling.

    Both in the engine's dtype, or both in the narrower one that they were saved in: see `read_adapter`.
    """

    a_RI: torch.Tensor
    b_OR: torch.Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return int(self.a_RI.shape[0])

    def widened(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """a_RI and b_OR in the engine's dtype; the same tensors where they have it."""
        return self.a_RI.to(dtype), self.b_OR.to(dtype)


@dataclass(frozen=True)
class ExpertLora:
    """LoRA of the experts of one parameter. a_ERI: [experts, rank, in], b_EOR: [experts, out, rank], as `SiteWeights`
    has them for one linear."""

    a_ERI: torch.Tensor
    b_EOR: torch.Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return int(self.a_ERI.shape[1])


@dataclass(frozen=True)
class SiteScale:
    """Channels of one linear, multiplied: inputs by input_I, results by output_O (both fp32; None: left as they are).

    dora: the LoRA part, not multiplied, for prompts: `base + (output - 1) * (base - bias) + output * delta` is peft's
    order. bias_O is the base's, which DoRA leaves as it is and IA3 multiplies (None there).
    """

    input_I: torch.Tensor | None = None
    output_O: torch.Tensor | None = None
    bias_O: torch.Tensor | None = None
    dora: SiteWeights | None = None


@dataclass(frozen=True)
class SiteBottleneck:
    """A network behind one linear: `result + up(activation(down(result))) * scaling`."""

    down_RO: torch.Tensor
    down_bias_R: torch.Tensor | None
    up_OR: torch.Tensor
    up_bias_O: torch.Tensor | None
    activation: str
    scaling: float


@dataclass(frozen=True)
class InputRows:
    """Embedding rows that replace the base's."""

    rows_KH: torch.Tensor
    """Results of the embedding layer, its own scale included."""
    places: Mapping[int, int] | None
    """Row of each token id; None: rows_KH is a whole matrix, a row a token id."""


@dataclass(frozen=True)
class OutputRows:
    """Rows of the output layer that replace the base's."""

    rows_KH: torch.Tensor
    ids_K: torch.Tensor | None
    """Token ids of the rows; None: rows_KH is a whole matrix."""
    bias_V: torch.Tensor | None = None


@dataclass(frozen=True)
class VirtualTokens:
    """Places before the first prompt token: `tokens` places of the KV row, either given or to be computed."""

    count: int
    keys: tuple[torch.Tensor, ...] = ()
    """A layer each, [Hkv, N, D]: prefix tuning. Empty: computed from embeddings_NH."""
    values: tuple[torch.Tensor, ...] = ()
    embeddings_NH: torch.Tensor | None = None
    """Inputs in place of word embeddings: prompt tuning."""


@dataclass(frozen=True)
class AdapterWeights:
    """All that one adapter changes, on the CPU as its reader leaves it. Every part may be absent."""

    linears: Mapping[str, SiteWeights] = field(default_factory=dict)
    """By linear. For DoRA lora_B is already multiplied by the channel's scale."""
    scales: Mapping[str, SiteScale] = field(default_factory=dict)
    bottlenecks: Mapping[str, SiteBottleneck] = field(default_factory=dict)
    experts: Mapping[str, ExpertLora] = field(default_factory=dict)
    """By parameter: `model.layers.0.mlp.experts.down_proj`."""
    routers: Mapping[str, SiteWeights] = field(default_factory=dict)
    """By router: `model.layers.0.mlp.gate`."""
    inputs: InputRows | None = None
    outputs: OutputRows | None = None
    virtual_tokens: VirtualTokens | None = None

    @property
    def rank(self) -> int:
        """Largest LoRA rank, or bottleneck, over its linears and experts; 0 without either."""
        sizes = [site.rank for site in (*self.linears.values(), *self.routers.values())]
        sizes += [one.rank for one in self.experts.values()]
        return max([*sizes, *(len(site.down_RO) for site in self.bottlenecks.values())], default=0)


@dataclass(frozen=True)
class ReadOptions:
    """Settings of the engine that a reader needs."""

    max_rank: int
    """Largest LoRA rank, and largest bottleneck."""
    dtype: torch.dtype
    """Of the weights that are read."""
    narrow: bool = False
    """Plain LoRA that was saved in bf16 stays so, in half the memory: widened where it is used, it has the same
    values."""


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

    def names(self, key: str, *, optional: bool = False) -> Names:
        """A list of module names, or one regular expression. optional: absent, null and empty are []."""
        value = self.values.get(key) or ([] if optional else self.values.get(key))
        if isinstance(value, str):
            if value != "all-linear":
                self._require_quick(key, value)
            return value
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            return tuple(value)
        raise self.make_error(key, f"{key} is a list of names or one regular expression")

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


def is_positive(number: object) -> TypeGuard[int | float]:
    """True: it is a number above 0 that a float32 holds; JSON as Python reads it has NaN and Infinity too."""
    return isinstance(number, int | float) and not isinstance(number, bool) and 0 < number < 3e38


@dataclass(frozen=True)
class Targets:
    """Linears that peft puts an adapter on."""

    names: Names
    excluded: Names
    some_layers: bool
    """Only some layers are adapted (`layers_to_transform`)."""
    parameters: tuple[str, ...] = ()
    """Ends of names of parameters (`target_parameters`): NAME.weight means a linear, others mean experts."""

    @classmethod
    def from_config(cls, config: ConfigFile) -> "Targets":
        """From target_modules, exclude_modules and layers_to_transform."""
        some = config.values.get("layers_to_transform") is not None
        parameters = config.names("target_parameters", optional=True)
        if isinstance(parameters, str):
            raise config.make_error("target_parameters", "target_parameters is a list of names")
        modules, excluded = config.names("target_modules"), config.names("exclude_modules", optional=True)
        return cls(modules, excluded, some, parameters)

    def include(self, module: str) -> bool:
        """True: peft would put an adapter on this linear."""
        if self.parameters and matches_module(self.parameters, f"{module}.weight"):
            return True
        if self.excluded and matches_module(self.excluded, module):
            return False
        return self.names == "all-linear" or matches_module(self.names, module)

    def check(self, found: Iterable[str], linears: Iterable[str], config: ConfigFile, weights: Path) -> None:
        """Refuses a file whose modules differ from what the config targets and the base has."""
        present, base = set(found), set(linears)
        rule = "an adapter sits on the base's inner linears (not on embeddings or the output layer)"
        _refuse_any(present - base, "target", rule, weights)
        targeted = {name for name in base if self.include(name)}
        _refuse_any(present - targeted, "weights for", "every tensor belongs to a module of target_modules", weights)
        if not self.some_layers:
            rule = "every module that target_modules names has its tensors"
            _refuse_any(targeted - present, "no weights for", rule, weights)
        for name in self.names if isinstance(self.names, tuple) else ():
            if not any(matches_module((name,), module) for module in base):
                raise config.make_error("target_modules", "every target is a linear of the base", value=name)


def matches_module(names: Sequence[str] | str, module: str) -> bool:
    """True: a list of suffixes, or a regular expression, means this module."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _refuse_any(modules: set[str], what: str, rule: str, weights: Path) -> None:
    if modules:
        raise ArtifactError(str(weights), f"{what} {min(modules)} ({len(modules)} such)", rule)


_REPEATED_GROUP = re.compile(r"\)(?:[*+]|\{)")
_UNBOUNDED = re.compile(r"(?<!\\)(?:[*+]|\{\d*,\d*\})")
MAX_LENGTH, MAX_UNBOUNDED = 1024, 3


def pattern_problem(pattern: str) -> str | None:
    """Why a pattern is not run: it doesn't compile, or it could take long to fail on a name; None where it may be.

    A repeated group can take exponential time; each further `*` or `+` multiplies the time by the name's length.
    """
    if len(pattern) > MAX_LENGTH:
        return f"{len(pattern)} characters, at most {MAX_LENGTH} are read"
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"no regular expression: {error}"
    if _REPEATED_GROUP.search(pattern):
        return "a group is repeated, which can take exponential time"
    if len(_UNBOUNDED.findall(pattern)) > MAX_UNBOUNDED:
        return f"more than {MAX_UNBOUNDED} unbounded repetitions"
    return None
