"""Rules of an online experiment: what stands is taken, what does not is refused with the reason."""

import json
from typing import Any

import pytest

from graftwork import config
from graftwork.errors import ConfigError
from graftwork.serving.ab_test.log import rules_of
from graftwork.serving.ab_test.spec import ExperimentSpec, weights_detail, weights_of

EVEN = {"base": 0.5, "rag": 0.25, "both": 0.25}


def experiment(weights: dict[str, float] = EVEN, **changes: Any) -> ExperimentSpec:
    arms = [{"name": name, "weight": weight} for name, weight in weights.items()]
    plain = {"name": "e", "arms": arms, "control": "base", "primary": "facts"}
    return config.validate(ExperimentSpec, {**plain, **changes}, where="e.yaml")


def test_alpha_is_shared_between_the_contrasts() -> None:
    rules = rules_of(experiment())
    assert rules.challengers == ("rag", "both")
    assert rules.contrast_alpha == 0.025


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"control": "none"}, "control='none'"),
        ({"weights": {**EVEN, "base": 0.6}}, "found 1.1"),
        ({"weights": {**EVEN, "base": 1.0, "rag": -0.25}}, "arms.1.weight"),
        ({"primary": {"name": "facts", "low": 1.0}}, "low=1 is to be below high=1"),
        ({"primary": {"name": "facts", "deadline_s": 0}}, "deadline_s"),
        ({"margin": 0.0}, "margin"),
        ({"arms": [{"name": "base"}, {"name": "rag", "weight": 1.0}]}, "a weight for each"),
        (
            {"mode": "shadow", "arms": [{"name": "base"}, {"name": "rag"}], "primary": {"name": "f", "window_s": 9}},
            "primary.window_s can't act",
        ),
    ],
)
def test_rules_that_cannot_be_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        experiment(**changes)
    assert said in refused.value.text()


@pytest.mark.parametrize(
    ("guardrail", "said"),
    [
        ({"kind": "errors", "limit": 0.0}, "guardrails.0.limit"),
        ({"kind": "latency", "limit": 0.05}, "bound_ms"),
        ({"kind": "fairness_gap", "limit": 0.1}, "groups"),
    ],
)
def test_guardrails_that_cannot_be_are_refused(guardrail: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        experiment(guardrails=[guardrail])
    assert said in refused.value.text()


def test_weights_travel_in_an_event() -> None:
    arms = tuple(EVEN)
    assert weights_of(json.dumps(weights_detail(EVEN)), arms) == EVEN
    assert weights_of(None, arms) is None
    assert weights_of("by hand", arms) is None
    for wrong in ({"base": 1.0}, {**EVEN, "base": 1.0, "rag": -0.25}):
        with pytest.raises(ConfigError, match="weights of an event"):
            weights_of(json.dumps(weights_detail(wrong)), arms)
