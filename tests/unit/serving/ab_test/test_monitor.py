"""Verdicts on an experiment's log: found, undecided, blocked, and the same bits however the log is cut."""

import json
from typing import Any

import numpy as np
import pytest

from graftwork.serving.ab_test.log import LogRow
from graftwork.serving.ab_test.log_reader import LogColumns, columns_of_rows
from graftwork.serving.ab_test.monitor import Monitor
from graftwork.serving.ab_test.spec import GuardrailSpec, weights_detail
from tests.experiment_logs import answer, assigned, in_flight, judged, read, rules, shadow, split


def test_an_arm_that_is_better_is_found_and_the_interval_holds_the_truth() -> None:
    contrast = read(split(3000, 0.5, 0.65)).contrasts[0]
    assert contrast.verdict == "better"
    assert contrast.e_value >= 20
    assert 0 <= contrast.low < 0.15 < contrast.high
    assert contrast.n == 3000
    assert contrast.n_needed is None


def test_the_same_score_that_is_a_harm_is_worse() -> None:
    assert read(split(3000, 0.5, 0.65), rules(better="lower")).contrasts[0].verdict == "worse"


def test_alike_arms_are_undecided_with_the_units_needed_and_at_last_equivalent() -> None:
    soon, late = read(split(500, 0.8, 0.8)).contrasts[0], read(split(30_000, 0.8, 0.8)).contrasts[0]
    assert soon.verdict == "undecided"
    assert soon.n_needed is not None
    assert 500 < soon.n_needed < 30_000
    assert (late.verdict, late.n_needed) == ("equivalent", None)


def test_failed_answers_count_as_wrong() -> None:
    rows = [
        answer(k, "rag" if k % 2 else "base", None if k % 2 else 1.0, error="timeout" if k % 2 else None)
        for k in range(200)
    ]
    state = read(rows)
    assert state.contrasts[0].verdict == "worse"
    assert (state.arms[1].mean, state.arms[1].errors, state.arms[0].errors) == (0.0, 100, 0)


def test_a_ramp_is_allowed_for() -> None:
    """10 % then 50 %, while all scores fall: pooled shares mislead, the logged chances do not."""
    rng, rows = np.random.default_rng(3), []
    for k in range(4000):
        early = k < 2000
        arm = "rag" if rng.random() < (0.1 if early else 0.5) else "base"
        chance = (0.1 if early else 0.5) if arm == "rag" else (0.9 if early else 0.5)
        if k in (0, 2000):
            event = "start" if k == 0 else "ramp"
            share = 0.1 if early else 0.5
            told = json.dumps(weights_detail({"base": 1 - share, "rag": share}))
            rows.append(LogRow(kind="event", experiment="e", at=float(k), event=event, detail=told))
        rows.append(answer(k, arm, float(rng.random() < (0.9 if early else 0.3)), probability=chance))
    state = read(rows, rules(weights={"base": 0.9, "rag": 0.1}))
    pooled = {arm.arm: arm.mean or 0.0 for arm in state.arms}
    assert pooled["rag"] - pooled["base"] < -0.15
    assert state.blocked is None
    assert state.contrasts[0].low < 0 < state.contrasts[0].high


def test_units_that_fall_otherwise_than_planned_block_every_conclusion() -> None:
    rows = [row for k, row in enumerate(split(4000, 0.5, 0.8)) if row.arm == "base" or k % 5]
    state = read(rows)
    assert state.srm_e_value >= 1000
    assert state.blocked is not None
    assert state.contrasts[0].verdict == "undecided"
    assert read(split(4000, 0.5, 0.8)).blocked is None


def test_scores_that_come_for_one_arm_rather_than_the_other_block_every_conclusion() -> None:
    """Thumbs that mostly the pleased give: all units are there, the scored ones are not a fair draw."""
    rows = [
        row if row.arm == "rag" or k % 3 else row.model_copy(update={"scores": {}})
        for k, row in enumerate(split(4000, 0.5, 0.5))
    ]
    state = read(rows)
    assert state.blocked is not None
    assert state.blocked.startswith("units with a score do not fall")
    assert [arm.units for arm in state.arms] == [arm.units for arm in read(split(4000, 0.5, 0.5)).arms]


