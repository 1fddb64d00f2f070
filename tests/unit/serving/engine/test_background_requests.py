"""Background requests (shadow traffic): they cost the others no step, row or memory, and lose nothing by it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from graftwork.serving.engine.adapter_slots import AdapterSlots
from graftwork.serving.engine.adapters.loaded import LoadedAdapter
from graftwork.serving.engine.engine import NativeEngine
from graftwork.serving.engine.kv_cache import KvShape, KvStore
from graftwork.serving.engine.request import GenerateRequest, SamplingParams
from graftwork.serving.engine.scheduler import RunningRequest, Scheduler
from tests import engines
from tests.tiny import write_tiny_base

PROMPT, LONG = tuple(range(10, 18)), tuple(range(10, 74))


class Steps:
    """The scheduler alone: `step` says who was computed, and the tokens are made up."""

    def __init__(self, *, rows: int = 4, kv_tokens: int = 4096, slots: int = 4) -> None:
        kv = KvStore([KvShape(1, 1)], kv_tokens, 128, torch.float32, torch.device("cpu"))
        seats = AdapterSlots(slots, lambda version: LoadedAdapter(version, rank=8, groups={}), lambda _: None)
        self.scheduler = Scheduler(kv, None, seats, max_batch=rows, prefill_tokens=512)
        self._count = 0

    def ask(self, name: str, answer: int = 4, *, background: bool = False, version: str | None = None) -> None:
        self._count += 1
        request = GenerateRequest(name, PROMPT, SamplingParams(answer), adapter=version, background=background)
        adapter = LoadedAdapter(version, rank=8, groups={}) if version is not None else None
        self.scheduler.add(RunningRequest((background, self._count, self._count), request, lambda _: None, adapter))

    def step(self) -> set[str]:
        computed = set()
        decoding, prompts = self.scheduler.schedule()
        for request in (*decoding, *prompts):
            assert request.row is not None
            computed.add(request.request.request_id)
            finishes = request.scheduled == request.remaining
            request.row.length += request.scheduled
            if finishes:
                request.tokens.append(7)
            if len(request.tokens) - request.prompt_end == request.request.sampling.max_new_tokens:
                self.scheduler.remove(request)
        return computed


def test_it_stands_still_while_another_is_there_and_goes_on_afterwards() -> None:
    steps = Steps()
    steps.ask("background", 6, background=True)
    assert [steps.step() for _ in range(2)] == [{"background"}] * 2
    steps.ask("caller", 4)
    assert [steps.step() for _ in range(4)] == [{"caller"}] * 4
    assert [steps.step() for _ in range(4)] == [{"background"}] * 4, "it kept its two tokens"
    assert steps.step() == set()
    assert steps.scheduler.preemptions == 0


def test_it_waits_for_the_last_of_the_others() -> None:
    steps = Steps()
    steps.ask("caller", 3)
    steps.ask("background", 1, background=True)
    steps.ask("late", 3)
    assert [steps.step() for _ in range(4)] == [{"caller", "late"}] * 3 + [{"background"}]


@pytest.mark.parametrize(("rows", "kv_tokens", "slots"), [(2, 4096, 4), (8, 128, 4), (8, 4096, 2)])
def test_a_caller_gets_the_row_memory_or_slot_that_background_ones_hold(rows: int, kv_tokens: int, slots: int) -> None:
    """Rows, memory and slots for two: both are taken by background requests when a caller comes."""
    steps = Steps(rows=rows, kv_tokens=kv_tokens, slots=slots)
    for name in ("background1", "background2"):
        steps.ask(name, 40, background=True, version=name)
    assert steps.step() == {"background1", "background2"}
    steps.ask("caller", 3, version="caller")
    assert [steps.step() for _ in range(3)] == [{"caller"}] * 3, "in the very next step"
    assert [steps.step() for _ in range(30)] == [{"background1", "background2"}] * 30


def test_a_step_for_background_prompts_is_short() -> None:
    """So that a caller who comes in the middle of it does not wait for a whole prompt."""
    steps = Steps()
    for number in range(3):
        steps.ask(f"background{number}", 1, background=True)
    assert [steps.step() for _ in range(2)] == [{"background0", "background1"}, {"background2"}]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NativeEngine]:
    base: Path = write_tiny_base(tmp_path_factory.mktemp("base"))
    engine = NativeEngine(engines.load_model(base), engines.spec(max_batch=2), "cpu")
    engine.start()
    yield engine
    engine.stop()


def test_answers_are_those_of_any_other_request(engine: NativeEngine) -> None:
    """Four background answers that callers interrupt, in two rows, against the same asked alone."""
    background = [engines.request(f"i{n}", list(LONG[n:]), max_new_tokens=24) for n in range(4)]
    alone = [engines.ask(engine, replace(one, request_id=f"alone{one.request_id}"))[0].tokens for one in background]
    seen = engines.Collector()
    for one in background:
        engine.submit(replace(one, background=True), seen)
    for number in range(6):
        engines.ask(engine, engines.request(f"c{number}", list(LONG[number + 4 :]), max_new_tokens=3))
    assert [answer.tokens for answer in seen.wait("i0", "i1", "i2", "i3")] == alone
