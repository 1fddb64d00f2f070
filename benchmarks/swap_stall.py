"""Whether swaps are felt by others: inter-token times of running requests, in quiet and during 10 swaps a second.

    python -m benchmarks.swap_stall

16 requests decode, half of them the base and half of four adapters, and ten times a second a request of one token comes
for one more task: that traffic is the same all the time. Windows take turns. In `quiet` ones the task's alias stays. In
`swapping` ones it is moved before each of its requests to the next version, as an endpoint does it: the version is read
from its file, the reference flipped, the version put into a slot for the request, the one before let go. Everything is
published beforehand. All of it twice: with adapters saved in fp32, and in bf16 (figures `saved16_...`).
"""

import argparse
import asyncio
import tempfile
import time
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch

from benchmarks import base
from benchmarks.record import Clock, Figure, figure, ratios, write
from benchmarks.traffic import ask, serving
from graftwork.artifacts import publish as artifact
from graftwork.base.load import ResolvedBase
from graftwork.metrics import quantile
from graftwork.serving.adapter_cache import AdapterCache
from graftwork.serving.engine.engine import NativeEngine
from graftwork.serving.engine.request import GenerateRequest, SamplingParams, TokenEvent
from graftwork.serving.spec import EngineSpec
from graftwork.storage.store import Store

ROWS, OTHERS, VERSIONS = 16, 4, 10
EVERY_S, WINDOW_S = 0.1, 2.0
TASK = "swapped"
KINDS = ("quiet", "swapping")
SAVED = {"": torch.float32, "saved16_": torch.bfloat16}


@dataclass(frozen=True)
class Window:
    """A stretch of one kind of traffic; clock readings, and how often it was asked or swapped."""

    kind: str
    begin: float
    end: float
    ticks: int


class Watched:
    """The 16 requests of one round; `decoding`: all of them have a token, `ended`: one of them has its last."""

    def __init__(self, engine: NativeEngine, tokens: int, turn: int) -> None:
        self._stamps: dict[str, list[float]] = {f"w{turn}-{row}": [] for row in range(ROWS)}
        self.decoding, self.ended, self.all_ended = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._left = ROWS
        loop = asyncio.get_running_loop()

        def note(event: TokenEvent) -> None:
            assert event.error is None, event.error
            self._stamps[event.request_id].append(time.perf_counter())
            if event.finish_reason is not None:
                loop.call_soon_threadsafe(self._end)
            elif len(self._stamps[event.request_id]) == 1 and all(self._stamps.values()):
                loop.call_soon_threadsafe(self.decoding.set)

        for row, name in enumerate(self._stamps):
            version = f"other{row % OTHERS}" if row % 2 else None
            prompt = tuple(range(100 + row, 164 + row))
            engine.submit(GenerateRequest(name, prompt, SamplingParams(tokens), adapter=version), note)

    def _end(self) -> None:
        self.ended.set()
        self._left -= 1
        if not self._left:
            self.all_ended.set()

    def gaps_ms(self, window: Window) -> list[float]:
        """Times between two tokens of a request, where both came in the window."""
        return [
            (after - before) * 1e3
            for stamps in self._stamps.values()
            for before, after in zip(stamps, stamps[1:], strict=False)
            if window.begin <= before and after <= window.end
        ]


class Updates:
    """The task that is asked all the time, and updated in the windows of one kind."""

    def __init__(self, engine: NativeEngine, residency: AdapterCache, store: Store, versions: list[str]) -> None:
        self._engine, self._adapter_cache, self._store = engine, residency, store
        self._next = cycle(versions)
        self.swap_ms: list[float] = []

    async def window(self, kind: str) -> Window:
        """Asks ten times a second for the length of a window; a swap that takes longer delays the next."""
        begin, ticks, asked = time.perf_counter(), 0, []
        while (left := begin + WINDOW_S - time.perf_counter()) > 0:
            if kind == "swapping":
                await self._swap()
            asked.append(asyncio.create_task(ask(self._engine, self._adapter_cache, f"{TASK}@latest", new=1, prompt=1)))
            ticks += 1
            await asyncio.sleep(min(left, max(0.0, begin + ticks * EVERY_S - time.perf_counter())))
        end = time.perf_counter()
        await asyncio.gather(*asked)
        return Window(kind, begin, end, ticks)

    async def _swap(self) -> None:
        began = time.perf_counter()
        await asyncio.to_thread(artifact.promote, self._store, TASK, "latest", next(self._next))
        await self._adapter_cache.refresh(f"{TASK}@latest")
        self.swap_ms.append((time.perf_counter() - began) * 1e3)


