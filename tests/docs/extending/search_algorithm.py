"""A Sobol search: chosen by its kind, distinct points that are more even than random ones, the same after a kill."""

import math
import sys
from pathlib import Path

import yaml
from scipy.stats import qmc

import graftwork
from graftwork.config import load
from graftwork.tuning.plan import points_to_plan, search_of
from graftwork.tuning.search import Suggestion, Values
from graftwork.tuning.spec import TuneSpec
from graftwork.tuning.trials import TrialRecord

TRIALS = 32


def sweep(work: Path, **keys: object) -> TuneSpec:
    """Read a sweep from a file, as the command line does."""
    work.mkdir(parents=True, exist_ok=True)
    train = {"name": "t", "base": "b", "data": {"train": "t.jsonl", "eval": "e.jsonl"}}
    space = {
        "optim.lr": {"kind": "loguniform", "low": 1e-4, "high": 1e-2},
        "optim.weight_decay": {"kind": "uniform", "low": 0.0, "high": 0.1},
    }
    file = work / "sweep.yaml"
    file.write_text(
        yaml.safe_dump({"kind": "tune", "name": "s", "train": train, "space": space, "num_trials": TRIALS, **keys})
    )
    spec = load(file, expect="tune")
    assert isinstance(spec, TuneSpec)
    return spec


def suggested(spec: TuneSpec) -> list[Values]:
    """Ask for each point with the trials so far, by a new search each time: a search that was killed goes on alike."""
    trials: list[TrialRecord] = []
    while isinstance(chosen := search_of(spec).suggest(trials), Suggestion):
        trials.append(TrialRecord(str(len(trials)), chosen.values, state="finished"))
    return [trial.values for trial in trials]


def discrepancy(points: list[Values]) -> float:
    """Unevenness of the points in the unit square; 0 is even."""
    unit = [
        [math.log10(float(str(point["optim.lr"])) / 1e-4) / 2, float(str(point["optim.weight_decay"])) / 0.1]
        for point in points
    ]
    return float(qmc.discrepancy(unit))


def main(work: Path) -> None:
    assert Path(graftwork.__file__).is_relative_to(work.parent), f"{graftwork.__file__} is not the changed copy"
    spec = sweep(work, search={"kind": "sobol"})
    points = suggested(spec)
    assert points == [*points_to_plan(spec)], "the plan has the points that run"
    assert len({tuple(point.values()) for point in points}) == TRIALS
    assert suggested(sweep(work, search={"kind": "sobol"}, num_trials=8)) == points[:8]
    at_random = suggested(sweep(work, search={"kind": "random"}))
    assert discrepancy(points) < discrepancy(at_random) / 2, (discrepancy(points), discrepancy(at_random))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
