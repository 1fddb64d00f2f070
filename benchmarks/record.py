"""What a benchmark leaves behind: `{run_info, result: {figures, detail}, meta_info}`, each figure with n and spread."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from graftwork.environment import collect
from graftwork.metrics import quantile

RESULTS = Path(__file__).parent / "results"
NEVER = 1e9
"""Stands for what did not happen, where a figure is how long something took."""


class Figure(TypedDict):
    """One measured number: the median of `n` samples with the quartiles beside it."""

    value: float
    q1: float
    q3: float
    n: int
    unit: str


def figure(samples: Sequence[float], unit: str) -> Figure:
    """Median and quartiles of at least one sample."""
    q1, value, q3 = (quantile(samples, q) for q in (0.25, 0.5, 0.75))
    return Figure(value=value, q1=q1, q3=q3, n=len(samples), unit=unit)


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Round by round: both were measured in turns, so that what disturbs the machine falls on both."""
    return [a / b for a, b in zip(over, under, strict=True)]


class Clock:
    """Wall and process-CPU seconds since its making, and how busy the machine was (load average of a minute)."""

    def __init__(self) -> None:
        self._wall, self._cpu, self._load = time.perf_counter(), time.process_time(), os.getloadavg()[0]

    def facts(self) -> dict[str, float]:
        return {
            "wall_s": round(time.perf_counter() - self._wall, 1),
            "cpu_s": round(time.process_time() - self._cpu, 1),
            "load_before": round(self._load, 2),
            "load_after": round(os.getloadavg()[0], 2),
        }


def write(
    name: str, out: Path | None, figures: dict[str, Figure], detail: object, meta: dict[str, Any], clock: Clock
) -> Path:
    """Writes the document, to benchmarks/results/NAME.json unless another place is named, and says its figures."""
    path = out or RESULTS / f"{name}.json"
    document = {
        "run_info": collect(seed=0, argv=[f"benchmarks.{name}"]),
        "result": {"figures": figures, "detail": detail},
        "meta_info": {**meta, "took": clock.facts()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for key, found in figures.items():
        print(f"{key:24s} {shown(found)}", flush=True)
    return path


def shown(found: Figure) -> str:
    """For people: median, quartiles, n."""
    return f"{found['value']:.3g} {found['unit']} ({found['q1']:.3g} to {found['q3']:.3g}, n={found['n']})"
