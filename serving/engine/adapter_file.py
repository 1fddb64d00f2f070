"""Reads a PEFT LoRA folder for serving: every key of its config is honoured or refused by name, every tensor is placed.

The reference for what a key means is peft 0.21 (`peft/tuners/lora/{config,model,layer}.py`).
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from graftwork.artifact_check import MAX_TEXT_BYTES
from graftwork.errors import ArtifactError
from graftwork.serving.engine.adapter_bytes import read_bytes, read_tensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_TENSOR_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])\.weight$")

_HONOURED = frozenset(
    {"peft_type", "task_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"}
    | {"exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights"}
)
_WITHOUT_EFFECT_HERE = frozenset(
    {"auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout"}
    | {"megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"}
    | {"runtime_config", "ensure_weight_tying"}
)
"""Training and bookkeeping only. `loftq_config` and its kin act through `init_lora_weights`, which is checked."""
_NEUTRAL_INIT = (True, False, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the base weights as they are; pissa, olora, corda, loftq, ... change the base itself."""
_WHY_REFUSED = {
    "use_dora": "DoRA rescales the base weight per column",
    "bias": "trained biases would replace the base's for every request",
    "lora_bias": "a bias on lora_B is not applied",
    "modules_to_save": "whole trained modules would replace the base's for every request",
    "trainable_token_indices": "trained token rows would replace the base's embeddings",
    "target_parameters": "only linear modules take an adapter",
    "layer_replication": "replicated layers make another base model",
    "alora_invocation_tokens": "activated LoRA switches on in the middle of a sequence",
    "fan_in_fan_out": "the base's linears store [out, in]",
    "megatron_config": "Megatron's parallel linears are not used here",
}


@dataclass(frozen=True)
class LinearShape:
    """in and out features of one linear of the base."""

    in_features: int
    out_features: int


@dataclass(frozen=True)
class SiteWeights:
    """The adapter of one linear. a_RI: [rank, in], b_OR: [out, rank]; delta(x) = (x @ a.T @ b.T) * scaling."""

    a_RI: torch.Tensor
    b_OR: torch.Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return int(self.a_RI.shape[0])


