"""What an experiment's log says, row by row: verdicts, blocks, cuts, and the same bits however the log is cut."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from graftwork.serving.ab_test.log import LogRow
from graftwork.serving.ab_test.log_reader import LogColumns, columns_of_rows
from graftwork.serving.ab_test.monitor import Monitor, MonitorState
from graftwork.serving.ab_test.spec import GuardrailSpec, OnlineRules, weights_detail


def rules(**changes: Any) -> OnlineRules:
    """An even split of two arms on a score of 0 or 1."""
    plain = {"arms": ("base", "rag"), "control": "base", "metric": "facts", "weights": {"base": 0.5, "rag": 0.5}}
    return OnlineRules(**{**plain, **changes})


def answer(number: int, arm: str, score: float | None = None, **changes: Any) -> LogRow:
    """One answer of a unit of its own, a second after the last."""
    plain = {
        "kind": "answer",
        "experiment": "e",
        "at": float(number),
        "request_id": f"r{number}",
        "unit": f"{number:016x}",
        "arm": arm,
        "probability": 0.5,
        "latency_ms": 100.0,
        "scores": {} if score is None else {"facts": score},
    }
    return LogRow(**{**plain, **changes})


def split(n: int, base: float, rag: float, seed: int = 0, **changes: Any) -> list[LogRow]:
    """Units drawn evenly to two arms with these shares of right answers."""
    rng = np.random.default_rng(seed)
    arms = np.where(rng.random(n) < 0.5, "rag", "base")
    return [
        answer(k, str(arm), float(rng.random() < (rag if arm == "rag" else base)), **changes)
        for k, arm in enumerate(arms)
    ]


def assignment(answered: LogRow, at: float | None = None) -> LogRow:
    """The row that the ingress writes when it sends the request to its arm."""
    return LogRow(
        kind="assignment",
        experiment="e",
        at=answered.at if at is None else at,
        request_id=answered.request_id,
        unit=answered.unit,
        arm=answered.arm,
        role=answered.role,
        probability=answered.probability,
    )


def assigned(rows: Sequence[LogRow]) -> list[LogRow]:
    """The rows, each answer with its assignment right before it, as if no two requests were ever in flight at once."""
    return [one for row in rows for one in ([assignment(row), row] if row.kind == "answer" else [row])]


def read(rows: Sequence[LogRow], told: OnlineRules | None = None) -> MonitorState:
    return judged(assigned(rows), told)


def judged(rows: Sequence[LogRow], told: OnlineRules | None = None) -> MonitorState:
    monitor = Monitor(told or rules())
    monitor.ingest(columns_of_rows(rows, monitor.numbers))
    return monitor.state()


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


def test_rows_that_stand_twice_change_nothing() -> None:
    rows = split(400, 0.5, 0.6)
    twice = [one for row in rows for one in (row, row)]
    assert read(twice) == read(rows) == read([*rows, *rows])
    window = rules(window_s=5.0)
    assert read(twice, window) == read(rows, window)


def test_a_unit_counts_once_with_its_first_answer() -> None:
    rows = split(200, 0.5, 0.5)
    loud = [
        row.model_copy(update={"request_id": f"again{k}", "scores": {"facts": 1.0}, "at": row.at + 0.1})
        for row in rows
        if row.arm == "rag"
        for k in range(5)
    ]
    assert read([*rows, *loud]).contrasts == read(rows).contrasts


def test_a_unit_counts_with_its_mean_over_the_window() -> None:
    asked = [
        ("a", 0, 1.0),
        ("b", 1, 0.0),
        ("a", 4, 0.0),
        ("a", 4, 0.0),
        ("b", 9, 1.0),
        ("a", 11, 0.0),
        ("c", 30, 1.0),
        ("d", 45, 0.0),
    ]
    rows = [
        answer(k, "rag" if unit == "a" else "base", score, unit=unit * 16, at=float(at), request_id=f"{unit}{at}")
        for k, (unit, at, score) in enumerate(asked)
    ]
    state = read(rows, rules(window_s=10.0))
    assert [arm.scored for arm in state.arms] == [2, 1]
    assert state.waiting == 1, "d's window is open at the end of the log"
    assert state.arms[1].mean == 0.5  # r0 and a4 once; a11 is past the window
    assert state.arms[0].mean == 0.75


def test_repeated_users_do_not_make_false_alarms() -> None:
    """Users whose answers are all alike: as 20 independent requests each, most of these A/A logs show an effect."""
    alarms = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        users = [(f"{u:016x}", "rag" if rng.random() < 0.5 else "base", float(rng.random() < 0.5)) for u in range(60)]
        order = rng.permutation(np.repeat(np.arange(60), 20))
        rows = [answer(k, users[u][1], users[u][2], unit=users[u][0]) for k, u in enumerate(order)]
        alarms += read(rows).contrasts[0].verdict != "undecided"
    assert alarms <= 5  # at most 5 % of 40, and 3 standard errors


def test_scores_that_come_later_count_as_those_that_came_along() -> None:
    rows = split(300, 0.5, 0.7)
    bare = [row.model_copy(update={"scores": {}}) for row in rows]
    later = [row.model_copy(update={"kind": "score", "detail": "facts"}) for row in rows]
    assert read(bare).contrasts[0].n == 0
    assert read([*bare, *later, *later]).contrasts == read(rows).contrasts


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


def test_override_and_holdout_are_no_part_of_it() -> None:
    rows = split(300, 0.5, 0.7)
    extra = [answer(10_000 + k, "rag", 0.0, role="override", probability=None) for k in range(50)]
    extra += [answer(20_000 + k, "base", 1.0, role="holdout", probability=None) for k in range(50)]
    state = read([*rows, *extra])
    assert state.contrasts == read(rows).contrasts
    assert state.left_out == {"holdout": 50, "override": 50}


def test_rows_that_cannot_count_are_told() -> None:
    rows = [
        answer(1, "rag", 1.5),
        answer(2, "other", 1.0),
        answer(3, "rag", 1.0, probability=None),
        answer(4, "rag", 1.0, role="shadow", probability=None),
    ]
    state = read(rows)
    assert state.left_out == {
        "chance of the arm not as planned": 1,
        "not of an arm": 1,
        "of a shadow, in a split": 1,
        "score out of its range, counted as the end of it": 1,
    }
    assert (state.contrasts[0].n, state.arms[1].mean) == (1, 1.0)


def shadow(n: int, wins: float, losses: float, seed: int = 0) -> list[LogRow]:
    """Prompts that both arms answer; the copy's answer comes second."""
    rng, rows = np.random.default_rng(seed), []
    for k in range(n):
        draw = rng.random()
        base, rag = (0.0, 1.0) if draw < wins else (1.0, 0.0) if draw < wins + losses else (1.0, 1.0)
        rows += [answer(k, "base", base), answer(k, "rag", rag, role="shadow", probability=None)]
    return rows


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


