"""Token buckets on a clock of their own, and the keys of the environment."""

import hashlib
from typing import Any

import pytest

from graftwork.errors import ConfigError
from graftwork.serving.api_error import ApiError
from graftwork.serving.app import INGRESS, build
from graftwork.serving.auth import Keys, keys_of, tokens_of
from graftwork.serving.limits import ADMIN, RateLimits
from graftwork.serving.spec import LimitsSpec, ServeSpec


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def refused_for(limits: RateLimits, name: str) -> int | None:
    """Seconds that the caller is told to wait; None where the request passes."""
    try:
        limits.admit(name)
    except ApiError as error:
        return int(error.headers()["retry-after"])
    return None


def test_requests_pass_at_their_rate_after_the_first_minutes_worth() -> None:
    clock = Clock()
    limits = RateLimits(LimitsSpec(requests_per_min=6), clock)
    assert [refused_for(limits, "a") for _ in range(7)] == [None] * 6 + [10]
    clock.now += 9.5
    assert refused_for(limits, "a") == 1
    clock.now += 0.5
    assert [refused_for(limits, "a") for _ in range(2)] == [None, 10]
    assert refused_for(limits, "b") is None
    clock.now += 3600  # an hour of silence saves up one minute's worth, no more
    assert [refused_for(limits, "a") for _ in range(7)] == [None] * 6 + [10]


def test_a_refused_request_costs_nothing() -> None:
    clock = Clock()
    limits = RateLimits(LimitsSpec(requests_per_min=1), clock)
    assert [refused_for(limits, "a") for _ in range(50)] == [None] + [60] * 49
    clock.now += 60
    assert refused_for(limits, "a") is None


def test_tokens_of_answers_are_paid_back_before_the_next_request() -> None:
    clock = Clock()
    limits = RateLimits(LimitsSpec(tokens_per_min=60), clock)
    assert refused_for(limits, "a") is None
    for index in range(2):  # two answers to one prompt
        limits.charge("a", {"index": index, "prompt_tokens": 100, "completion_tokens": 10})
    assert refused_for(limits, "a") == 61
    clock.now += 61
    assert refused_for(limits, "a") is None
    limits.charge(ADMIN, {"index": 0, "prompt_tokens": 10**6, "completion_tokens": 0})
    assert refused_for(limits, "b") is None


@pytest.mark.parametrize("many", [{"num_replicas": 4}, {"autoscaling": {"min_replicas": 2, "max_replicas": 8}}])
def test_all_requests_pass_one_ingress_process_however_many_replicas_there_are(many: dict[str, Any]) -> None:
    """The buckets are in that process, so a second one would double every rate."""
    application: Any = build(ServeSpec.model_validate({"base": "x", "limits": {"requests_per_min": 1}, **many}))
    ingress = application._bound_deployment
    assert ingress.name == INGRESS
    assert ingress._deployment_config.num_replicas == 1
    assert ingress._deployment_config.autoscaling_config is None


def test_without_limits_everything_passes() -> None:
    limits = RateLimits(LimitsSpec(), Clock())
    limits.charge("a", {"index": 0, "prompt_tokens": 10**9, "completion_tokens": 0})
    assert [refused_for(limits, "a") for _ in range(100)] == [None] * 100


def test_one_token_or_a_line_for_each_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYS", "correct horse: battery staple")
    assert tokens_of("KEYS", "token_env") == {"default": "correct horse: battery staple"}
    monkeypatch.setenv("KEYS", "team-a:first key\n\n  team-b:second:key \n")
    assert tokens_of("KEYS", "token_env") == {"team-a": "first key", "team-b": "second:key"}
    monkeypatch.setenv("OWNER", "the owner's")
    spec = ServeSpec.model_validate({"base": "x", "token_env": "KEYS", "admin_token_env": "OWNER"})
    keys = keys_of(spec)
    assert [keys.name_of(f"Bearer {token}") for token in ("first key", "second:key", "the owner's", "third", "")] == [
        "team-a", "team-b", "admin", None, None,
    ]  # fmt: skip
    assert keys.name_of("Basic first key") is None
    assert keys.name_of("bearer  first key ") == "team-a"


@pytest.mark.parametrize("value", ["", " \n ", "a:one\nno name", "a:one\na:two", "a:one\nAdmin:two", "admin:x\nb:y"])
def test_keys_that_cannot_be_told_apart_are_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("KEYS", value)
    with pytest.raises(ConfigError, match="token_env=KEYS") as refused:
        tokens_of("KEYS", "token_env")
    assert "one" not in refused.value.text().split("Rule")[0], "a message must not tell a token"


def test_keys_hold_digests_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYS", "very secret")
    keys = keys_of(ServeSpec.model_validate({"base": "x", "token_env": "KEYS"}))
    assert keys == Keys({"default": hashlib.sha256(b"very secret").hexdigest()}, None)
    assert "secret" not in repr(keys)
