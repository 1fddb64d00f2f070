"""Milliseconds per decode step: the engine beside transformers' static-cache generate and PEFT's adapter_names.

    python benchmarks/engine_decode.py --model FOLDER --out benchmarks/results/engine_decode.json

Every arm decodes the same number of rows from prompts of the same length on the same fp32 weights, in one process, in
turns (`--rounds`). A step is the time between two tokens of a request while all rows decode; the first steps are left
out. Wall and process-CPU milliseconds are medians over all measured steps, with the quartiles beside them. All adapters
have equal shapes (rank 16 on every inner linear). Where `--out` holds other row counts measured with equal settings at
the same commit, the new ones join them.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from graftwork.provenance import collect
from graftwork.serving.engine.engine import Engine
from graftwork.serving.engine.types import GenerateRequest, SamplingParams, TokenEvent
from graftwork.serving.spec import EngineSpec

SKIPPED_STEPS = 3
RANK = 16
WAIT_S = 300.0


@dataclass
class Stamps:
    """Clock readings at the end of each step of one generation."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def take(self) -> None:
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def steps_ms(self) -> list[tuple[float, float]]:
        """(wall, CPU) of each step after the skipped ones."""
        pairs = zip(self._gaps(self.wall), self._gaps(self.cpu), strict=True)
        return list(pairs)[SKIPPED_STEPS:]

    @staticmethod
    def _gaps(times: Sequence[float]) -> list[float]:
        return [(after - before) * 1e3 for before, after in zip(times, times[1:], strict=False)]


Arm = Callable[[int, int, int], Stamps]
"""(rows, prompt tokens, new tokens) -> stamps of one generation."""


class EngineArm:
    """The engine with `adapters` distinct adapters over the rows; 0 is the base alone."""

    def __init__(self, engine: Engine, adapters: int) -> None:
        self._engine, self._adapters = engine, adapters

    def __call__(self, rows: int, prompt: int, new: int) -> Stamps:
        times: dict[str, Stamps] = {f"r{row}": Stamps() for row in range(rows)}
        ended: list[str] = []

        def note(event: TokenEvent) -> None:
            assert event.error is None, event.error
            times[event.request_id].take()
            if event.finish_reason is not None:
                ended.append(event.request_id)

        ids = tuple(range(1000, 1000 + prompt))
        for row in range(rows):  # rows that come in earlier answer longer, so that all end together
            version = f"v{row % self._adapters}" if self._adapters else None
            self._engine.submit(GenerateRequest(f"r{row}", ids, SamplingParams(new + 8), adapter=version), note)
        deadline = time.monotonic() + WAIT_S
        while len(ended) < rows and time.monotonic() < deadline:
            time.sleep(0.01)
        return _common(list(times.values()), new)


def _common(rows: Sequence[Stamps], new: int) -> Stamps:
    """The steps in which every row decoded: from the last row's first token on."""
    last = rows[-1]
    start = max(stamps.wall[0] for stamps in rows)
    end = min(stamps.wall[-1] for stamps in rows)
    picked = [n for n, wall in enumerate(last.wall) if start <= wall <= end + 0.05][: new + 1]
    return Stamps([last.wall[n] for n in picked], [last.cpu[n] for n in picked])


class GenerateArm:
    """`model.generate` of transformers, or of PEFT with one adapter name a row."""

    def __init__(self, model: Any, adapters: int | None) -> None:
        self._model, self._adapters = model, adapters

    def __call__(self, rows: int, prompt: int, new: int) -> Stamps:
        ids = torch.arange(1000, 1000 + prompt).repeat(rows, 1)
        stamps = Stamps()

        def clock(*_: Any, **__: Any) -> torch.Tensor:
            stamps.take()
            return torch.zeros(rows, dtype=torch.bool)

        extra: dict[str, Any] = {}
        if self._adapters is not None:
            extra["adapter_names"] = [f"v{row % self._adapters}" for row in range(rows)]
        with torch.inference_mode():
            self._model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new + 1, do_sample=False,
                eos_token_id=None, pad_token_id=0, stopping_criteria=[clock], cache_implementation="static", **extra,
            )  # fmt: skip
        return stamps


