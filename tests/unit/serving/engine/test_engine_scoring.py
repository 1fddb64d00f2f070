"""How likely a given continuation is: the engine says what a whole forward pass of PEFT says, whatever else runs."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from graftwork.errors import DataError
from graftwork.serving.engine.engine import NativeEngine
from graftwork.serving.engine.request import GenerateRequest, SamplingParams
from graftwork.serving.engine.scheduler import SCORED_A_STEP
from tests import engines
from tests.tiny import VOCAB_SIZE

Pairs = list[tuple[list[int], list[int]]]


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from peft import IA3Config, PrefixTuningConfig

    root = tmp_path_factory.mktemp("adapters")
    ia3 = IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7)
    return {
        "lora": engines.write_lora(base, root / "lora", 1, r=8, target_modules=list(engines.ALL)),
        "dora": engines.write_lora(base, root / "dora", 2, r=4, target_modules=["q_proj", "down_proj"], use_dora=True),
        "ia3": engines.write_peft(base, root / "ia3", 3, ia3),
        "prefix": engines.write_peft(base, root / "prefix", 4, prefix),
    }


@pytest.fixture(scope="module")
def engine(base: Path, adapters: dict[str, Path]) -> Iterator[NativeEngine]:
    engine = NativeEngine(engines.load_model(base), engines.spec(prefill_tokens=48), "cpu")
    for version, folder in adapters.items():
        engine.load_adapter(version, folder)
    engine.start()
    yield engine
    engine.stop()


def pairs(count: int, seed: int) -> Pairs:
    """Prompts and continuations of 1 to 90 and 1 to 60 tokens, half of the prompts with a common beginning."""
    rng = random.Random(seed)

    def tokens(most: int) -> list[int]:
        return [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randint(1, most))]

    shared = tokens(1) * 33
    return [((shared if n % 2 else []) + tokens(90), tokens(60) if n % 3 else tokens(1)) for n in range(count)]


def test_scores_are_those_of_a_whole_forward_pass_in_a_mixed_batch(
    base: Path, adapters: dict[str, Path], engine: NativeEngine
) -> None:
    """Source: transformers and peft, fp32, each alone; others generate beside, prompts come in several chunks."""
    names = [None, *adapters]
    asked = [(pair, names[n % len(names)]) for n, pair in enumerate(pairs(30, 0))]
    scored = [engines.scoring(f"s{n}", *pair, name) for n, (pair, name) in enumerate(asked)]
    said = [engines.request(f"g{n}", range(9, 40 + n), names[n], max_new_tokens=9) for n in range(5)]
    answers = engines.ask(engine, *said, *scored)
    for answer, (pair, name) in zip(answers[5:], asked, strict=True):
        assert (answer.finish, answer.tokens) == ("scored", [])
        assert answer.score == pytest.approx(engines.peft_score(base, adapters.get(name or ""), *pair), abs=2e-4)
    for answer, one in zip(answers, said, strict=False):
        [expected] = engines.peft_greedy(base, adapters.get(one.adapter or ""), [one.prompt_ids], 9)
        assert answer.tokens == expected


def test_continuations_of_one_prompt_share_it(base: Path, engine: NativeEngine) -> None:
    prompt, endings = list(range(20, 120)), [[5], [6, 7], [8] * 20]
    answers = engines.ask(engine, *(engines.scoring(f"e{n}", prompt, end, "lora") for n, end in enumerate(endings)))
    assert sorted(answer.cached_tokens for answer in answers) == [0, 96, 96]
    again = engines.ask(engine, *(engines.scoring(f"f{n}", prompt, end, "lora") for n, end in enumerate(endings)))
    assert [answer.cached_tokens for answer in again] == [96] * 3
    assert [answer.score for answer in again] == pytest.approx([answer.score for answer in answers], abs=1e-4)
    [generated] = engines.ask(engine, engines.request("after", prompt, "lora", max_new_tokens=4))
    assert generated.cached_tokens == 96


def test_the_greedy_answer_scores_the_sum_of_its_own_log_probabilities(engine: NativeEngine) -> None:
    prompt = list(range(50, 77))
    [said] = engines.ask(engine, engines.request("say", prompt, "dora", max_new_tokens=25, logprobs=0))
    [scored] = engines.ask(engine, engines.scoring("score", prompt, said.tokens, "dora"))
    assert scored.score == pytest.approx(sum(one or 0 for one in said.logprobs), abs=2e-4)
    before = engine.stats().finished["scored"]
    assert before > 0


def test_a_long_continuation_takes_several_steps(base: Path) -> None:
    engine = NativeEngine(engines.load_model(base), engines.spec(max_seq_len=512, prefill_tokens=512), "cpu")
    engine.start()
    prompt, continuation = list(range(100, 110)), [3 + n * 7 % 400 for n in range(400)]
    [answer] = engines.ask(engine, engines.scoring("long", prompt, continuation))
    assert engine.stats().steps == -(-400 // SCORED_A_STEP)
    engine.stop()
    assert answer.score == pytest.approx(engines.peft_score(base, None, prompt, continuation), rel=1e-6)


def test_a_scored_request_that_steps_back_is_scored_right(base: Path) -> None:
    """Answers outgrow their page of the memory while the latest request, which is being scored, holds the other."""
    engine = NativeEngine(
        engines.load_model(base),
        engines.spec(max_seq_len=1024, kv_tokens=2048, prefill_tokens=16, prefix_cache=False),
        "cpu",
    )
    collector = engines.Collector()
    said = [engines.request(f"g{n}", range(10, 74), max_new_tokens=60) for n in range(2)]
    prompt, continuation = list(range(60)), [3 + n * 7 % 400 for n in range(640)]
    for one in (*said, engines.scoring("s", prompt, continuation)):
        engine.submit(one, collector)
    engine.start()
    answer = collector.wait("s")[0]
    stats = engine.stats()
    engine.stop()
    assert answer.score == pytest.approx(engines.peft_score(base, None, prompt, continuation), rel=1e-6)
    assert stats.preemptions > 0


def test_what_cannot_be_scored_is_refused(engine: NativeEngine) -> None:
    refused = {
        "prompt and continuation": engines.scoring("r", range(200), range(57)),
        f"token id {VOCAB_SIZE}": engines.scoring("r", [5], [VOCAB_SIZE]),
        "nothing is generated": GenerateRequest("r", (5,), SamplingParams(seed=1), continuation=(6,)),
        "7 virtual tokens": engines.scoring("r", range(200), range(50), "prefix"),
    }
    for found, one in refused.items():
        with pytest.raises(DataError, match=found):
            engine.submit(one, engines.Collector())
    assert engines.ask(engine, engines.scoring("r", [5], [6]))[0].finish == "scored"


def test_a_scored_request_can_be_cancelled(engine: NativeEngine) -> None:
    collector = engines.Collector()
    engine.submit(engines.request("beside", range(10, 60), max_new_tokens=100), collector)
    engine.submit(engines.scoring("s", range(3, 120), range(120)), collector)
    engine.cancel("s")
    answer = collector.wait("s")[0]
    engine.cancel("beside")
    assert (answer.finish, answer.score) in {("cancelled", None), ("scored", answer.score)}
