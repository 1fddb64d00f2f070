"""The engine on one GPU with a Llama-8B shape and random weights: tokens per second, swap and start times.

    python benchmarks/gpu_decode.py --out benchmarks/results/gpu_decode.json      # one H100, about 10 minutes
    python benchmarks/gpu_decode.py --shape tiny --device cpu --out FILE          # the same code, to try it

The model is built from a config in code and quantised on the device, so nothing is fetched. Throughput counts generated
tokens from the first submit to the last event, prompts included, as vLLM's figures beside it were taken
(docs/log.md). A round is one such run; rounds of all mixes go in turns. Adapters are rank 16 on every inner linear, of
equal content but separate memory. `kernels` are the device's microseconds a step by kernel, to tune by.
"""

import argparse
import gc
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from graftwork.environment import collect
from graftwork.serving.engine.engine import NativeEngine
from graftwork.serving.engine.request import GenerateRequest, SamplingParams, TokenEvent
from graftwork.serving.spec import EngineSpec

RANK = 16
WAIT_S = 900.0
SHAPES: dict[str, dict[str, int]] = {
    "llama-8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


def build(shape: str, weights: str, device: str) -> Any:
    """A random Llama on the device: bf16 on a GPU, fp32 on a CPU; its inner linears packed to nf4 where asked."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, rope_parameters={"rope_theta": 500_000.0})
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    if weights == "nf4":
        pack_linears(model, device)
    return model


def pack_linears(model: Any, device: str) -> None:
    """Replaces every linear but the output layer by bitsandbytes' Linear4bit (nf4, scales kept in fp32)."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, module in list(model.named_modules()):
        if type(module) is not torch.nn.Linear or module is model.get_output_embeddings():
            continue
        packed = Linear4bit(
            module.in_features,
            module.out_features,
            bias=False,
            compute_dtype=module.weight.dtype,
            compress_statistics=False,
            quant_type="nf4",
            device="meta",
        )
        data = module.weight.data.to("cpu" if device == "cpu" else device)
        packed.weight = Params4bit(
            data, requires_grad=False, quant_type="nf4", compress_statistics=False, module=packed
        )
        model.set_submodule(name, packed.to(device))


def write_adapter(model: Any, folder: Path) -> Path:
    """A random adapter in PEFT's form, on every inner linear."""
    from safetensors.torch import save_file

    tensors, names = {}, set()
    generator = torch.Generator().manual_seed(1)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            names.add(name.rpartition(".")[2])
            for half, shape in (("A", (RANK, module.in_features)), ("B", (module.out_features, RANK))):
                key = f"base_model.model.{name}.lora_{half}.weight"
                tensors[key] = torch.randn(shape, generator=generator).mul_(0.01).to(torch.bfloat16)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": sorted(names)}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


class Run:
    """All requests of one round; `wait` returns when the last has ended."""

    def __init__(self, engine: NativeEngine, count: int) -> None:
        self._engine, self._left = engine, count
        self._ended = threading.Event()
        self.times: dict[str, list[float]] = {}
        self.error: str | None = None

    def submit(self, name: str, prompt: Sequence[int], new: int, version: str | None) -> None:
        self.times[name] = []
        self._engine.submit(GenerateRequest(name, tuple(prompt), SamplingParams(new), adapter=version), self._note)

    def wait(self) -> None:
        if not self._ended.wait(WAIT_S):
            raise TimeoutError(f"{self._left} requests still run after {WAIT_S:.0f} s")
        if self.error is not None:
            raise RuntimeError(self.error)

    def _note(self, event: TokenEvent) -> None:
        self.times[event.request_id].append(time.perf_counter())
        if event.finish_reason is not None:
            self.error = self.error or event.error
            self._left -= 1
            if self._left == 0:
                self._ended.set()


def one_round(engine: NativeEngine, rows: int, adapters: int, args: argparse.Namespace) -> dict[str, float]:
    """Tokens per second, and the milliseconds of a step while every row decodes."""
    run = Run(engine, rows)
    vocab = SHAPES[args.shape]["vocab_size"]
    started = time.perf_counter()
    for row in range(rows):  # prompts differ, so that no prefix is shared
        prompt = [3 + (row * 7919 + n * 31) % (vocab - 3) for n in range(args.prompt)]
        run.submit(f"r{row}", prompt, args.new, f"v{row % adapters}" if adapters else None)
    run.wait()
    seconds = time.perf_counter() - started
    all_decode = max(times[0] for times in run.times.values())
    last = [moment for moment in run.times[f"r{rows - 1}"] if moment >= all_decode]
    gaps = [(after - before) * 1e3 for before, after in zip(last, last[1:], strict=False)]
    return {
        "tokens_per_s": rows * args.new / seconds,
        "seconds": seconds,
        "first_token_s": all_decode - started,
        "step_ms": statistics.median(gaps) if gaps else float("nan"),
        "step_ms_max": max(gaps, default=float("nan")),
    }


def summary(rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Medians over the rounds, and every round's throughput."""
    medians = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    return {"n": len(rounds), **medians, "tokens_per_s_all": [one["tokens_per_s"] for one in rounds]}


def host_to_slot_ms(engine: NativeEngine, adapters: int, synchronise: Callable[[], None]) -> list[float]:
    """Milliseconds from host memory to a slot, for each adapter once; the engine's thread does not run yet."""
    taken, graph_decode = [], engine.runner.graph_decode
    for number in range(adapters):
        engine.pool.acquire(f"v{number}")
        copy = partial(engine.pool.copy_to_device, f"v{number}", engine.runner.device)
        synchronise()
        started = time.perf_counter()
        weights = copy() if graph_decode is None else graph_decode.copy_adapter(copy)
        synchronise()
        taken.append((time.perf_counter() - started) * 1e3)
        engine.runner.forget(weights.version)
        engine.pool.release(f"v{number}")
    return taken


@contextmanager
def kernels(device: str, into: dict[str, float], steps: int) -> Iterator[None]:
    """Notes the device's microseconds a step of the 20 dearest kernels."""
    if not device.startswith("cuda"):
        yield
        return
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        yield
        torch.cuda.synchronize()
    found = sorted(profiler.key_averages(), key=lambda one: -one.self_device_time_total)[:20]
    into.update({one.key[:100]: round(one.self_device_time_total / steps, 1) for one in found})


def measure(weights: str, args: argparse.Namespace) -> dict[str, Any]:
    """Everything on one form of the base's weights."""
    cuda = args.device.startswith("cuda")
    synchronise = torch.cuda.synchronize if cuda else lambda: None
    model = build(args.shape, weights, args.device)
    most = max(args.adapters, args.distinct)
    length = args.prompt + args.new + 1
    spec = EngineSpec(
        max_batch=args.batch,
        max_seq_len=max(length, 64),
        kv_tokens=args.batch * 2 * max(length, 64),
        max_loaded=max(most, args.batch),
        max_rank=RANK,
        prefill_tokens=args.prefill,
        prefix_cache=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        adapter = write_adapter(model, Path(folder))
        started = time.perf_counter()
        engine = NativeEngine(model, spec, args.device)
        built = time.perf_counter()
        for number in range(most):
            engine.load_adapter(f"v{number}", adapter)
    result: dict[str, Any] = {"host_to_slot_ms": host_to_slot_ms(engine, most, synchronise)}
    before = time.perf_counter()
    engine.start()
    result["engine_start_s"] = built - started + time.perf_counter() - before
    try:
        one_round(engine, 1, 0, args)  # the first prompt picks algorithms
        result["first_answer_s"] = built - started + time.perf_counter() - before
        mixes = {
            "base": (args.batch, 0),
            f"{args.adapters}_adapters": (args.batch, args.adapters),
            "batch_1": (1, 0),
            "distinct_base": (args.distinct, 0),
            "distinct": (args.distinct, args.distinct),
        }
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in mixes}
        for number in range(args.rounds):
            for name, (rows, adapters) in mixes.items():
                gc.collect()
                rounds[name].append(one_round(engine, rows, adapters, args))
                print(f"{weights} {name} round {number}: {rounds[name][-1]['tokens_per_s']:.0f} tokens/s", flush=True)
        result |= {name: summary(one) for name, one in rounds.items()}
        ratio = result["distinct"]["tokens_per_s"] / result["distinct_base"]["tokens_per_s"]
        result["distinct_over_base"] = ratio
        result["kernels"] = {}
        with kernels(args.device, result["kernels"], args.new):
            one_round(engine, args.batch, args.adapters, args)
    finally:
        engine.stop()
    result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--weights", nargs="+", choices=["bf16", "nf4"], default=["bf16", "nf4"])
    parser.add_argument("--batch", type=int, default=64, help="requests decoded together")
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens")
    parser.add_argument("--new", type=int, default=256, help="generated tokens of each request")
    parser.add_argument("--adapters", type=int, default=8, help="adapters shared out over the batch")
    parser.add_argument("--distinct", type=int, default=32, help="rows of the mix in which each has its own adapter")
    parser.add_argument("--prefill", type=int, default=4096, help="prompt tokens of one step")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    result = {}
    for weights in args.weights:
        result[weights] = measure(weights, args)
        gc.collect()
        if args.device.startswith("cuda"):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    document = {"run_info": collect(seed=0), "result": result, "meta_info": {**settings, "adapter_rank": RANK}}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