def test_with_more_units_than_remembered_a_part_by_hash_goes_on() -> None:
    rows = split(4000, 0.5, 0.8)
    state = read(rows, rules(max_units=500))
    assert state.left_out["beyond max_units"] > 1000
    assert state.contrasts[0].verdict == "better"
    assert state.contrasts[0].n < 2500
    assert state.blocked is None
    assert read([*rows, *rows], rules(max_units=500)).contrasts[0].n == state.contrasts[0].n


def in_flight(
    n: int, per_s: float, fast_s: float, slow_s: float, seed: int, share: float = 0.9, cut: bool = True
) -> list[LogRow]:
    """A log of equal arms, `rag` answers slower: rows by the time of writing; with `cut`, up to the last draw."""
    rng = np.random.default_rng(seed)
    slow = rng.random(n) < 0.5
    drawn = np.cumsum(rng.exponential(1 / per_s, n))
    took = np.where(slow, rng.gamma(20, slow_s / 20, n), rng.gamma(20, fast_s / 20, n))
    answered = [
        answer(
            k,
            "rag" if slow[k] else "base",
            float(rng.random() < share),
            at=float(drawn[k] + took[k]),
            latency_ms=float(took[k] * 1000),
        )
        for k in range(n)
    ]
    rows = [row for k, one in enumerate(answered) for row in (assignment(one, float(drawn[k])), one)]
    rows.sort(key=lambda row: (row.at, row.kind != "assignment"))
    return [row for row in rows if row.at <= drawn[-1] or not cut]