@dataclass(frozen=True)
class LoraSettings:
    """The keys of adapter_config.json that decide the delta."""

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]
    targets: tuple[str, ...] | str
    """Name suffixes, or one regular expression, or "all-linear"."""
    excluded: tuple[str, ...] | str
    some_layers: bool
    """Only some layers are adapted (`layers_to_transform`)."""

    def rank_of(self, module: str) -> int:
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def scaling_of(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA (arXiv 2312.03732)."""
        alpha, rank = _by_pattern(self.alpha_pattern, module, self.alpha), self.rank_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def targets_module(self, module: str) -> bool:
        """Whether peft would put an adapter on this linear."""
        if self.excluded and _named(self.excluded, module):
            return False
        return self.targets == "all-linear" or _named(self.targets, module)


def read_adapter(
    folder: Path,
    linears: Mapping[str, LinearShape],
    *,
    max_rank: int,
    dtype: torch.dtype,
    digests: Mapping[str, str] | None = None,
) -> dict[str, SiteWeights]:
    """Weights per linear's name, on the CPU in `dtype`. `linears` are the base's linears that can take an adapter.

    digests: sha256 by file name (the manifest's), taken over the very bytes that are used.
    Raises ArtifactError that names the key, what was found and the rule, for anything that cannot be served exactly.
    """
    known = digests or {}
    settings = read_settings(folder, known.get(CONFIG_FILE))
    tensors = read_tensors(folder / WEIGHTS_FILE, known.get(WEIGHTS_FILE))
    pairs = _pair_up(tensors, folder)
    _check_sites(settings, pairs, linears, folder)
    return {
        module: _site(settings, module, halves, linears[module], max_rank, dtype, folder)
        for module, halves in pairs.items()
    }


def read_settings(folder: Path, sha256: str | None = None) -> LoraSettings:
    """Parses adapter_config.json; refuses every key that this engine cannot honour."""
    path = folder / CONFIG_FILE
    data = read_bytes(path, sha256, most=MAX_TEXT_BYTES)
    try:
        config = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ArtifactError(str(path), str(error), "an adapter folder holds a readable adapter_config.json") from error
    if not isinstance(config, dict):
        raise ArtifactError(str(path), type(config).__name__, "adapter_config.json holds one JSON object")
    if config.get("peft_type") != "LORA":
        raise _refused(path, "peft_type", config.get("peft_type"), "the engine serves LoRA adapters")
    if config.get("init_lora_weights", True) not in _NEUTRAL_INIT:
        why = "this initialisation changes the base weights; convert the adapter to plain LoRA when saving it"
        raise _refused(path, "init_lora_weights", config["init_lora_weights"], why)
    for key, value in config.items():
        if key not in _HONOURED and key not in _WITHOUT_EFFECT_HERE and not _is_neutral(key, value):
            raise _refused(path, key, value, _WHY_REFUSED.get(key, "this setting is not served"))
    return _settings(config, path)


def _settings(config: Mapping[str, object], path: Path) -> LoraSettings:
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    if not isinstance(rank, int) or rank < 1:
        raise _refused(path, "r", rank, "the rank is a whole number from 1")
    if not isinstance(alpha, int | float):
        raise _refused(path, "lora_alpha", alpha, "alpha is a number")
    return LoraSettings(
        rank=rank,
        alpha=float(alpha),
        use_rslora=bool(config.get("use_rslora", False)),
        rank_pattern=_pattern(config.get("rank_pattern"), path, "rank_pattern"),
        alpha_pattern=_pattern(config.get("alpha_pattern"), path, "alpha_pattern"),
        targets=_names(config.get("target_modules"), path, "target_modules"),
        excluded=_names(config.get("exclude_modules") or [], path, "exclude_modules"),
        some_layers=config.get("layers_to_transform") is not None,
    )


def _is_neutral(key: str, value: object) -> bool:
    """A key at the value with which peft does nothing."""
    return not value or (key == "bias" and value == "none")


def _refused(path: Path, key: str, value: object, rule: str) -> ArtifactError:
    text = repr(value)
    found = f"{key}={text if len(text) < 120 else text[:117] + '...'}"
    return ArtifactError(str(path), found, rule, f"train the adapter without {key}, or serve it merged as its own base")


def _names(value: object, path: Path, key: str) -> tuple[str, ...] | str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise _refused(path, key, value, f"{key} is a list of names or one regular expression")


def _pattern(value: object, path: Path, key: str) -> dict[str, float]:
    if value is None:
        return {}
    if isinstance(value, dict) and all(isinstance(number, int | float) for number in value.values()):
        return dict(value)
    raise _refused(path, key, value, f"{key} maps module patterns to numbers")


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """peft's `get_pattern_key`: the first pattern that matches the end of the name at a dot."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _named(names: Sequence[str] | str, module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _pair_up(tensors: Mapping[str, torch.Tensor], folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """{module: {"A": tensor, "B": tensor}}; a tensor that is neither, or half a pair, is refused."""
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _TENSOR_KEY.match(key)
        if match is None:
            rule = "the weights hold only base_model.model.MODULE.lora_A.weight and .lora_B.weight"
            raise ArtifactError(str(folder / WEIGHTS_FILE), f"tensor {key}", rule)
        pairs.setdefault(match["module"], {})[match["half"]] = tensor
    for module, halves in pairs.items():
        if len(halves) != 2:
            missing = ({"A", "B"} - set(halves)).pop()
            raise ArtifactError(str(folder / WEIGHTS_FILE), f"{module} has no lora_{missing}", "A and B come in pairs")
    if not pairs:
        raise ArtifactError(str(folder / WEIGHTS_FILE), "no tensors", "an adapter adapts at least one linear")
    return pairs


def _check_sites(
    settings: LoraSettings, pairs: Mapping[str, object], linears: Mapping[str, LinearShape], folder: Path
) -> None:
    """What the config targets, what the file holds and what the base has must agree."""
    unknown = sorted(set(pairs) - set(linears))
    if unknown:
        rule = "an adapter sits on the base's inner linears (not on embeddings or the output layer)"
        raise ArtifactError(str(folder / WEIGHTS_FILE), f"target {unknown[0]} ({len(unknown)} such)", rule)
    targeted = {name for name in linears if settings.targets_module(name)}
    stray = sorted(set(pairs) - targeted)
    if stray:
        rule = "every tensor belongs to a module that target_modules names"
        raise ArtifactError(str(folder / WEIGHTS_FILE), f"weights for {stray[0]} ({len(stray)} such)", rule)
    absent = sorted(targeted - set(pairs))
    if absent and not settings.some_layers:
        rule = "every module that target_modules names has its tensors"
        raise ArtifactError(str(folder / WEIGHTS_FILE), f"no weights for {absent[0]} ({len(absent)} such)", rule)
    if isinstance(settings.targets, tuple):
        for name in settings.targets:
            if not any(_named((name,), module) for module in linears):
                raise _refused(folder / CONFIG_FILE, "target_modules", name, "every target is a linear of the base")


def _site(
    settings: LoraSettings,
    module: str,
    halves: Mapping[str, torch.Tensor],
    shape: LinearShape,
    max_rank: int,
    dtype: torch.dtype,
    folder: Path,
) -> SiteWeights:
    a_RI, b_OR, rank = halves["A"], halves["B"], settings.rank_of(module)
    expected = ((rank, shape.in_features), (shape.out_features, rank))
    if rank > max_rank:
        next_move = f"raise engine.max_rank to {rank}"
        raise ArtifactError(f"{folder}: {module}", f"r={rank}", f"ranks go up to engine.max_rank={max_rank}", next_move)
    if (tuple(a_RI.shape), tuple(b_OR.shape)) != expected:
        found = f"A {list(a_RI.shape)}, B {list(b_OR.shape)}"
        rule = f"this base and r={rank} need A {list(expected[0])}, B {list(expected[1])}"
        raise ArtifactError(f"{folder}: {module}", found, rule, "serve the adapter on the base it was trained on")
    return SiteWeights(a_RI.to(dtype), b_OR.to(dtype), settings.scaling_of(module))