def write_adapter(model_folder: Path, folder: Path) -> Path:
    """A random adapter of rank 16 on every inner linear, saved by PEFT."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(load(model_folder), config).save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    """The base in fp32 on the CPU."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def summary(steps: Sequence[tuple[float, float]], rows: int) -> dict[str, float | int]:
    """Median and quartiles in ms, and tokens per second of the median."""
    wall, cpu = [step[0] for step in steps], [step[1] for step in steps]
    low, middle, high = statistics.quantiles(wall, n=4)
    return {
        "n": len(steps), "wall_ms": middle, "wall_ms_q1": low, "wall_ms_q3": high, "wall_ms_min": min(wall),
        "cpu_ms": statistics.median(cpu), "cpu_ms_min": min(cpu), "tokens_per_s": rows / middle * 1e3,
    }  # fmt: skip


def measure(arms: dict[str, Arm], rows: int, args: argparse.Namespace) -> dict[str, dict[str, float | int]]:
    """All arms at one number of rows, in turns."""
    steps: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for _ in range(args.rounds):
        for name, arm in arms.items():
            gc.collect()
            steps[name] += arm(rows, args.prompt, args.steps).steps_ms()
    result = {name: summary(measured, rows) for name, measured in steps.items()}
    for name, one in result.items():
        print(f"{rows:3d} rows  {name:22s} wall {one['wall_ms']:7.1f} ms  cpu {one['cpu_ms']:7.1f} ms  n={one['n']}")
    return result


def peft_model(model_folder: Path, adapter: Path, count: int) -> Any:
    """The base with `count` copies of the adapter, named v0, v1, ..."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load(model_folder), adapter, adapter_name="v0")
    for number in range(1, count):
        model.load_adapter(adapter, adapter_name=f"v{number}", low_cpu_mem_usage=True)
    return model.eval()


def write(out: Path, result: dict[str, Any], meta: dict[str, Any]) -> None:
    """Writes the document, or joins the one that is there."""
    info = collect(seed=0)
    if out.exists():
        before = json.loads(out.read_text(encoding="utf-8"))
        if before["meta_info"] == meta and before["run_info"]["git"] == info["git"]:
            result = before["result"] | result
    ordered = {rows: result[rows] for rows in sorted(result, key=int)}
    out.parent.mkdir(parents=True, exist_ok=True)
    document = {"run_info": info, "result": ordered, "meta_info": meta}
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the base, e.g. SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4, 32], help="distinct adapters in the batch")
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    parser.add_argument("--steps", type=int, default=12, help="decode steps of one turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-peft", action="store_true", help="leave PEFT's arms out (32 distinct adapters are slow)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    most = max([0, *args.adapters])
    with tempfile.TemporaryDirectory() as folder:
        adapter = write_adapter(args.model, Path(folder))
        spec = EngineSpec(max_batch=max(args.rows), max_seq_len=512, max_loaded=max(most, 1), num_threads=args.threads)
        engine = Engine(load(args.model), spec, "cpu")
        for number in range(most):
            engine.load_adapter(f"v{number}", adapter)
        peers: dict[str, Arm] = {"static": GenerateArm(load(args.model), None)}
        if not args.no_peft:
            with_adapters = peft_model(args.model, adapter, most)
            peers |= {f"peft_{count}": GenerateArm(with_adapters, count) for count in args.adapters}
    engine.start()
    ours: dict[str, Arm] = {f"engine_{count}": EngineArm(engine, count) for count in (0, *args.adapters)}
    result = {}
    for rows in args.rows:
        kept = {name: arm for name, arm in (ours | peers).items() if int(name.partition("_")[2] or 0) <= rows}
        result[str(rows)] = measure(kept, rows, args)
    engine.stop()
    meta = {"unit": "ms per decode step", "prompt": args.prompt, "steps": args.steps, "rounds": args.rounds,
            "threads": args.threads, "adapter_rank": RANK, "dtype": "float32"}  # fmt: skip
    write(args.out, result, meta)


if __name__ == "__main__":
    main()
