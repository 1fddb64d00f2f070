"""Why answers fail: the rule from probes to causes, shares of failures, and failures with planted causes."""

import itertools
from dataclasses import replace

import pytest
from statsmodels.stats.proportion import proportion_confint

from benchmarks.advice import REMEDY, Told, run
from graftwork.serving.evaluation.failures.classify import (
    ProbeEvidence,
    classify,
    n_to_settle,
    repaired,
    share,
    state,
)
from graftwork.stats import wilson

WRONG = ProbeEvidence(form_right=True, value_right=False, retrieves=False)


@pytest.mark.parametrize(
    ("found", "causes"),
    [
        (replace(WRONG, value_right=True, form_right=False), ("form",)),
        (replace(WRONG, value_right=True), ("form",)),
        (replace(WRONG, oracle_right=True), ("information",)),
        (replace(WRONG, oracle_right=True, form_right=False), ("information", "form")),
        (replace(WRONG, oracle_right=True, closed_book=True), ("information",)),
        (replace(WRONG, oracle_right=False), ("use_of_context",)),
        (replace(WRONG, oracle_right=True, right_before=True), ("forgetting",)),
        (WRONG, ("unknown",)),
        (replace(WRONG, retrieves=True, gold_retrieved=False, oracle_right=True), ("retrieval",)),
        (replace(WRONG, retrieves=True, gold_retrieved=False, oracle_right=False, closed_book=True), ("distraction",)),
        (replace(WRONG, retrieves=True, gold_retrieved=False, oracle_right=False), ("use_of_context",)),
        (replace(WRONG, retrieves=True, gold_retrieved=True, oracle_right=True), ("distraction",)),
        (replace(WRONG, retrieves=True, gold_retrieved=True, oracle_right=False, closed_book=True), ("distraction",)),
        (replace(WRONG, retrieves=True, gold_retrieved=True, oracle_right=False), ("use_of_context",)),
        (replace(WRONG, retrieves=True, gold_retrieved=True, right_before=True), ("use_of_context",)),
        (replace(WRONG, retrieves=True, gold_retrieved=False, right_before=True), ("forgetting",)),
    ],
)
def test_the_rule(found: ProbeEvidence, causes: tuple[str, ...]) -> None:
    assert classify(found) == causes


def test_the_rule_has_an_answer_for_all_evidence() -> None:
    maybe = (None, False, True)
    for form, value, retrieves in itertools.product((False, True), repeat=3):
        for rest in itertools.product(maybe, repeat=5):
            causes = classify(ProbeEvidence(form, value, retrieves, *rest))
            assert 1 <= len(causes) == len(set(causes)) <= 2
            assert ("form" in causes) == (value or not form)
            assert value == (causes == ("form",))


def test_only_what_stands_around_an_object_is_repaired() -> None:
    assert repaired('```json\n{"a": [1, {"b": "}"}]}\n``` and {"c": 2}') == '{"a": [1, {"b": "}"}]}'
    assert repaired("{'a': 1}") is None
    assert repaired('{"a": 1') is None
    assert repaired("no") is None


def test_a_share_has_wilsons_interval_as_statsmodels_has_it() -> None:
    found = share("form", 7, 40, 0.05, {"arm": "base"})
    assert (found.low, found.high) == pytest.approx(proportion_confint(7, 40, method="wilson"))
    assert found.signature.startswith("form|n:40|arm:base|ci:wilson|alpha:0.05|v:")
    assert state(found, 0.05) == "matters"
    assert state(found, 0.1) == "open"
    assert state(found, 0.4) == "dismissed"


@pytest.mark.parametrize("value", [0.2, 0.13, 0.05, 0.0])
def test_the_failures_that_settle_it_are_the_fewest(value: float) -> None:
    n = n_to_settle(value, 0.1, 0.05)
    assert n is not None

    def settled(size: int) -> bool:
        found = wilson(round(value * size), size)
        return found.low >= 0.1 or found.high < 0.1

    assert settled(n)
    assert not settled(n // 2)
    assert n_to_settle(0.1, 0.1, 0.05) is None


@pytest.fixture(scope="module")
def planted() -> list[Told]:
    return run(each=40, seed=0)


def test_planted_causes_are_named(planted: list[Told]) -> None:
    total = sum(len(one.causes) for one in planted)
    assert total == 240
    assert sum(one.named for one in planted) / total >= 0.9
    assert all(one.named / len(one.causes) >= 0.75 for one in planted)
    assert {one.cause: one.card.remedy for one in planted} == REMEDY


def test_cards_of_planted_causes_have_their_reasons(planted: list[Told]) -> None:
    form = next(one.card for one in planted if one.cause == "form")
    assert form.grammar_is_enough is not None
    assert form.grammar_is_enough.value > 0.9
    assert form.sentence.startswith(
        "Decode under a grammar: of 40 probed failures of base, wrong form in 100% [91, 100]"
    )
    for one in planted:
        assert sum(one.card.arms[0].causes.values()) == 40
        shown = {cause.cause for cause in one.card.causes if cause.state == "matters"}
        assert shown == {one.cause}
