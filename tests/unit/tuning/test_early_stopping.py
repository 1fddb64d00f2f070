"""Decisions of early stopping, compared with Ray Tune's schedulers over random sweeps."""

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, TrialScheduler

from graftwork import config
from graftwork.tuning.early_stopping import stopping_rule
from graftwork.tuning.spec import TuneSpec

STEPS = 24


@dataclass(frozen=True)
class Named:
    """As much of a trial as Ray's schedulers read."""

    trial_id: str


def sweep(**keys: Any) -> TuneSpec:
    train = {"name": "t", "base": "b", "data": {"train": "t.jsonl", "eval": "e.jsonl"}}
    space = {"optim.lr": {"kind": "loguniform", "low": 1e-4, "high": 1e-2}}
    return config.validate(TuneSpec, {"name": "s", "train": train, "space": space, **keys}, where="s.yaml")


def reports(seed: int) -> Iterator[tuple[str, int, float]]:
    """(trial, step, loss) of 30 trials in a random order, steps rising per trial; some losses are equal."""
    chance = np.random.default_rng(seed)
    done = dict.fromkeys((f"t{n}" for n in range(30)), 0)
    level = {name: float(chance.integers(1, 8)) for name in done}
    while done:
        name = str(chance.choice(sorted(done)))
        done[name] += int(chance.choice([2, 4]))
        if done[name] >= STEPS:
            del done[name]
            continue
        yield name, done[name], round(level[name] - done[name] / 20 + float(chance.choice([0, 0, 0.3])), 2)


def ray_halving(reduction: int, grace: int, brackets: int, spec_seed: int) -> Any:
    """A function that gives Ray's decisions, with the brackets drawn from seed and id."""
    rule = AsyncHyperBandScheduler("step", "loss", "min", STEPS, grace, reduction, brackets)
    known: set[str] = set()

    def stops(name: str, step: int, loss: float) -> bool:
        if name not in known:
            known.add(name)
            np.random.seed(zlib.crc32(f"{spec_seed} {name}".encode()))
            rule.on_trial_add(None, Named(name))
        return bool(rule.on_trial_result(None, Named(name), {"step": step, "loss": loss}) == TrialScheduler.STOP)

    return stops


def ray_median(grace: int, least: int) -> Any:
    """A function that gives Ray's decisions; a trial that is stopped reports no more."""
    rule = MedianStoppingRule("step", "loss", "min", grace, least, min_time_slice=math.inf)

    def stops(name: str, step: int, loss: float) -> bool:
        return bool(rule.on_trial_result(None, Named(name), {"step": step, "loss": loss}) == TrialScheduler.STOP)

    return stops


def decisions(of_ours: Any, of_ray: Any, seed: int) -> tuple[list[bool], list[bool]]:
    """Of both, report by report, until a trial is stopped."""
    ours, theirs, ended = [], [], set()
    for name, step, loss in reports(seed):
        if name in ended:
            continue
        ours.append(of_ours.reason_to_stop(name, step, loss) is not None)
        theirs.append(of_ray(name, step, loss))
        if theirs[-1]:
            ended.add(name)
    return ours, theirs


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("reduction", [2, 3, 4])
@pytest.mark.parametrize("brackets", [1, 3])
def test_halving_stops_the_trials_that_ray_tune_stops(brackets: int, reduction: int, seed: int) -> None:
    asked = {"kind": "asha"} if brackets == 1 else {"kind": "hyperband", "brackets": brackets}
    spec = sweep(scheduler={**asked, "grace_steps": 2, "reduction": reduction}, steps=STEPS, report_every=2, seed=seed)
    state = np.random.get_state()
    try:
        ours, theirs = decisions(stopping_rule(spec, []), ray_halving(reduction, 2, brackets, seed), seed)
    finally:
        np.random.set_state(state)
    assert ours == theirs
    assert any(ours)
    assert not all(ours)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("least", [1, 3])
def test_the_median_rule_stops_the_trials_that_ray_tune_stops(least: int, seed: int) -> None:
    scheduler = {"kind": "median", "grace_steps": 4, "min_trials": least}
    spec = sweep(scheduler=scheduler, steps=STEPS, report_every=2)
    ours, theirs = decisions(stopping_rule(spec, []), ray_median(4, least), seed)
    assert ours == theirs
    assert any(ours)
    assert not all(ours)
