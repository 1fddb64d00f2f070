"""What a search that learns finds against points at random, at equal numbers of trials, on recorded losses.

    python -m benchmarks.search

The grids (rank x learning rate, SmolLM2-135M, 16 steps; two tasks, three seeds of data and start each) were run to
their ends once (benchmarks/sweep_curves.py). Here each search chooses among a grid's points and is told the recorded
losses, one trial after the other, none stopped; 10 seeds a search and grid. TPE, and GP, begin with the points of the
random search of the same seed. What is found is the lowest last loss so far. `above` is how far it lies above the
grid's best point, in parts of the way from the best to the grid's median: 0 is the best, 1 the median. Searches are
compared with random grid by grid and seed by seed; intervals are BCa bootstrap ones of 95 % over these pairs.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import Clock, Figure, write
from benchmarks.recorded import CURVES, curves
from benchmarks.sweep_curves import grid
from graftwork import stats
from graftwork.tuning.plan import search_of
from graftwork.tuning.search import Suggestion
from graftwork.tuning.spec import TuneSpec
from graftwork.tuning.trials import TrialRecord

TASKS = ("airport-card", "ua-parse")
SEEDS, TRIALS, AT = 10, 12, 8
SEARCHES: dict[str, dict[str, Any]] = {
    "random": {"kind": "random"},
    "tpe": {"kind": "tpe"},
    "tpe_together": {"kind": "tpe", "multivariate": True},
    "gp": {"kind": "gp"},
    "bohb": {"kind": "bohb"},
}
Found = dict[str, list[list[float]]]
"""By search: of each grid and seed how far the best so far is above the grid's best, after each trial."""


def recorded_sweep(task: str, trials: Sequence[TrialRecord], search: Mapping[str, Any], seed: int) -> TuneSpec:
    """The sweep over one grid's own points."""
    keys = trials[0].values
    space = {key: {"kind": "choice", "values": sorted({_number(trial, key) for trial in trials})} for key in keys}
    spec = grid(task)
    given = spec.model_dump(mode="json", exclude_unset=True)
    return TuneSpec.model_validate(
        {**given, "space": space, "search": dict(search), "num_trials": TRIALS, "seed": seed}
    )


def above_best(task: str, trials: Sequence[TrialRecord], search: Mapping[str, Any], seed: int) -> list[float]:
    """One sweep: after each trial, how far the best so far is above the grid's best."""
    chooses, told = search_of(recorded_sweep(task, trials, search, seed)), list[TrialRecord]()
    known = {_place(trial.values): trial for trial in trials}
    ends = sorted(trial.losses[-1][1] for trial in trials if trial.state == "finished")
    best, middle, found, so_far = ends[0], statistics.median(ends), list[float](), float("inf")
    while isinstance(chosen := chooses.suggest(told), Suggestion):
        trial = known[_place(chosen.values)]
        told.append(trial)
        so_far = min(so_far, trial.losses[-1][1] if trial.state == "finished" else ends[-1])
        found.append((so_far - best) / (middle - best))
    return found


def compared(found: Found, name: str, at: int) -> dict[str, float]:
    """What a search leaves of random's distance above the best at one number of trials, with its interval."""
    ours, drawn = (np.array([run[at - 1] for run in found[which]]) for which in (name, "random"))
    less = drawn - ours
    reach = float(np.max(np.abs(less))) or 1.0  # the interval's method takes differences between -1 and 1
    inside = stats.bca_mean(less / reach, lowest=-1, seed=0)
    low, high = inside.low * reach, inside.high * reach
    return {
        "above": float(np.mean(ours)),
        "random_above": float(np.mean(drawn)),
        "less": float(np.mean(less)),
        "low": low,
        "high": high,
        "n": len(less),
        "won": int(np.sum(less > 0)),
        "lost": int(np.sum(less < 0)),
        "ratio": float(np.mean(ours) / np.mean(drawn)),
        "ratio_high": float(1 - low / np.mean(drawn)),
        "ratio_low": max(0.0, float(1 - high / np.mean(drawn))),
    }


def play(path: Path, searches: Sequence[str]) -> dict[str, Found]:
    """All searches on all grids, by `task/data seed`."""
    found: dict[str, Found] = {}
    for task in TASKS:
        for data_seed, trials in curves(task, path).items():
            runs = {
                name: [above_best(task, trials, SEARCHES[name], seed) for seed in range(SEEDS)] for name in searches
            }
            found[f"{task}/{data_seed}"] = runs
            print(
                f"{task}/{data_seed}",
                {name: round(statistics.fmean(run[AT - 1] for run in of), 3) for name, of in runs.items()},
                flush=True,
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=Path, default=CURVES)
    parser.add_argument("--searches", nargs="*", choices=tuple(SEARCHES), default=list(SEARCHES))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    clock, names = Clock(), ["random", *(name for name in args.searches if name != "random")]
    by_grid = play(args.curves, names)
    pooled = {name: [run for found in by_grid.values() for run in found[name]] for name in names}
    figures: dict[str, Figure] = {}
    detail: dict[str, Any] = {
        "grids": {
            where: {name: [run[AT - 1] for run in runs] for name, runs in found.items()}
            for where, found in by_grid.items()
        }
    }
    for name in names[1:]:
        told = {at: compared(pooled, name, at) for at in range(5, TRIALS + 1)}
        one = told[AT]
        figures[f"{name}_to_random"] = Figure(
            value=one["ratio"], q1=one["ratio_low"], q3=one["ratio_high"], n=int(one["n"]), unit="of random's distance"
        )
        figures[f"{name}_upper"] = Figure(
            value=one["ratio_high"], q1=one["ratio"], q3=one["ratio_high"], n=int(one["n"]), unit="of random's distance"
        )
        detail[name] = {
            "by_trials": told,
            "by_grid": {where: compared(found, name, AT) for where, found in by_grid.items()},
        }
        print(f"{name}: {_said(one)}")
    write("search", args.out, figures, detail, {"searches": SEARCHES, "seeds": SEEDS, "at": AT}, clock)


def _said(one: Mapping[str, float]) -> str:
    which = "excludes 0" if one["low"] > 0 or one["high"] < 0 else "includes 0"
    return (
        f"{one['above']:.3f} above the best, random {one['random_above']:.3f}; less by {one['less']:.3f} "
        f"({one['low']:.3f} to {one['high']:.3f}, which {which}); won {one['won']:.0f}, lost {one['lost']:.0f}"
    )


def _place(values: Mapping[str, Any]) -> tuple[float, ...]:
    return tuple(float(values[key]) for key in sorted(values))


def _number(trial: TrialRecord, key: str) -> float | int:
    value = trial.values[key]
    assert isinstance(value, int | float)
    return value


if __name__ == "__main__":
    main()
