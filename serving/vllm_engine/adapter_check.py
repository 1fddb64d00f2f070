"""What vLLM would misread in an adapter is refused before it reads it.

vLLM 0.29 takes r, lora_alpha, target_modules, bias, modules_to_save, use_rslora and use_dora from adapter_config.json
(`vllm/lora/peft_helper.py`) and passes over every other key without a word; a `rank_pattern` or `alpha_pattern` would
give wrong answers. So all keys but those that change no served weight must be at the value that does nothing.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.errors import ArtifactError
from graftwork.serving.engine.adapter_bytes import read_bytes, read_tensors

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
_READ_BY_VLLM = frozenset({"peft_type", "task_type", "r", "lora_alpha", "use_rslora", "target_modules"})
_WITHOUT_EFFECT = frozenset(
    {"auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout"}
    | {"megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"}
    | {"runtime_config", "ensure_weight_tying", "exclude_modules", "layers_to_transform", "layers_pattern"}
)
"""Training and bookkeeping; which modules are adapted is read from the weights' names."""
_NEUTRAL_INIT = (True, False, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the base as it is."""


@dataclass(frozen=True)
class Checked:
    """An adapter that vLLM serves as PEFT would."""

    rank: int
    size_bytes: int
    """Of its weights."""


def check_adapter(folder: Path, digests: Mapping[str, str] | None, *, max_rank: int) -> Checked:
    """Reads the folder, compares sha256 where given, and refuses by key. Raises ArtifactError."""
    digests = digests or {}
    path = folder / CONFIG_FILE
    try:
        config = json.loads(read_bytes(path, digests.get(CONFIG_FILE), most=MAX_CONFIG_BYTES))
    except ValueError as error:
        raise ArtifactError(str(path), str(error), "adapter_config.json holds one JSON object") from error
    rank = _rank(config, path, max_rank)
    tensors = read_tensors(folder / WEIGHTS_FILE, digests.get(WEIGHTS_FILE))
    return Checked(rank, sum(tensor.nbytes for tensor in tensors.values()))


def _rank(config: Any, path: Path, max_rank: int) -> int:
    if not isinstance(config, dict):
        raise ArtifactError(str(path), type(config).__name__, "adapter_config.json holds one JSON object")
    if config.get("peft_type") != "LORA":
        raise _refused(path, "peft_type", config.get("peft_type"), "vLLM serves LoRA adapters")
    if config.get("init_lora_weights", True) not in _NEUTRAL_INIT:
        raise _refused(path, "init_lora_weights", config["init_lora_weights"], "it changes the base weights")
    for key, value in config.items():
        neutral = not value or (key, value) == ("bias", "none") or key == "init_lora_weights"
        if key not in _READ_BY_VLLM and key not in _WITHOUT_EFFECT and not neutral:
            raise _refused(path, key, value, "vLLM does not honour it")
    rank = config.get("r", 8)
    if not isinstance(rank, int) or rank < 1 or rank > max_rank:
        raise _refused(path, "r", rank, f"ranks are from 1 to engine.max_rank={max_rank}")
    return rank


def _refused(path: Path, key: str, value: object, rule: str) -> ArtifactError:
    return ArtifactError(str(path), f"{key}={value!r:.120}", rule, "serve it with engine.kind=graftwork")
