"""Milliseconds per decode step: the engine beside transformers' static-cache generate and PEFT's adapter_names.

    python -m benchmarks.engine_decode

Every arm decodes the same number of rows from prompts of one length on the same weights, in turns (`--rounds`).
The engine, the engine without hooks and each peer have a process of their own. A step is the time between two tokens of
a request while all rows decode; the first steps are left out. Arms: `engine_N` with N distinct adapters over the rows
(0: loaded and none used), `saved16_N` the same with adapters that were saved in bf16, `plain` an engine without hooks
and adapters, `static` and `peft_N` the peers. Neighbouring rows have adapters that are no neighbours.
"""

import argparse
import contextlib
import gc
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import base
from benchmarks.record import Clock, Figure, figure, ratios, write
from graftwork.serving.engine.engine import NativeEngine
from graftwork.serving.engine.request import GenerateRequest, SamplingParams, TokenEvent
from graftwork.serving.spec import EngineSpec

SKIPPED_STEPS = 3
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
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
    """The engine with `adapters` distinct adapters over the rows; 0 is the base alone. kind: begins their names."""

    def __init__(self, engine: NativeEngine, adapters: int, kind: str = "v") -> None:
        self._engine, self._adapters, self._kind = engine, adapters, kind

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
            version = f"{self._kind}{row * 5 % self._adapters}" if self._adapters else None
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
            extra["adapter_names"] = [f"v{row * 5 % self._adapters}" for row in range(rows)]
        with torch.inference_mode():
            self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new + 1,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                stopping_criteria=[clock],
                cache_implementation="static",
                **extra,
            )
        return stamps


def summary(steps: Sequence[tuple[float, float]], rows: int) -> dict[str, float | int]:
    """Median and quartiles in ms, and tokens per second of the median."""
    wall, cpu = [step[0] for step in steps], [step[1] for step in steps]
    low, middle, high = statistics.quantiles(wall, n=4)
    return {
        "n": len(steps),
        "wall_ms": middle,
        "wall_ms_q1": low,
        "wall_ms_q3": high,
        "wall_ms_min": min(wall),
        "cpu_ms": statistics.median(cpu),
        "cpu_ms_min": min(cpu),
        "tokens_per_s": rows / middle * 1e3,
    }


def measure(arms: dict[str, "ArmProcess"], rows: int, args: argparse.Namespace) -> dict[str, Any]:
    """All arms at one number of rows, in turns; `turns_ms`: the median step of each turn."""
    steps: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    turns: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(args.rounds):
        for name, arm in arms.items():
            turn = arm(name, rows).steps_ms()
            steps[name] += turn
            turns[name].append(statistics.median(wall for wall, _ in turn))
    result = {name: {**summary(measured, rows), "turns_ms": turns[name]} for name, measured in steps.items()}
    for name, one in result.items():
        print(f"{rows:3d} rows  {name:12s} wall {one['wall_ms']:7.1f} ms  cpu {one['cpu_ms']:7.1f} ms  n={one['n']}")
    return result


def figures_at(found: dict[str, Any], distinct: int) -> dict[str, Figure]:
    """Ratios of throughputs (of step times for `step_to_static`), turn by turn."""

    def against(slow: str, fast: str) -> Figure:
        return figure(ratios(found[slow]["turns_ms"], found[fast]["turns_ms"]), "x")

    many, saved16 = f"engine_{distinct}", f"saved16_{distinct}"
    figures = {
        f"distinct_{distinct}": against("engine_0", many),
        f"saved16_{distinct}": against("engine_0", saved16),
        "none_used": against("plain", "engine_0"),
        "step_to_static": against("engine_0", "static"),
    }
    peft = f"peft_{distinct}"
    if peft not in found:
        return figures
    return figures | {"against_peft": against(peft, many), "saved16_against_peft": against(peft, saved16)}


def peft_model(model_folder: Path, adapters: Sequence[Path], dtype: torch.dtype) -> Any:
    """The base with the adapters, named v0, v1, ..., all in one dtype."""
    from peft import PeftModel

    same: dict[str, Any] = {"autocast_adapter_dtype": False}  # else those of a bf16 base would be widened: slower
    model = PeftModel.from_pretrained(base.load(model_folder, dtype), adapters[0], adapter_name="v0", **same)
    for number, folder in enumerate(adapters[1:], 1):
        model.load_adapter(folder, adapter_name=f"v{number}", low_cpu_mem_usage=True, **same)
    return model.eval()


def engine_arms(
    folder: Path, adapters: Sequence[Path], args: argparse.Namespace
) -> tuple[dict[str, Arm], NativeEngine]:
    """The engine with every adapter loaded."""
    engine = NativeEngine(base.load(folder, _DTYPES[args.dtype]), _spec(args), "cpu")
    for number, adapter in enumerate(adapters):
        engine.load_adapter(f"v{number}", adapter)
        engine.load_adapter(f"n{number}", adapter.parent.parent / "saved16" / adapter.name)
    arms: dict[str, Arm] = {f"engine_{count}": EngineArm(engine, count) for count in (0, *args.adapters)}
    return arms | {f"saved16_{count}": EngineArm(engine, count, "n") for count in args.adapters}, engine


