"""The engine with the GPU's decode path: the same answers as the plain one. In Triton's interpreter without a GPU."""

import random
from pathlib import Path

import pytest
import torch

from graftwork.serving.engine.adapter_slots import AdapterPool
from graftwork.serving.engine.adapters.format import ReadOptions
from graftwork.serving.engine.adapters.loaded import LoadedAdapter
from graftwork.serving.engine.attention import Chunk, pack
from graftwork.serving.engine.cuda.graph_decode import (
    GraphCapture,
    GraphDecode,
    Step,
    direct,
    reads_positions_on_host,
    row_buckets,
)
from graftwork.serving.engine.engine import NativeEngine
from graftwork.serving.engine.kv_cache import KvRow, KvStore
from graftwork.serving.engine.model_runner import Runner
from tests import engines
from tests.tiny import VOCAB_SIZE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ADAPTERS = {
    "a" * 12: {"r": 8, "target_modules": list(engines.ALL)},
    "b" * 12: {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "down_proj"], "use_rslora": True},
    "c" * 12: {"r": 20, "target_modules": "all-linear"},
    "d" * 12: {"r": 4, "target_modules": ["k_proj", "down_proj"], "use_dora": True},
}


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    made = enumerate(ADAPTERS.items(), 1)
    return {name: engines.write_lora(base, root / name, seed, **config) for seed, (name, config) in made}


def gpu_engine(base: Path, **limits: int) -> NativeEngine:
    """The CUDA path; on a CPU its kernels are interpreted and its graphs are plain calls, the rest is the same."""
    graph_decode = GraphDecode(torch.device(DEVICE), None if DEVICE == "cuda" else direct)
    model = engines.load_model(base).to(DEVICE)
    return NativeEngine(
        model, engines.spec(**{"max_batch": 6, "max_seq_len": 128, **limits}), DEVICE, graph_decode=graph_decode
    )


def test_mixed_adapters_answer_as_peft_does(base: Path, adapters: dict[str, Path]) -> None:
    """Base rows, ranks of 4 to 20, DoRA, two rows of one adapter, prompts beside decoding rows, a cached prefix."""
    rng = random.Random(0)
    prompts = [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in (3, 66, 18, 40, 1)]
    prompts.append(prompts[1][:50] + [9])
    names = [None, "a" * 12, "b" * 12, "c" * 12, "d" * 12, "a" * 12]
    engine = gpu_engine(base, prefill_tokens=32)
    for version, folder in adapters.items():
        engine.load_adapter(version, folder)
    engine.start()
    asked = [engines.request(f"r{n}", prompt, names[n], max_new_tokens=4) for n, prompt in enumerate(prompts)]
    answers = engines.ask(engine, *asked)
    engine.stop()
    for name, prompt, answer in zip(names, prompts, answers, strict=True):
        assert answer.error is None
        assert answer.tokens == engines.peft_greedy(base, adapters[name] if name else None, [prompt], 4)[0]


def test_kinds_beyond_lora_decode_beside_the_graphs(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    """Multiplied channels and replaced rows are computed eagerly; a prefix lies in KV: its rows stay in the graph."""
    from peft import IA3Config, LoraConfig, PrefixTuningConfig

    kinds = {
        "dora": LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], use_dora=True),
        "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=["v_proj"], feedforward_modules=[]),
        "rows": LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], trainable_token_indices=[5, 6, 7]),
        "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    }
    folders = {
        name: engines.write_peft(base, tmp_path / name, n, config) for n, (name, config) in enumerate(kinds.items())
    }
    folders["lora"] = adapters["a" * 12]
    engine = gpu_engine(base)
    for version, folder in folders.items():
        engine.load_adapter(version, folder)
    engine.start()
    prompts = {name: [5, 6, 7, 30 + n, 9, 11] for n, name in enumerate([None, *folders])}
    asked = [engines.request(str(name), prompt, name, max_new_tokens=4) for name, prompt in prompts.items()]
    answers = engines.ask(engine, *asked)
    engine.stop()
    for (name, prompt), answer in zip(prompts.items(), answers, strict=True):
        assert answer.error is None
        assert answer.tokens == engines.peft_greedy(base, folders[name] if name else None, [prompt], 4)[0], name


