"""Guardrails over an experiment's log: arms that break a bound are named, and no others."""

from typing import Any

import numpy as np
import pytest

from graftwork.serving.ab_test.spec import GuardrailSpec
from tests.experiment_logs import answer, assignment, judged, read, rules


@pytest.mark.parametrize(
    ("guardrail", "bad"),
    [
        (GuardrailSpec(kind="errors", limit=0.05), {"error": "timeout", "scores": {}}),
        (GuardrailSpec(kind="latency", limit=0.05, bound_ms=500.0), {"latency_ms": 900.0}),
        (GuardrailSpec(kind="schema_invalid", limit=0.05, score="form"), {"scores": {"facts": 1.0, "form": 0.0}}),
        (GuardrailSpec(kind="empty_context", limit=0.05), {"retrieved_ids": ()}),
    ],
    ids=lambda value: value.kind if isinstance(value, GuardrailSpec) else "",
)
def test_a_guardrail_names_the_arm_to_cut(guardrail: GuardrailSpec, bad: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    fine = {"scores": {"facts": 1.0, "form": 1.0}, "retrieved_ids": ("p1",)}
    rows = [
        answer(k, "rag" if k % 2 else "base", None, **{**fine, **(bad if k % 2 and rng.random() < 0.3 else {})})
        for k in range(400)
    ]
    state = read(rows, rules(guardrails=(guardrail,)))
    assert state.cut == ("rag",)
    broken = {one.arm: one.broken_at for one in state.guardrails}
    assert broken["base"] is None
    assert broken["rag"] is not None
    assert 3 <= broken["rag"] < 100


def test_a_gap_between_groups_is_a_guardrail() -> None:
    rng, rows = np.random.default_rng(2), []
    for k in range(1200):
        group = "he" if rng.random() < 0.5 else "she"
        right = 0.9 if group == "he" else 0.5
        for arm, share in (("base", 0.7), ("rag", right)):
            scores = {"facts": float(rng.random() < share), group: 1.0}
            rows.append(answer(2 * k + (arm == "rag"), arm, None, scores=scores))
    gap = GuardrailSpec(kind="fairness_gap", limit=0.1, score="facts", groups=("he", "she"))
    state = read(rows, rules(guardrails=(gap,)))
    assert state.cut == ("rag",)
    assert state.guardrails[1].value == pytest.approx(0.4, abs=0.1)
    assert state.guardrails[0].broken_at is None


def test_cold_starts_and_retries_are_not_held_against_an_arm() -> None:
    slow = GuardrailSpec(kind="latency", limit=0.05, bound_ms=500.0)
    cold = [answer(k, "rag", 1.0, cold=True, latency_ms=9000.0) for k in range(200)]
    assert read(cold, rules(guardrails=(slow,))).cut == ()
    stuck = [answer(k, "rag", error="timeout", unit="f" * 16) for k in range(200)]
    errors = rules(guardrails=(GuardrailSpec(kind="errors", limit=0.05),))
    assert read(stuck, errors).cut == ()
    assert read([answer(k, "rag", error="timeout") for k in range(200)], errors).cut == ("rag",)


def test_quick_failures_do_not_cut_an_arm_while_its_slow_successes_are_on_the_way() -> None:
    """1 of 25 fails at once, the others take a minute: entered as they end, the first 60 s hold failures alone."""
    rng, rows = np.random.default_rng(6), []
    for k in range(2000):
        arm, failed = "rag" if rng.random() < 0.5 else "base", bool(rng.random() < 0.04)
        one = answer(
            k,
            arm,
            None if failed else 1.0,
            at=k / 20 + (0.0 if failed else 60.0),
            error="context_length_exceeded" if failed else None,
        )
        rows += [assignment(one, k / 20), one]
    rows.sort(key=lambda row: (row.at, row.kind != "assignment"))
    told = rules(guardrails=(GuardrailSpec(kind="errors", limit=0.05),))
    assert judged(rows, told).cut == ()
    assert judged([row for row in rows if row.at < 60], told).cut == ()
