"""The simulations behind the goals: they are the monitor's own numbers, and hold what they promise."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.latency_runs import Slow, latency_runs, log_of
from benchmarks.online_runs import (
    NEVER,
    Split,
    draws,
    even,
    guard_runs,
    ramping,
    ratio_runs,
    shadow_runs,
    share,
    split_runs,
    tenth,
)
from benchmarks.sequential import SHARES, offline, upper
from graftwork.serving.ab_test.log import LogRow
from graftwork.serving.ab_test.log_reader import columns_of_rows
from graftwork.serving.ab_test.monitor import Monitor
from graftwork.serving.ab_test.spec import GuardrailSpec, OnlineRules, weights_detail


def monitor(**changes: Any) -> Monitor:
    plain = {"arms": ("base", "rag"), "control": "base", "metric": "right", "weights": {"base": 0.5, "rag": 0.5}}
    return Monitor(OnlineRules(**{**plain, **changes}))


def answer(step: int, arm: str, score: float | None, **changes: Any) -> LogRow:
    plain = {
        "kind": "answer",
        "experiment": "e",
        "at": float(step),
        "request_id": f"r{step}",
        "unit": f"{step:x}",
        "arm": arm,
        "scores": {} if score is None else {"right": score},
        "error": "timeout" if score is None else None,
    }
    return LogRow(**{**plain, **changes})


def take(watched: Monitor, step: int, arm: str, score: float | None, **changes: Any) -> None:
    """A request that is answered at once."""
    drawn = answer(step, arm, score, **changes, kind="assignment", scores={}, error=None)
    for row in (drawn, answer(step, arm, score, **changes)):
        watched.ingest(columns_of_rows([row], watched.numbers))


@pytest.mark.parametrize("plan", [even, ramping])
def test_simulated_splits_stop_where_the_monitor_decides(plan: Any) -> None:
    """Row by row, with a row for each change of the weights: the same step to the request, for each of 5 runs."""
    case = Split(0.9, 0.6, plan, steps=300)
    stops = split_runs(case, 5, seed=9).ours
    drawn = [np.concatenate(parts) for parts in zip(*draws(case, 5, seed=9), strict=True)]
    for run in range(5):
        treated, outcome, chance = (part[:, run] for part in drawn)
        watched, found, now = monitor(), NEVER, 0.5
        for step in range(300):
            if chance[step] != now:
                now = chance[step]
                detail = json.dumps(weights_detail({"base": 1 - now, "rag": now}))
                row = LogRow(kind="event", experiment="e", at=float(step), event="ramp", detail=detail)
                watched.ingest(columns_of_rows([row], watched.numbers))
            arm, likely = ("rag", now) if treated[step] else ("base", 1 - now)
            take(watched, step, arm, outcome[step], probability=likely)
            if found == NEVER and watched.state().contrasts[0].e_value >= 20:
                found = step + 1
        assert found == stops[run]
    assert np.sum(stops < NEVER) >= 2


def test_simulated_shadows_and_guardrails_stop_where_the_monitor_does() -> None:
    stops = shadow_runs(0.3, 0.05, 150, 3, seed=4).ours
    drawn = np.concatenate([np.random.default_rng(4).random((150, 3))])
    for run in range(3):
        watched, found = monitor(mode="shadow", weights={}), NEVER
        for step, value in enumerate(drawn[:, run]):
            base, rag = (0.0, 1.0) if value < 0.3 else (1.0, 0.0) if value < 0.35 else (1.0, 1.0)
            take(watched, step, "base", base)
            take(watched, step, "rag", rag, role="shadow")
            if found == NEVER and watched.state().contrasts[0].e_value >= 20:
                found = step + 1
        assert found == stops[run]
    cuts = guard_runs(0.05, 0.25, 100, 3, seed=5)
    failed = np.random.default_rng(5).random((50, 3)) < 0.25
    for run in range(3):
        watched = monitor(guardrails=(GuardrailSpec(kind="errors", limit=0.05),))
        for step in range(50):
            take(watched, step, "rag", None if failed[step, run] else 1.0, probability=0.5)
        broken = [guard.broken_at for guard in watched.state().guardrails if guard.arm == "rag"][0]
        assert broken == (cuts[run] if cuts[run] <= 50 else None)


@pytest.mark.parametrize(
    "case",
    [Slow(10, 40, units=300), Slow(5, 20, failed=0.1, lost=0.1, rated=0.5, units=700)],
    ids=lambda case: case.name,
)
def test_simulated_latency_stops_where_the_monitor_does(case: Slow) -> None:
    """A difference that is found, from the same rows: the first unit whose e-value decides, and the units counted."""
    case = replace(case, treated=0.95, control=0.5)
    seen, rng = latency_runs(case, 3, seed=8), np.random.default_rng(8)
    for run in range(3):
        watched = Monitor(case.rules)
        watched.ingest(log_of(case, rng)[1])
        state = watched.state()
        assert seen.steps <= state.contrasts[0].n < case.units
        assert (state.contrasts[0].e_value >= 20) == (seen.found[run] <= state.contrasts[0].n)
        assert state.blocked is None
        assert seen.split[run] == NEVER
    assert np.any(seen.found < NEVER)


def test_a_slower_arm_raises_alarms_where_units_enter_as_their_scores_come() -> None:
    seen = latency_runs(Slow(10, 80), 60, seed=9)
    assert share(seen.found, 1000) <= at_most(0.05, 60)
    assert share(seen.split, 1000) == 0
    assert share(seen.found_as_scored, 1000) > 0.3
    assert share(seen.split_as_scored, 1000) > 0.8


def at_most(level: float, runs: int) -> float:
    """A share that a test at this level leaves once in a thousand, by 3 standard errors."""
    return level + 3 * math.sqrt(level * (1 - level) / runs)


@pytest.mark.parametrize(("right", "plan"), [(0.01, even), (0.5, even), (0.8, ramping), (0.99, tenth)])
def test_alike_arms_are_left_alone_however_often_one_looks(right: float, plan: Any) -> None:
    """200 runs of 4,000 requests; the z-test that is looked at as often finds an effect in a quarter at least."""
    seen = split_runs(Split(right, right, plan), 200, seed=1)
    assert share(seen.ours, 4000) <= at_most(0.05, 200)
    assert np.mean(seen.missed) <= at_most(0.05, 200)
    assert share(seen.peers["z, always looked at"], 4000) > 0.2


def test_effects_are_found_and_covered() -> None:
    seen, pairs = split_runs(Split(0.85, 0.8, even), 200, seed=2), shadow_runs(0.125, 0.075, 2000, 200, seed=3)
    assert share(seen.ours, 4000) > 0.85
    assert share(pairs.ours, 2000) > 0.93
    for one in (seen, pairs):
        assert np.mean(one.missed) <= at_most(0.05, 200)


def test_sample_ratios_and_guardrails_find_what_they_are_for() -> None:
    assert share(ratio_runs(0.5, 0.55, 5000, 200, seed=4)[0], 5000) > 0.9
    assert share(ratio_runs(0.5, 0.5, 5000, 200, seed=5)[0], 5000) <= at_most(0.001, 200)
    assert np.median(guard_runs(0.05, 0.2, 500, 200, seed=6)) <= 60
    assert share(guard_runs(0.05, 0.05, 2000, 200, seed=7), 2000) <= at_most(0.01, 200)


@pytest.mark.soak
@pytest.mark.parametrize("right", SHARES)
@pytest.mark.parametrize("plan", [even, tenth, ramping])
def test_alike_arms_are_left_alone_in_2000_runs(right: float, plan: Any) -> None:
    seen = split_runs(Split(right, right, plan), 2000, seed=11)
    assert upper(share(seen.ours, 4000), 2000) <= 0.05
    assert 1 - np.mean(seen.missed) >= 0.95


@pytest.mark.soak
def test_the_goals_of_power_in_2000_runs() -> None:
    seen, pairs = split_runs(Split(0.85, 0.8, even), 2000, seed=12), shadow_runs(0.125, 0.075, 2000, 2000, seed=13)
    assert np.median(seen.ours) <= 2000
    assert share(seen.ours, 4000) >= 0.88
    assert np.median(pairs.ours) <= 650
    assert share(pairs.ours, 2000) >= 0.98
    assert np.median(ratio_runs(0.5, 0.52, 20_000, 2000, seed=14)[0]) <= 20_000
    assert np.median(ratio_runs(0.5, 0.51, 50_000, 2000, seed=15)[0]) <= 50_000
    assert share(ratio_runs(0.5, 0.5, 50_000, 2000, seed=16)[0], 50_000) <= 0.001
    assert np.median(guard_runs(0.05, 0.2, 1000, 2000, seed=17)) <= 60
    assert share(guard_runs(0.05, 0.05, 4000, 2000, seed=18), 4000) <= 0.01
    paired = offline(2000)
    assert paired["offline_power_mcnemar_exact"]["value"] >= 0.41  # 0.425 of 10,000
    assert paired["offline_null_mcnemar_midp"]["value"] <= at_most(0.05, 10_000)
