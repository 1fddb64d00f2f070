"""One engine replica in this process, without Ray."""

import asyncio
from pathlib import Path

import pytest

from graftwork.artifacts import publish as artifact
from graftwork.base import load as base_model
from graftwork.base.source import BaseSpec
from graftwork.errors import RunError
from graftwork.prompts import render as chat
from graftwork.serving.api.errors import ApiError
from graftwork.serving.engine.request import SamplingParams
from graftwork.serving.messages import AnswerDelta, ArmAnswer, StreamStart
from graftwork.storage.store import Store
from tests import engines
from tests.adapters import facts
from tests.replicas import HELLO, answer, ask, replica_of
from tests.tiny import write_tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


def test_a_stream_adds_up_to_the_answer(base: Path, tmp_path: Path) -> None:
    async def play() -> None:
        async with replica_of(base, tmp_path) as replica:
            start, *deltas, last = [chunk async for chunk in replica.stream(ask("s"))]
            whole = await answer(replica, ask("a"))
            assert start == StreamStart(whole.base_digest, None, whole.prompt_tokens)
            assert isinstance(last, ArmAnswer)
            tokens = [delta.completion_tokens for delta in deltas if isinstance(delta, AnswerDelta)]
            assert len(tokens) == len(deltas)
            assert sorted(tokens) == tokens
            assert tokens[-1] == 6
            text = "".join(delta.text for delta in deltas if isinstance(delta, AnswerDelta))
            assert text == whole.text == last.text
            assert last.token_ids == whole.token_ids
            assert whole.completion_tokens == 6
            assert whole.finish_reason == "length"
            assert 0 < whole.ttft_ms <= whole.latency_ms

    asyncio.run(play())


def test_a_stop_string_ends_the_answer_before_itself(base: Path, tmp_path: Path) -> None:
    async def play() -> None:
        async with replica_of(base, tmp_path) as replica:
            whole = await answer(replica, ask("whole"))
            stop = whole.text[2:4]
            cut = await answer(replica, ask("cut", sampling=SamplingParams(stop=(stop,))))
            assert cut.text == whole.text.split(stop)[0]
            assert cut.finish_reason == "stop"
            assert cut.completion_tokens < 6

    asyncio.run(play())


def test_an_answer_takes_what_a_prefix_leaves_of_the_sequence(base: Path, tmp_path: Path) -> None:
    from peft import PrefixTuningConfig

    async def play() -> None:
        async with replica_of(base, tmp_path / "root") as replica:
            plain = await answer(replica, ask("plain", max_new_tokens=None))
            folder = engines.write_peft(
                base, tmp_path / "adapter", 1, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=10)
            )
            known = facts(base_digest=plain.base_digest, prompt={})
            artifact.publish(Store(str(tmp_path / "root")), "support", folder, **known, alias="latest")
            tuned = await answer(replica, ask("prefix", adapter="support@latest", max_new_tokens=None))
            assert (tuned.cold, plain.cold) == (True, False)
            for one, virtual in ((plain, 0), (tuned, 10)):
                used = one.prompt_tokens + one.completion_tokens + virtual
                assert used == 128 if one.finish_reason == "length" else used < 128
            assert tuned.text != plain.text

    asyncio.run(play())


def test_a_closed_stream_frees_its_place(base: Path, tmp_path: Path) -> None:
    async def play() -> None:
        async with replica_of(base, tmp_path) as replica:
            stream = replica.stream(ask("s", max_new_tokens=100))
            await anext(stream)
            await anext(stream)
            await stream.aclose()
            while (await replica.snapshot()).engine.finished.get("cancelled") != 1:
                await asyncio.sleep(0.01)

    asyncio.run(play())


def test_health_tells_when_the_engine_has_ended(base: Path, tmp_path: Path) -> None:
    async def play() -> None:
        async with replica_of(base, tmp_path) as replica:
            await replica.check_health()
            running = asyncio.create_task(replica.choices(ask("running", max_new_tokens=100)))
            while (await replica.snapshot()).engine.running == 0:
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
            shaped = ask("l", grammar={"regex": "a+"}).arm
            found = await replica.likelihood(shaped, HELLO, texts, "l")
            template = base_model.template(base_model.resolve(BaseSpec(uri=str(base))))
            prompt = chat.render([chat.Message("user", "Hello")], template, generate=True).ids
            for text, one in zip(texts, found, strict=True):
                ids = template.continuation_ids(text)
                assert not set(ids) & template.special_ids
                assert one.tokens == len(ids)
                assert one.logprob == pytest.approx(engines.peft_score(base, None, prompt, ids), abs=1e-4)
            for wrong in ([], ["fine", ""]):
                with pytest.raises(ApiError, match="empty"):
                    await replica.likelihood(ask("w").arm, HELLO, wrong, "w")
            with pytest.raises(ApiError, match="max_seq_len=128"):
                await replica.likelihood(ask("w").arm, HELLO, ["word " * 200], "long")
            assert (await replica.snapshot()).engine.finished == {"scored": 3}

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
            asked = (chat.Message("user", question),)
            one, other = await asyncio.gather(
                *(answer(replica, ask(f"r{n}", asked, retriever=retriever)) for n in "ab")
            )
            best = sorted(texts, key=by_hand, reverse=True)[:2]
            assert list(one.retrieved_ids) == list(other.retrieved_ids) == best
            narrow = {**retriever, "rerank": None, "context_tokens": 8}
            small = await answer(replica, ask("s", asked, retriever=narrow))
            assert (small.retrieved_ids, len(small.left_out_ids)) == ((), 2)
            assert sum(series.passages_left_out for _, series in (await replica.snapshot()).series) == 2
            too_long = (chat.Message("user", "port " * 200),)
            with pytest.raises(ApiError, match="max_seq_len=128"):
                await replica.choices(ask("long", too_long, retriever=retriever))

    asyncio.run(play())