@pytest.mark.parametrize(("per_s", "fast_s", "slow_s"), [(50, 0.3, 2.0), (20, 1.0, 5.0), (8, 1.0, 10.0)])
def test_a_slower_arm_of_equal_quality_raises_no_alarm(per_s: float, fast_s: float, slow_s: float) -> None:
    """Entered as the answers come, 7 of these 12 logs are blocked, and the others come near it."""
    for seed in range(4):
        state = judged(in_flight(900, per_s, fast_s, slow_s, seed))
        assert (state.blocked, state.contrasts[0].verdict) == (None, "undecided")
        assert state.srm_e_value < 100


@pytest.mark.parametrize("window_s", [0.0, 30.0])
def test_the_order_of_answers_changes_nothing(window_s: float) -> None:
    rows = in_flight(600, 10, 0.5, 15.0, seed=5, cut=False)
    told = rules(window_s=window_s)
    end = answer(9999, "base", 1.0, at=5000.0)
    after_window = [assignment(end), end]
    drawn = [row for row in rows if row.kind == "assignment"]
    answers = {row.request_id: row for row in rows if row.kind == "answer"}
    at_once = [one for row in drawn for one in (row, answers[row.request_id].model_copy(update={"at": row.at}))]
    late, soon = judged([*rows, *after_window], told), judged([*at_once, *after_window], told)
    assert late.contrasts == soon.contrasts
    assert late.contrasts[0].n >= 600
    assert late.srm_e_value == soon.srm_e_value


def test_an_outcome_waits_for_those_that_were_assigned_before_it() -> None:
    rows = [answer(k, "rag" if k % 2 else "base", 1.0, at=10.0 + k) for k in range(4)]
    drawn = [assignment(row, float(k)) for k, row in enumerate(rows)]
    held = judged([*drawn, *rows[1:]])
    assert (held.contrasts[0].n, held.waiting) == (0, 4)
    assert [arm.units for arm in held.arms] == [2, 2], "the test of the split takes them as they are assigned"
    assert judged([*drawn, *rows[1:], rows[0]]).contrasts[0].n == 4


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_an_answer_that_never_comes_is_a_failure_at_its_deadline(better: str) -> None:
    rows = [answer(k, "rag" if k % 2 else "base", 1.0, at=float(k)) for k in range(4)]
    told = rules(deadline_s=60.0, better=better, guardrails=(GuardrailSpec(kind="errors", limit=0.05),))
    lost = [assignment(rows[0]), *assigned(rows[1:])]
    soon = answer(10, "base", 0.5, at=59.0)
    assert judged([*lost, *assigned([soon])], told).contrasts[0].n == 0
    late = [*lost, *assigned([answer(11, "base", 0.5, at=61.0)])]
    state = judged(late, told)
    worst = 0.0 if better == "higher" else 1.0
    assert (state.contrasts[0].n, state.waiting, state.arms[0].errors) == (5, 0, 1)
    assert state.arms[0].mean == pytest.approx((worst + 1.0 + 0.5) / 3)
    after = judged([*late, rows[0].model_copy(update={"at": 62.0})], told)
    assert after.contrasts == state.contrasts
    assert after.left_out == {"after the deadline of its unit": 1}


def test_requests_in_flight_at_a_restart_failed() -> None:
    rows = [answer(k, "rag" if k % 2 else "base", 1.0, at=float(k)) for k in range(6)]
    lost = [assignment(rows[0]), assignment(rows[1]), *assigned(rows[2:])]
    detail = json.dumps(weights_detail({"base": 0.5, "rag": 0.5}))
    restart = LogRow(kind="event", experiment="e", at=6.0, event="resume", detail=detail)
    switched_on = restart.model_copy(update={"detail": "{}"})
    assert judged([*lost, switched_on]).contrasts[0].n == 0
    state = judged([*lost, restart])
    assert (state.contrasts[0].n, [arm.errors for arm in state.arms]) == (6, [1, 1])
    assert [arm.mean for arm in state.arms] == [pytest.approx(2 / 3), pytest.approx(2 / 3)]