def test_a_shadow_is_paired_by_prompt() -> None:
    told = rules(mode="shadow", weights={})
    state = read(shadow(2000, 0.15, 0.05), told)
    assert state.contrasts[0].verdict == "better"
    assert state.contrasts[0].n == 2000
    lonely = [row for row in shadow(2000, 0.15, 0.05) if row.role == "primary"]
    assert read(lonely, told).contrasts[0].n == 0
    late = sorted(shadow(500, 0.15, 0.05), key=lambda row: row.role)
    assert read(late, told).contrasts[0].n == 500
    assert read([*late, *late], told).contrasts == read(late, told).contrasts


def mixed(n: int, seed: int) -> list[LogRow]:
    """Repeated units, duplicates, failures, cold starts, later scores, a ramp, two score kinds."""
    rng, rows = np.random.default_rng(seed), []
    for k in range(n):
        if k == n // 2:
            detail = json.dumps(weights_detail({"base": 0.3, "rag": 0.7}))
            rows.append(LogRow(kind="event", experiment="e", at=float(k), event="ramp", detail=detail))
        unit = int(rng.integers(0, n // 2))
        arm, chance = ("rag", 0.5) if unit % 2 else ("base", 0.5)
        row = answer(
            k,
            arm,
            float(rng.random()),
            unit=f"{unit:016x}",
            probability=chance,
            cold=bool(rng.random() < 0.1),
            latency_ms=float(rng.lognormal(5, 1)),
            error="timeout" if rng.random() < 0.05 else None,
        )
        if rng.random() < 0.3:
            bare = row.model_copy(update={"scores": {}})
            rows += [bare, row.model_copy(update={"kind": "score", "detail": "facts"})]
        else:
            rows += [row] * (1 + (rng.random() < 0.1))
    return rows


VARIANTS: dict[str, dict[str, Any]] = {
    "split": {},
    "window": {"window_s": 20.0},
    "thinned": {"max_units": 100},
    "log latency": {"metric": "latency_ms", "kind": "log", "better": "lower"},
    "shadow": {"mode": "shadow", "weights": {}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_single_rows_leave_the_very_bits_of_blocks(variant: str) -> None:
    guardrails = (GuardrailSpec(kind="errors", limit=0.04), GuardrailSpec(kind="latency", limit=0.1, bound_ms=500.0))
    told = rules(guardrails=guardrails, **VARIANTS[variant])
    rows = assigned(shadow(700, 0.2, 0.1) if variant == "shadow" else mixed(1500, 4))
    whole, single, pieces = Monitor(told), Monitor(told), Monitor(told)
    whole.ingest(columns_of_rows(rows, whole.numbers))
    for row in rows:
        single.ingest(columns_of_rows([row], single.numbers))
    rng, start = np.random.default_rng(5), 0
    while start < len(rows):
        stop = start + int(rng.integers(1, 400))
        pieces.ingest(columns_of_rows(rows[start:stop], pieces.numbers))
        start = stop
    assert whole.state() == single.state() == pieces.state()
    assert whole.contrasts[0].history == single.contrasts[0].history == pieces.contrasts[0].history
    assert len(whole.contrasts[0].history) > 20


@pytest.mark.parametrize(("per_s", "fast_s", "slow_s"), [(50, 0.3, 2.0), (20, 1.0, 5.0), (8, 1.0, 10.0)])
def test_a_slower_arm_of_equal_quality_raises_no_alarm(per_s: float, fast_s: float, slow_s: float) -> None:
    """Entered as the answers come, 7 of these 12 logs are blocked, and the others come near it."""
    for seed in range(4):
        state = judged(in_flight(900, per_s, fast_s, slow_s, seed))
        assert (state.blocked, state.contrasts[0].verdict) == (None, "undecided")
        assert state.srm_e_value < 100


def test_no_rows_say_nothing() -> None:
    monitor = Monitor(rules())
    monitor.ingest(LogColumns([], [], [], [], [], [], [], [], [], [], [], [], {"facts": np.zeros(0)}))
    contrast = monitor.state().contrasts[0]
    assert (contrast.n, contrast.estimate, contrast.low, contrast.high) == (0, None, -1.0, 1.0)
    assert contrast.verdict == "undecided"
