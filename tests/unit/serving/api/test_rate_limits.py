"""Token buckets on a clock of their own, and the keys of the environment."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest

from graftwork.errors import ConfigError
from graftwork.serving.api.auth import Keys, keys_of, tokens_of
from graftwork.serving.api.errors import ApiError, bad_request
from graftwork.serving.api.rate_limits import ADDRESSES, ADMIN, RateLimits, RequestSize
from graftwork.serving.deploy import INGRESS, build
from graftwork.serving.messages import AnswerDelta, ArmAnswer, StreamChunk, StreamStart
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


def size(text_bytes: int, max_new_tokens: int = 10, answers: int = 1) -> RequestSize:
    return RequestSize("base", text_bytes, answers, max_new_tokens, room=1000)


def answer(index: int, tokens: int) -> ArmAnswer:
    return ArmAnswer(
        request_id="r",
        arm="base",
        text="",
        adapter=None,
        adapter_version=None,
        base_digest="d",
        retrieved_ids=(),
        prompt_tokens=0,
        cached_tokens=0,
        completion_tokens=tokens,
        ttft_ms=1.0,
        latency_ms=1.0,
        finish_reason="stop",
        index=index,
    )


async def chunks(prompt: int, *generated: int) -> AsyncGenerator[StreamChunk]:
    """As a replica streams one request: its prompt, then each answer in two pieces and whole."""
    yield StreamStart("d", None, prompt)
    for index, tokens in enumerate(generated):
        yield AnswerDelta(index, "", tokens // 2)
        yield AnswerDelta(index, "", tokens)
        yield answer(index, tokens)


async def drain(stream: AsyncGenerator[Any], most: int = 1000) -> None:
    """Read up to `most` chunks, then leave as a client that hangs up."""
    async with aclosing(stream):
        async for _ in stream:
            most -= 1
            if not most:
                return


def test_tokens_of_answers_are_paid_back_before_the_next_request() -> None:
    clock = Clock()
    limits = RateLimits(LimitsSpec(tokens_per_min=60), clock)
    assert refused_for(limits, "a") is None
    asyncio.run(drain(limits.metered("a", chunks(100, 10, 10), size(100, answers=2))))
    assert refused_for(limits, "a") == 61
    clock.now += 61
    assert refused_for(limits, "a") is None
    asyncio.run(drain(limits.metered(ADMIN, chunks(10**6, 1), size(100))))
    assert refused_for(limits, "b") is None


def test_a_stream_that_is_left_is_charged_what_it_gave() -> None:
    clock = Clock()
    limits = RateLimits(LimitsSpec(tokens_per_min=60), clock)
    asyncio.run(drain(limits.metered("a", chunks(50, 40), size(100)), most=2))  # the prompt and 20 of 40 tokens
    assert refused_for(limits, "a") == 11


def test_what_requests_can_take_is_reserved_until_they_end() -> None:
    """Each takes 20 of prompt and up to 10 new tokens: three fit into 100 once the template's share is known."""

    async def main() -> None:
        limits = RateLimits(LimitsSpec(tokens_per_min=100), Clock())
        first = limits.metered("a", chunks(20, 5), size(5))
        await anext(first)
        running = [limits.metered("a", chunks(20, 10), size(5)) for _ in range(20)]
        begun = await asyncio.gather(*(anext(stream) for stream in running), return_exceptions=True)
        assert [one.status for one in begun if isinstance(one, ApiError)] == [429] * 18
        assert begun[:2] == [StreamStart("d", None, 20)] * 2
        await drain(first)
        await drain(running[0])
        later = limits.metered("a", chunks(20, 10), size(5))  # 25 + 30 + 30 are taken
        with pytest.raises(ApiError, match="tokens per minute"):
            await anext(later)

    asyncio.run(main())


def test_before_a_template_is_known_the_whole_sequence_is_reserved() -> None:
    async def main() -> None:
        limits = RateLimits(LimitsSpec(tokens_per_min=1500), Clock())
        first, second = (limits.metered("a", chunks(20, 10), size(5)) for _ in range(2))
        await anext(first)
        reserved = limits.reserve("a", 1400)  # the first one's prompt is known: 30 of it are held
        reserved.resize(0)
        await drain(first)
        await drain(second)
        with pytest.raises(ApiError):
            limits.reserve("a", 1450)
        limits.reserve("a", 1440)

    asyncio.run(main())


def test_a_refused_stream_costs_nothing() -> None:
    async def refused() -> AsyncGenerator[StreamChunk]:
        raise bad_request("no")
        yield StreamStart("d", None, 0)

    limits = RateLimits(LimitsSpec(tokens_per_min=60), Clock())
    with pytest.raises(ApiError, match="no"):
        asyncio.run(drain(limits.metered("a", refused(), size(40))))
    limits.reserve("a", 60)


def test_wrong_tokens_are_counted_by_address_and_forgotten_in_order() -> None:
    clock = Clock()
    limits = RateLimits(LimitsSpec(wrong_tokens_per_min=2), clock)
    for _ in range(2):
        limits.count_wrong_token("10.0.0.1")
    with pytest.raises(ApiError) as refused:
        limits.count_wrong_token("10.0.0.1")
    assert (refused.value.status, refused.value.headers()["retry-after"]) == (429, "30")
    limits.count_wrong_token("10.0.0.2")
    clock.now += 30
    limits.count_wrong_token("10.0.0.1")
    for number in range(ADDRESSES):
        limits.count_wrong_token(f"address {number}")
    limits.count_wrong_token("10.0.0.1")
    assert len(limits._wrong_tokens) == ADDRESSES


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
    asyncio.run(drain(limits.metered("a", chunks(10**9, 1), size(100))))
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
        "team-a",
        "team-b",
        "admin",
        None,
        None,
    ]
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
