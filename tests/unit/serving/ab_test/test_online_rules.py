"""Rules of an online experiment: what stands is taken, what does not is refused with the reason."""

import json
from typing import Any

import pytest

from graftwork.errors import ConfigError
from graftwork.serving.ab_test.spec import Guardrail, OnlineRules, weights_detail, weights_of

ARMS = ("base", "rag", "both")
EVEN = {"base": 0.5, "rag": 0.25, "both": 0.25}


def rules(**changes: Any) -> OnlineRules:
    return OnlineRules(**{"arms": ARMS, "control": "base", "metric": "facts", "weights": EVEN, **changes})


def test_alpha_is_shared_between_the_contrasts() -> None:
    assert rules().challengers == ("rag", "both")
    assert rules().contrast_alpha == 0.025


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"control": "none"}, "control='none'"),
        ({"weights": {**EVEN, "base": 0.6}}, "a sum of 1.1"),
        ({"weights": {"base": 1.0}}, "one weight"),
        ({"weights": {**EVEN, "base": 1.0, "rag": -0.25}}, "0 or more"),
        ({"low": 1.0}, "low is below high"),
        ({"margin": 0.0}, "margin above 0"),
    ],
)
def test_rules_that_cannot_be_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        rules(**changes)


@pytest.mark.parametrize(
    ("guardrail", "said"),
    [
        ({"kind": "errors", "limit": 0.0}, "share within 0..1"),
        ({"kind": "latency", "limit": 0.05}, "bound_ms"),
        ({"kind": "fairness_gap", "limit": 0.1}, "two groups"),
    ],
)
def test_guardrails_that_cannot_be_are_refused(guardrail: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Guardrail(**guardrail)


def test_weights_travel_in_an_event() -> None:
    assert weights_of(json.dumps(weights_detail(EVEN)), ARMS) == EVEN
    assert weights_of(None, ARMS) is None
    assert weights_of("by hand", ARMS) is None
    with pytest.raises(ConfigError, match="one weight"):
        weights_of(json.dumps(weights_detail({"base": 1.0})), ARMS)