def plain_arms(folder: Path, adapters: Sequence[Path], args: argparse.Namespace) -> tuple[dict[str, Arm], NativeEngine]:
    """The engine without hooks."""
    engine = NativeEngine(base.load(folder, _DTYPES[args.dtype]), _spec(args), "cpu")
    engine.runner.sites.unhook()
    return {"plain": EngineArm(engine, 0)}, engine


def static_arms(folder: Path, adapters: Sequence[Path], args: argparse.Namespace) -> tuple[dict[str, Arm], None]:
    """transformers with a static cache."""
    return {"static": GenerateArm(base.load(folder, _DTYPES[args.dtype]), None)}, None


def peft_arms(folder: Path, adapters: Sequence[Path], args: argparse.Namespace) -> tuple[dict[str, Arm], None]:
    """PEFT with one adapter name a row."""
    model = peft_model(folder, adapters, _DTYPES[args.dtype])
    return {f"peft_{count}": GenerateArm(model, count) for count in args.adapters}, None


def _spec(args: argparse.Namespace) -> EngineSpec:
    most = max(args.adapters)
    return EngineSpec(max_batch=max(args.rows), max_seq_len=512, max_loaded=2 * most, num_threads=args.threads)


Make = Callable[[Path, Sequence[Path], argparse.Namespace], tuple[dict[str, Arm], NativeEngine | None]]


class ArmProcess:
    """Arms in a process of their own: two teams of threads in one process would wait asleep (docs/log.md)."""

    def __init__(self, make: Make, folder: Path, adapters: Sequence[Path], args: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_answer, args=(there, make, folder, adapters, args))
        self._process.start()
        there.close()
        self.names: list[str] = self._here.recv()

    def __call__(self, name: str, rows: int) -> Stamps:
        self._here.send((name, rows))
        stamps: Stamps = self._here.recv()
        return stamps

    def close(self) -> None:
        self._here.send(None)
        self._process.join()


def _answer(there: Connection, make: Make, folder: Path, adapters: Sequence[Path], args: argparse.Namespace) -> None:
    """The life of such a process. An engine's thread alone has helpers, as in `open_engine`."""
    torch.set_num_threads(1)
    arms, engine = make(folder, adapters, args)
    if engine is not None:
        engine.start()
    else:
        torch.set_num_threads(args.threads)
    there.send(list(arms))
    while (asked := there.recv()) is not None:
        name, rows = asked
        gc.collect()
        there.send(arms[name](rows, args.prompt, args.steps))
    if engine is not None:
        engine.stop()


@contextlib.contextmanager
def arms_of(args: argparse.Namespace) -> Iterator[dict[str, ArmProcess]]:
    """Every arm by name, in the order of its turns."""
    folder = base.resolve().folder
    makes: list[Make] = [engine_arms, plain_arms, static_arms, *([] if args.no_peft else [peft_arms])]
    with tempfile.TemporaryDirectory() as scratch:
        shapes, most = base.linears(base.load(folder)), max(args.adapters)
        adapters = base.write_adapters(shapes, Path(scratch) / "engine", most, _DTYPES[args.dtype])
        base.write_adapters(shapes, Path(scratch) / "saved16", most, torch.bfloat16)
        processes: list[ArmProcess] = []
        try:
            for make in makes:
                processes.append(ArmProcess(make, folder, adapters, args))
            yield {name: process for process in processes for name in process.names}
        finally:
            for process in processes:
                process.close()


def main(dtype: str = "float32", at: Sequence[int] = (1, 8, 32)) -> None:
    """dtype, at (rows): what is measured unless the command line says otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dtype", choices=list(_DTYPES), default=dtype, help="of the base and the adapters")
    parser.add_argument("--rows", type=int, nargs="+", default=list(at))
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 32], help="distinct adapters in the batch")
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    parser.add_argument("--steps", type=int, default=12, help="decode steps of one turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-peft", action="store_true", help="leave PEFT's arms out (32 distinct adapters are slow)")
    args = parser.parse_args()
    clock, found = Clock(), {}
    with arms_of(args) as arms:
        for rows in args.rows:
            kept = {name: arm for name, arm in arms.items() if int(name.partition("_")[2] or 0) <= rows}
            found[str(rows)] = measure(kept, rows, args)
    most = max(args.adapters)
    figures = figures_at(found[str(most)], most) if str(most) in found else {}
    meta = {
        "unit": "ms per decode step",
        "prompt": args.prompt,
        "steps": args.steps,
        "rounds": args.rounds,
        "threads": args.threads,
        "rank": base.RANK,
        "dtype": args.dtype,
    }
    name = "engine_decode" if args.dtype == "float32" else "engine_decode_bf16"
    write(name, args.out, figures, found, meta, clock)


if __name__ == "__main__":
    main()
