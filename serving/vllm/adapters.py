"""Adapter versions in vLLM: the ids under which it holds them, their holders, and what it would misread. Any thread.

Every load of a version gets an integer id and a name that were never used before. vLLM keys its prefix cache by the
name and its adapter slots by the id, so no later version can meet an earlier one's keys and values or weights, and
`load_inplace` (read again from disk at every step: vllm-project/vllm#33791) is never needed.

vLLM 0.29 takes r, lora_alpha, target_modules, bias, modules_to_save, use_rslora and use_dora from adapter_config.json
(`vllm/lora/peft_helper.py`) and passes over every other key without a word; a `rank_pattern` or `alpha_pattern` would
give wrong answers. So all keys but those that change no served weight must be at the value that does nothing.
"""

import itertools
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.errors import ArtifactError
from graftwork.serving.engine.adapters.weights_file import read_bytes, read_tensors
from graftwork.serving.engine.request import SlotState

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


@dataclass(frozen=True)
class LoadedLora:
    """One load of a version, as vLLM knows it."""

    version: str
    number: int
    """`lora_int_id`, from 1."""
    folder: Path
    rank: int
    size_bytes: int

    @property
    def name(self) -> str:
        """`lora_name`: never used twice, even when the same version is loaded again."""
        return f"{self.version}#{self.number}"


@dataclass
class _LoraSlot:
    lora: LoadedLora
    holders: int = 0
    retired: bool = False


class Loras:
    """The table. A `LoadedLora` that a method returns for removal is used by nobody any more: the caller tells vLLM."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._slots: dict[str, _LoraSlot] = {}  # least recently used first

    def new(self, version: str, folder: Path, rank: int, size_bytes: int) -> LoadedLora:
        """A fresh id for a load that is about to happen."""
        return LoadedLora(version, next(self._numbers), folder, rank, size_bytes)

    def revive(self, version: str) -> LoadedLora | None:
        """The version where it is loaded already; it takes new requests (again)."""
        with self._lock:
            slot = self._slots.get(version)
            if slot is None:
                return None
            slot.retired = False
            return slot.lora

    def add(self, lora: LoadedLora) -> None:
        """vLLM has loaded it."""
        with self._lock:
            assert lora.version not in self._slots, "one load of a version at a time"
            self._slots[lora.version] = _LoraSlot(lora)

    def retire(self, version: str) -> LoadedLora | None:
        """No new holder. Returns it where nobody holds it. ArtifactError for a version that is not loaded."""
        with self._lock:
            slot = self._find(version)
            slot.retired = True
            return self._drop_if_done(slot)

    def acquire(self, version: str) -> LoadedLora:
        """Holds the version for one request. ArtifactError where it is not loaded or retired."""
        with self._lock:
            slot = self._find(version)
            if slot.retired:
                raise ArtifactError(f"adapter {version}", "retired", "a retired version takes no new requests")
            slot.holders += 1
            self._slots[version] = self._slots.pop(version)
            return slot.lora

    def release(self, lora: LoadedLora) -> LoadedLora | None:
        """Lets go of what `acquire` returned. Returns it where that was the last hold on a retired version."""
        with self._lock:
            slot = self._slots[lora.version]
            slot.holders -= 1
            return self._drop_if_done(slot)

    def states(self) -> list[SlotState]:
        """Loaded versions, least recently used first."""
        with self._lock:
            return [
                SlotState(version, slot.lora.rank, slot.lora.size_bytes, slot.holders, slot.retired)
                for version, slot in self._slots.items()
            ]

    def _find(self, version: str) -> _LoraSlot:
        if version not in self._slots:
            rule = "a request names a loaded version"
            raise ArtifactError(f"adapter {version}", "not loaded", rule, "load it first")
        return self._slots[version]

    def _drop_if_done(self, slot: _LoraSlot) -> LoadedLora | None:
        if slot.retired and slot.holders == 0:
            del self._slots[slot.lora.version]
            return slot.lora
        return None
