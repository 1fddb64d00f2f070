"""Rows become observations: each unit once, in the order of assignment, with an outcome at its deadline."""

import json

import numpy as np
import pytest

from graftwork.serving.ab_test.log import LogRow
from graftwork.serving.ab_test.spec import GuardrailSpec, weights_detail
from tests.experiment_logs import answer, assigned, assignment, in_flight, judged, read, rules, shadow, split


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


def test_with_more_units_than_remembered_a_part_by_hash_goes_on() -> None:
    rows = split(4000, 0.5, 0.8)
    state = read(rows, rules(max_units=500))
    assert state.left_out["beyond max_units"] > 1000
    assert state.contrasts[0].verdict == "better"
    assert state.contrasts[0].n < 2500
    assert state.blocked is None
    assert read([*rows, *rows], rules(max_units=500)).contrasts[0].n == state.contrasts[0].n


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
