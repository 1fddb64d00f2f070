"""Which adapter versions vLLM holds, under which of its ids, and who still needs them. Any thread.

Every load of a version gets an integer id and a name that were never used before. vLLM keys its prefix cache by the
name and its adapter slots by the id, so no later version can meet an earlier one's keys and values or weights, and
`load_inplace` (read again from disk at every step: vllm-project/vllm#33791) is never needed.
"""

import itertools
import threading
from dataclasses import dataclass
from pathlib import Path

from graftwork.errors import ArtifactError
from graftwork.serving.engine.types import SlotState


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
