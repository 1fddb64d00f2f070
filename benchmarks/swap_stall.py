"""Whether swaps are felt by others: inter-token times of running requests, quiet and during 10 swaps a second.

    python -m benchmarks.swap_stall

16 requests decode, half of them the base and half of four adapters. In one turn of three they are alone (`quiet`). In
one an alias is moved ten times a second to the next of its versions and taken up as an endpoint does it: read from its
file, into a slot, one request on it, the version before let go (`swapping`). In one the same requests come for a
version that stays (`asked`): what the prompts of new requests cost others in any case.
"""

import argparse
import asyncio
import contextlib
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import base
from benchmarks.record import Clock, figure, ratios, write
from benchmarks.traffic import ask, serving
from graftwork import artifact
from graftwork.metrics import quantile
from graftwork.serving.engine.engine import Engine
from graftwork.serving.engine.types import GenerateRequest, SamplingParams, TokenEvent
from graftwork.serving.residency import Residency
from graftwork.serving.spec import EngineSpec
from graftwork.storage import Store

ROWS, OTHERS, VERSIONS = 16, 4, 10
EVERY_S = 0.1
TURNS = ("quiet", "asked", "swapping")
TASK = "swapped"


class Watched:
    """The 16 requests of one turn: gaps between their tokens in ms, from the time all of them decode."""

    def __init__(self, engine: Engine, tokens: int, turn: int) -> None:
        self._stamps: dict[str, list[float]] = {f"w{turn}-{row}": [] for row in range(ROWS)}
        self._left, self.done = ROWS, asyncio.Event()
        loop = asyncio.get_running_loop()

        def note(event: TokenEvent) -> None:
            assert event.error is None, event.error
            self._stamps[event.request_id].append(time.perf_counter())
            if event.finish_reason is not None:
                loop.call_soon_threadsafe(self._one_less)

        for row, name in enumerate(self._stamps):
            version = f"other{row % OTHERS}" if row % 2 else None
            prompt = tuple(range(100 + row, 164 + row))
            engine.submit(GenerateRequest(name, prompt, SamplingParams(tokens), adapter=version), note)

    def _one_less(self) -> None:
        self._left -= 1
        if not self._left:
            self.done.set()

    def gaps_ms(self) -> list[float]:
        start = max(stamps[0] for stamps in self._stamps.values())
        end = min(stamps[-1] for stamps in self._stamps.values())
        return [
            (after - before) * 1e3
            for stamps in self._stamps.values()
            for before, after in zip(stamps, stamps[1:], strict=False)
            if start <= before and after <= end
        ]


async def ask_on(
    engine: Engine, residency: Residency, store: Store, versions: list[str], count: list[int], *, swap: bool
) -> None:
    """Asks until cancelled, each time of the next version or always of one; what takes longer than its tenth of a
    second delays the next."""
    ref = f"{TASK}@latest"
    while True:
        began = time.perf_counter()
        count[0] += 1
        if swap:
            await asyncio.to_thread(artifact.promote, store, TASK, "latest", versions[count[0] % len(versions)])
            await residency.refresh(ref)
        await ask(engine, residency, ref, new=1)
        await asyncio.sleep(max(0.0, EVERY_S - (time.perf_counter() - began)))


async def run(
    engine: Engine, store: Store, digest: str, versions: list[str], args: argparse.Namespace
) -> dict[str, list[float]]:
    """p99 of each turn by its kind, and requests a second beside the watched ones."""
    found: dict[str, list[float]] = {kind: [] for kind in (*TURNS, "asked_per_s", "swapping_per_s")}
    async with serving(engine, store, digest) as residency:
        await ask(engine, residency, f"{TASK}@latest", new=1)
        for turn, kind in enumerate(["quiet", *TURNS * args.rounds]):  # the first one warms up
            began, count = time.perf_counter(), [0]
            watched = Watched(engine, args.tokens, turn)
            asking = ask_on(engine, residency, store, versions, count, swap=kind == "swapping")
            task = asyncio.create_task(asking) if kind != "quiet" else asking.close()
            await watched.done.wait()
            seconds = time.perf_counter() - began
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
                found[f"{kind}_per_s"].append(count[0] / seconds)
            if turn:
                found[kind].append(quantile(watched.gaps_ms(), 0.99))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(1)  # as `open_engine`: the engine's thread alone has helpers
    clock, resolved = Clock(), base.resolve()
    model = base.load(resolved.folder)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        folders = base.write_adapters(base.linears(model), root / "weights", OTHERS + VERSIONS)
        store = Store(str(root / "store"))
        versions = [base.publish(store, resolved.digest, one, TASK) for one in folders[OTHERS:]]
        engine = Engine(model, EngineSpec(max_batch=32, max_seq_len=256, num_threads=args.threads), "cpu")
        for number in range(OTHERS):
            engine.load_adapter(f"other{number}", folders[number])
        found = asyncio.run(run(engine, store, resolved.digest, versions, args))
    figures = {
        "p99_to_quiet": figure(ratios(found["swapping"], found["quiet"]), "x"),
        "p99_to_asked": figure(ratios(found["swapping"], found["asked"]), "x"),
        "quiet_p99": figure(found["quiet"], "ms"),
        "swaps_per_s": figure(found["swapping_per_s"], "1/s"),
    }
    meta = {"rows": ROWS, "tokens": args.tokens, "rounds": args.rounds, "rank": base.RANK, "dtype": "float32",
            "threads": args.threads}  # fmt: skip
    write("swap_stall", args.out, figures, found, meta, clock)


if __name__ == "__main__":
    main()