async def round_of(engine: NativeEngine, updates: Updates, tokens: int, turn: int) -> tuple[Watched, list[Window]]:
    """One life of the watched requests, in windows that take turns until the first of them ends."""
    watched = Watched(engine, tokens, turn)
    await watched.decoding.wait()
    windows: list[Window] = []
    while not watched.ended.is_set():
        windows.append(await updates.window(KINDS[(turn + len(windows)) % 2]))
    await watched.all_ended.wait()
    return watched, windows[:-1]  # the last one outlives the requests


async def run(
    engine: NativeEngine, store: Store, digest: str, versions: list[str], args: argparse.Namespace
) -> dict[str, list[float]]:
    """p99 and median of each round by kind of window, swaps a second, and what each swap took. Ends the engine."""
    found: dict[str, list[float]] = {f"{kind}_{name}": [] for kind in KINDS for name in ("p99_ms", "p50_ms", "per_s")}
    async with serving(engine, store, digest) as residency:
        updates = Updates(engine, residency, store, versions)
        for turn in range(args.rounds + 1):  # the first one warms up
            watched, windows = await round_of(engine, updates, args.tokens, turn)
            for kind in KINDS if turn else ():
                mine = [window for window in windows if window.kind == kind]
                gaps = [gap for window in mine for gap in watched.gaps_ms(window)]
                found[f"{kind}_p99_ms"].append(quantile(gaps, 0.99))
                found[f"{kind}_p50_ms"].append(quantile(gaps, 0.5))
                found[f"{kind}_per_s"].append(sum(w.ticks for w in mine) / sum(w.end - w.begin for w in mine))
            print(f"round {turn}: " + "  ".join(f"{key} {values[-1]:.1f}" for key, values in found.items() if values))
    return found | {"swap_ms": updates.swap_ms}


def measured(resolved: ResolvedBase, dtype: torch.dtype, args: argparse.Namespace) -> dict[str, list[float]]:
    """The rounds with adapters saved in one dtype."""
    model = base.load(resolved.folder)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        folders = base.write_adapters(base.linears(model), root / "weights", OTHERS + VERSIONS, dtype)
        store = Store(str(root / "store"))
        versions = [base.publish(store, resolved.digest, one, TASK) for one in folders[OTHERS:]]
        engine = NativeEngine(model, EngineSpec(max_batch=32, max_seq_len=256, num_threads=args.threads), "cpu")
        for number in range(OTHERS):
            engine.load_adapter(f"other{number}", folders[number])
        return asyncio.run(run(engine, store, resolved.digest, versions, args))


def figures_of(found: dict[str, list[float]]) -> dict[str, Figure]:
    """What the goals name, of one dtype."""
    return {
        "p99_to_quiet": figure(ratios(found["swapping_p99_ms"], found["quiet_p99_ms"]), "x"),
        "p50_to_quiet": figure(ratios(found["swapping_p50_ms"], found["quiet_p50_ms"]), "x"),
        "quiet_p99": figure(found["quiet_p99_ms"], "ms"),
        "swaps_per_s": figure(found["swapping_per_s"], "1/s"),
        "swap": figure(found["swap_ms"], "ms"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(1)  # as `open_engine`: the engine's thread alone has helpers
    clock, resolved = Clock(), base.resolve()
    found = {name: measured(resolved, dtype, args) for name, dtype in SAVED.items()}
    figures = {f"{name}{key}": one for name, part in found.items() for key, one in figures_of(part).items()}
    meta = {
        "rows": ROWS,
        "tokens": args.tokens,
        "rounds": args.rounds,
        "window_s": WINDOW_S,
        "rank": base.RANK,
        "dtype": "float32",
        "threads": args.threads,
    }
    write("swap_stall", args.out, figures, found, meta, clock)


if __name__ == "__main__":
    main()