def test_a_unit_without_feedback_counts_with_the_middle_at_its_deadline() -> None:
    rows = [answer(k, "rag" if k % 2 else "base", at=float(k)) for k in range(4)]
    thumb = rows[1].model_copy(update={"kind": "score", "detail": "facts", "scores": {"facts": 1.0}, "at": 50.0})
    told = rules(deadline_s=60.0)
    end = assigned([answer(10, "base", 1.0, at=64.0)])
    state = judged([*assigned(rows), thumb, *end], told)
    assert [(arm.units, arm.counted, arm.scored) for arm in state.arms] == [(3, 3, 1), (2, 2, 1)]
    assert [arm.mean for arm in state.arms] == [pytest.approx((0.5 + 0.5 + 1) / 3), pytest.approx((1 + 0.5) / 2)]
    late = thumb.model_copy(update={"at": 65.0})
    silent = judged([*assigned(rows), *end, late], told)
    assert silent.arms[1].mean == 0.5
    assert silent.left_out == {"after the deadline of its unit": 1}


def test_late_feedback_never_decides_which_units_count() -> None:
    """Equal thumbs of 3 units in 10; on one arm they come after seconds, on the other after minutes."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        rows = []
        for k in range(900):
            arm = "rag" if rng.random() < 0.5 else "base"
            bare = answer(k, arm, at=k / 5)
            rows += assigned([bare])
            if rng.random() < 0.3:
                at = bare.at + float(rng.uniform(0, 5) if arm == "base" else rng.uniform(100, 280))
                scores = {"facts": float(rng.random() < 0.8)}
                rows.append(bare.model_copy(update={"kind": "score", "detail": "facts", "scores": scores, "at": at}))
        rows = sorted(rows, key=lambda row: row.at)
        state = judged(rows, rules(deadline_s=300.0))
        assert (state.blocked, state.contrasts[0].verdict) == (None, "undecided")
        assert state.contrasts[0].n > 300


def test_an_answer_without_an_assignment_counts_for_nothing() -> None:
    state = judged(split(50, 0.5, 0.5))
    assert (state.contrasts[0].n, state.left_out) == (0, {"without an assignment before it": 50})


def test_copies_of_a_shadow_count_in_the_order_in_which_they_were_sent() -> None:
    told = rules(mode="shadow", weights={}, deadline_s=60.0)
    rows = shadow(300, 0.15, 0.05)
    control, copies = rows[::2], rows[1::2]
    plain = judged([*assigned(control), *assigned(copies)], told)
    sent = [assignment(copy) for copy in copies]
    turned = [*assigned(control), *sent, *sorted(copies, key=lambda copy: copy.scores["facts"])]
    assert judged(turned, told).contrasts == plain.contrasts
    silent = [one for k in range(300) for one in (*assigned([control[k]]), sent[k], copies[k])]
    silent.remove(copies[0])
    held, late = judged([row for row in silent if row.at < 60], told), judged(silent, told)
    assert (held.contrasts[0].n, held.waiting) == (0, 60)
    assert (late.contrasts[0].n, late.waiting) == (300, 0), "60 s after it was sent, the copy has failed"
    detail = json.dumps(weights_detail({"base": 1.0, "rag": 0.0}))
    restart = LogRow(kind="event", experiment="e", at=300.0, event="resume", detail=detail)
    lost = judged([*assigned(control[-9:]), *sent[-9:], *copies[-8:], restart], told)
    assert (lost.contrasts[0].n, lost.left_out) == (8, {"copy lost with the ingress": 1})
    stop = LogRow(kind="event", experiment="e", at=300.0, event="stop", detail="{}")
    late_score = answer(299, "base", 1.0, kind="score", at=400.0)
    stopped = judged([*assigned(control[-9:]), *sent[-9:], *copies[-8:], stop, late_score], told)
    assert (stopped.contrasts[0].n, stopped.left_out) == (8, {"copy cancelled by the stop": 1})
    assert (stopped.arms[1].answers, stopped.arms[1].errors) == (8, 0)


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


def test_no_rows_say_nothing() -> None:
    monitor = Monitor(rules())
    monitor.ingest(LogColumns([], [], [], [], [], [], [], [], [], [], [], [], {"facts": np.zeros(0)}))
    contrast = monitor.state().contrasts[0]
    assert (contrast.n, contrast.estimate, contrast.low, contrast.high) == (0, None, -1.0, 1.0)
    assert contrast.verdict == "undecided"
