"""One engine replica in this process, without Ray."""

import asyncio
from pathlib import Path

import pytest

from graftwork.artifacts import publish as artifact
from graftwork.base import load as base_model
from graftwork.base.spec import BaseSpec
from graftwork.errors import RunError
from graftwork.prompts import render as chat
from graftwork.serving.api.errors import ApiError
from graftwork.storage.store import Store
from tests import engines
from tests.adapters import facts
from tests.replicas import arm, replica_of
from tests.tiny import write_tiny_base

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


def test_a_stream_adds_up_to_the_answer(base: Path, tmp_path: Path) -> None:
    async def play() -> None:
        async with replica_of(base, tmp_path) as replica:
            chunks = [chunk async for chunk in replica.stream(arm(), HELLO, "s")]
            answer = await replica.answer(arm(), HELLO, "a")
            begun = {"base_digest": answer["base_digest"], "version": None, "prompt_tokens": answer["prompt_tokens"]}
            assert chunks[0] == begun
            assert sorted(chunk["tokens"] for chunk in chunks[1:-1]) == [chunk["tokens"] for chunk in chunks[1:-1]]
            assert chunks[-2]["tokens"] == 6
            assert "".join(chunk["text"] for chunk in chunks[1:-1]) == answer["text"] == chunks[-1]["answer"]["text"]
            assert chunks[-1]["answer"]["token_ids"] == answer["token_ids"]
            assert answer["completion_tokens"] == 6
            assert answer["finish_reason"] == "length"
            assert 0 < answer["ttft_ms"] <= answer["latency_ms"]

    asyncio.run(play())


def test_a_stop_string_ends_the_answer_before_itself(base: Path, tmp_path: Path) -> None:
    async def play() -> None:
        async with replica_of(base, tmp_path) as replica:
            whole = await replica.answer(arm(), HELLO, "whole")
            stop = whole["text"][2:4]
            cut = await replica.answer(arm(), HELLO, "cut", {"stop": [stop]})
            assert cut["text"] == whole["text"].split(stop)[0]
            assert cut["finish_reason"] == "stop"
            assert cut["completion_tokens"] < 6

    asyncio.run(play())


def test_an_answer_takes_what_a_prefix_leaves_of_the_sequence(base: Path, tmp_path: Path) -> None:
    from peft import PrefixTuningConfig

    async def play() -> None:
        async with replica_of(base, tmp_path / "root") as replica:
            plain = await replica.answer(arm(max_new_tokens=None), HELLO, "plain")
            folder = engines.write_peft(
                base, tmp_path / "adapter", 1, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=10)
            )
            known = facts(base_digest=plain["base_digest"], prompt={})
            artifact.publish(Store(str(tmp_path / "root")), "support", folder, **known, alias="latest")
            answer = await replica.answer(arm(adapter="support@latest", max_new_tokens=None), HELLO, "prefix")
            assert (answer["cold"], plain["cold"]) == (True, False)
            for one, virtual in ((plain, 0), (answer, 10)):
                used = one["prompt_tokens"] + one["completion_tokens"] + virtual
                assert used == 128 if one["finish_reason"] == "length" else used < 128
            assert answer["text"] != plain["text"]

    asyncio.run(play())


def test_a_closed_stream_frees_its_place(base: Path, tmp_path: Path) -> None:
    async def play() -> None:
        async with replica_of(base, tmp_path) as replica:
            stream = replica.stream(arm(max_new_tokens=100), HELLO, "s")
            await anext(stream)
            await anext(stream)
            await stream.aclose()
            while (await replica.stats())["engine"]["finished"].get("cancelled") != 1:
                await asyncio.sleep(0.01)

    asyncio.run(play())


def test_health_tells_when_the_engine_has_ended(base: Path, tmp_path: Path) -> None:
    async def play() -> None:
        async with replica_of(base, tmp_path) as replica:
            await replica.check_health()
            running = asyncio.create_task(replica.answer(arm(max_new_tokens=100), HELLO, "running"))
            while (await replica.stats())["engine"]["running"] == 0:
                await asyncio.sleep(0.001)
            await asyncio.to_thread(replica.stop)
            with pytest.raises(RunError, match="thread has ended"):
                await replica.check_health()
            with pytest.raises(ApiError) as told:
                await running
            assert (told.value.status, told.value.code) == (503, "engine_stopping")

    asyncio.run(play())


def test_the_likelihood_of_answers_is_that_of_their_tokens_behind_the_prompt(base: Path, tmp_path: Path) -> None:
    """Source: one whole forward pass of transformers over the prompt that the chat module renders."""

    async def play() -> None:
        async with replica_of(base, tmp_path) as replica:
            texts = ["yes", "no, not at all", "<|im_end|>"]
            told = await replica.likelihood(arm(grammar={"regex": "a+"}), HELLO, texts, "l")
            template = base_model.template(base_model.resolve(BaseSpec(uri=str(base))))
            prompt = chat.render([chat.Message("user", "Hello")], template, generate=True).ids
            for text, one in zip(texts, told, strict=True):
                ids = template.continuation_ids(text)
                assert not set(ids) & template.special_ids
                assert one["tokens"] == len(ids)
                assert one["logprob"] == pytest.approx(engines.peft_score(base, None, prompt, ids), abs=1e-4)
            for wrong in ([], ["fine", ""]):
                with pytest.raises(ApiError, match="empty"):
                    await replica.likelihood(arm(), HELLO, wrong, "w")
            with pytest.raises(ApiError, match="max_seq_len=128"):
                await replica.likelihood(arm(), HELLO, ["word " * 200], "long")
            assert (await replica.stats())["engine"]["finished"] == {"scored": 3}

    asyncio.run(play())


def test_candidates_are_put_in_the_order_of_the_questions_likelihood(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Source: a whole forward pass of transformers over each candidate's prompt."""
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    texts = {str(n): f"port {word} sea" for n, word in enumerate(("blue", "deep", "cold", "wide", "calm"))}
    lines = "".join(f'{{"id": "{identity}", "text": "{text}"}}\n' for identity, text in texts.items())
    (tmp_path / "c.jsonl").write_text(lines)
    template = base_model.template(base_model.resolve(BaseSpec(uri=str(base))))
    question = "Which port lies by the sea?"

    def by_hand(identity: str) -> float:
        turns = chat.rerank_prompt(chat.Passage(identity, texts[identity]))
        prompt = chat.render(turns, template, generate=True).ids
        return float(engines.peft_score(base, None, prompt, template.continuation_ids(question)))

    async def play() -> None:
        async with replica_of(base, tmp_path) as replica:
            retriever = {"corpus": str(tmp_path / "c.jsonl"), "k": 2, "rerank": {"candidates": 5}}
            asked = [{"role": "user", "content": question}]
            one, other = await asyncio.gather(*(replica.answer(arm(retriever=retriever), asked, f"r{n}") for n in "ab"))
            best = sorted(texts, key=by_hand, reverse=True)[:2]
            assert list(one["retrieved_ids"]) == list(other["retrieved_ids"]) == best
            small = await replica.answer(arm(retriever={**retriever, "rerank": None, "context_tokens": 8}), asked, "s")
            assert (small["retrieved_ids"], len(small["left_out_ids"])) == ((), 2)
            (_, families) = await replica.metrics()
            (left_out,) = [one for one in families if one.name == "passages_left_out"]
            assert sum(value for _, value in left_out.values if isinstance(value, int)) == 2
            too_long = [{"role": "user", "content": "port " * 200}]
            with pytest.raises(ApiError, match="max_seq_len=128"):
                await replica.answer(arm(retriever=retriever), too_long, "long")

    asyncio.run(play())
