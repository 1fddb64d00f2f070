"""Peaks that were measured on this machine, over their predictions: plans of the same kind of run are raised by them.

A kind is objective, adapter and quantisation on one device. Runs of one kind differ by their rows alone, which the
formulas count, and by what an allocator keeps of rows of changing lengths, which varies from run to run.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from graftwork.storage import cache_root
from graftwork.training.spec import TrainSpec

MOST = 1.5
"""A larger ratio says that something else is wrong than a constant, and is not followed further."""
RUNS = 5
"""The newest runs of a kind that count."""


@dataclass(frozen=True)
class Correction:
    """The largest of the measured over predicted peaks of a kind's newest runs. A plan is never lowered."""

    ratio: float = 1.0
    runs: int = 0

    def part_name(self) -> str:
        """Name of the part that it adds to a plan."""
        return f"correction from {self.runs} earlier {'run' if self.runs == 1 else 'runs'} on this machine"


def kind_of(spec: TrainSpec) -> str:
    """The kind of a run: `sft lora nf4`."""
    return f"{spec.objective.kind} {spec.adapter.kind} {spec.quant.kind}"


def read_corrections(on: str) -> Mapping[str, Correction]:
    """The correction of each kind of run seen so far on `cpu` or on GPUs of a name."""
    return {kind: Correction(max(1.0, *ratios), len(ratios)) for kind, ratios in _read(on).items()}


def learn(on: str, kind: str, predicted_bytes: int, measured_bytes: int) -> Correction:
    """Take the final peak of one more run into account. Writes `<cache>/machine/memory-<on>.json`.

    `predicted_bytes`: by the formulas alone.
    """
    ratio = round(min(measured_bytes / predicted_bytes, MOST), 4)
    ratios = _read(on)
    ratios[kind] = [*ratios.get(kind, []), ratio][-RUNS:]
    path = _path(on)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(ratios), encoding="utf-8")
    temporary.replace(path)
    return read_corrections(on)[kind]


def _read(on: str) -> dict[str, list[float]]:
    path = _path(on)
    found: dict[str, list[float]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def _path(on: str) -> Path:
    return cache_root() / "machine" / f"memory-{on}.json"