def test_a_captured_step_stays_right_when_rows_move_and_adapters_change(base: Path, adapters: dict[str, Path]) -> None:
    captured: list[Step] = []

    def capture(step: Step) -> Step:
        captured.append(step)
        return GraphCapture()(step) if DEVICE == "cuda" else direct(step)

    graph_decode = GraphDecode(torch.device(DEVICE), capture)
    runner = Runner(engines.load_model(base).to(DEVICE), DEVICE, graph_decode)
    kv = runner.new_kv(1024, 128)
    graph_decode.attach(runner, kv, max_batch=4, max_rank=32)
    graph_decode.warm_up()
    assert len(captured) == 6, "1, 2 and 4 rows, with adapters and without"
    a, b, c, _ = (loaded(runner, name, folder) for name, folder in adapters.items())
    rows = [prefilled(runner, kv, length, weights) for length, weights in ((20, a), (33, b), (5, None), (41, a))]
    check_step(runner, kv, rows, [a, b, None, a])
    place = rows[3].start
    assert kv.grow(rows[3], 100)
    assert rows[3].start != place
    graph_decode.forget(a.version)
    check_step(runner, kv, rows[2:], [c, b])
    check_step(runner, kv, rows[2:], [None, None])
    check_step(runner, kv, rows[3:], [c])
    assert len(captured) == 6
    runner.close()


def loaded(runner: Runner, version: str, folder: Path) -> LoadedAdapter:
    groups, device = runner.sites.groups(), runner.device
    pool = AdapterPool(
        groups,
        runner.base,
        ReadOptions(32, runner.dtype),
        device=device,
        stacked=True,
        on_freed=lambda _: None,
    )
    pool.load(version, folder)
    return pool.copy_to_device(version, runner.device)


def prefilled(runner: Runner, kv: KvStore, length: int, weights: LoadedAdapter | None) -> KvRow:
    """A row of `length` prompt tokens."""
    row = kv.allocate(length + 8)
    assert row is not None
    prompt = Chunk(range(50, 50 + length), 0, row)
    runner.forward(pack([], [prompt], kv, runner.device), [], [weights], [length - 1])
    row.length = length
    return row


def check_step(runner: Runner, kv: KvStore, rows: list[KvRow], adapters: list[LoadedAdapter | None]) -> None:
    """One token each, by the captured step and by the plain pass, which writes the same keys and values again."""
    assert runner.graph_decode is not None
    chunks = [Chunk([90 + n], row.length, row) for n, row in enumerate(sorted(rows, key=lambda row: row.start))]
    with torch.inference_mode():
        ours = runner.graph_decode.logits(chunks, adapters).clone()
    plain = runner.forward(pack(chunks, [], kv, runner.device), adapters, [], range(len(chunks)))
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)
    for row in rows:
        row.length += 1


def test_sampled_rows_draw_the_same_tokens_on_both_paths(base: Path) -> None:
    asked = [engines.request(f"r{n}", [5 + n, 6, 7], temperature=0.8, seed=n, max_new_tokens=3) for n in range(3)]
    answers = []
    for engine in (
        NativeEngine(engines.load_model(base), engines.spec(), "cpu"),
        gpu_engine(base, max_batch=3, max_seq_len=256),
    ):  # two parts of the keys
        engine.start()
        answers.append([answer.tokens for answer in engines.ask(engine, *asked)])
        engine.stop()
    assert answers[0] == answers[1]


@pytest.mark.parametrize(("most", "sizes"), [(1, [1]), (6, [1, 2, 4, 6]), (64, [1, 2, 4, 8, 16, 32, 64])])
def test_graphs_are_captured_for_powers_of_two_and_the_largest_batch(most: int, sizes: list[int]) -> None:
    assert row_buckets(most) == sizes


def test_a_rope_that_asks_for_the_longest_position_is_named() -> None:
    from transformers import LlamaConfig

    plain = LlamaConfig()
    moving = LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0})
    assert reads_positions_on_host(plain) is None
    assert reads_positions_on_host(moving) == "dynamic"
