"""Adapters come and go for ever: memory stays where it was, and so does every book that is kept of them."""

import gc
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from graftwork.serving.engine.engine import NativeEngine
from tests import engines
from tests.tiny import write_tiny_base

PROMPT = list(range(10, 40))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base, and two adapters of rank 64 on every linear: 0.7 MB each, so that one kept in fifty would show."""
    tmp = tmp_path_factory.mktemp("cycles")
    base = write_tiny_base(tmp / "base")
    return base, [engines.write_lora(base, tmp / f"{n}", n, r=64, target_modules=list(engines.ALL)) for n in range(2)]


@pytest.fixture
def engine(parts: tuple[Path, list[Path]]) -> Iterator[NativeEngine]:
    engine = NativeEngine(engines.load_model(parts[0]), engines.spec(max_loaded=2), "cpu")
    engine.start()
    yield engine
    engine.stop()


def cycle(engine: NativeEngine, folders: list[Path], number: int) -> None:
    """Two versions loaded, used in one batch with the base, and retired; every name is new."""
    names = [f"{number}-{n}" for n in range(len(folders))]
    for name, folder in zip(names, folders, strict=True):
        engine.load_adapter(name, folder)
    requests = [engines.request(f"r{name}", PROMPT, name, max_new_tokens=2) for name in names]
    answers = engines.ask(engine, *requests, engines.request(f"base{number}", PROMPT, max_new_tokens=2))
    assert [answer.error for answer in answers] == [None] * 3
    for name in names:
        engine.retire_adapter(name)


def grown(engine: NativeEngine, folders: list[Path], cycles: int, warm_up: int = 20) -> tuple[float, int]:
    """Growth of the process's memory over `cycles`, as a share, and of the number of live tensors."""
    for number in range(warm_up):
        cycle(engine, folders, number)
    before, tensors = psutil.Process().memory_info().rss, live_tensors(engine)
    for number in range(warm_up, warm_up + cycles):
        cycle(engine, folders, number)
    return psutil.Process().memory_info().rss / before - 1, live_tensors(engine) - tensors


def live_tensors(engine: NativeEngine) -> int:
    """Counted once the engine's thread has let go of what was retired last."""
    engines.ask(engine, engines.request("tidy", PROMPT, max_new_tokens=2))
    gc.collect()
    return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())


def test_two_hundred_loads_and_unloads_leave_nothing_behind(
    engine: NativeEngine, parts: tuple[Path, list[Path]]
) -> None:
    share, tensors = grown(engine, parts[1], cycles=100)
    assert engine.adapters() == []
    assert tensors == 0
    assert share < 0.01


@pytest.mark.soak
def test_ten_thousand_loads_and_unloads_leave_nothing_behind(
    engine: NativeEngine, parts: tuple[Path, list[Path]]
) -> None:
    share, tensors = grown(engine, parts[1], cycles=5000)
    assert tensors == 0
    assert share < 0.01
