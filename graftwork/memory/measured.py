"""How peaks that were measured on this machine compare with their predictions: later plans are corrected by it."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from graftwork.storage import cache_root

LEAST, MOST = 0.7, 1.5
"""A ratio beyond these says that something else is wrong than a constant, and is not followed further."""
NEWEST = 0.5
"""Weight of the newest run; those before it share the rest."""


@dataclass(frozen=True)
class Correction:
    """Measured over predicted peak, and of how many runs."""

    ratio: float = 1.0
    runs: int = 0

    def said(self) -> str:
        """In words."""
        seen = f"peaks measured here were {self.ratio:.2f} times the prediction (runs so far: {self.runs})"
        return f"{seen}; corrected by it"


def known(on: str) -> Correction:
    """The correction for `cpu` or a GPU's name on this machine; none before the first run."""
    path = _path(on)
    return Correction(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else Correction()


def learn(on: str, predicted_bytes: int, measured_bytes: int) -> Correction:
    """Take one more run into account. Writes `<cache>/machine/peaks-<on>.json`."""
    before = known(on)
    newest = min(max(measured_bytes / predicted_bytes, LEAST), MOST)
    ratio = newest if before.runs == 0 else NEWEST * newest + (1 - NEWEST) * before.ratio
    after = Correction(round(ratio, 4), before.runs + 1)
    path = _path(on)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(asdict(after)), encoding="utf-8")
    temporary.replace(path)
    return after


def _path(on: str) -> Path:
    return cache_root() / "machine" / f"peaks-{on}.json"
