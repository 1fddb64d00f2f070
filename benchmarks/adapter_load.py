"""How long an adapter's way takes: from host memory to its slot, and from its published file to a first token.

    python -m benchmarks.adapter_load

`host_to_slot` is what the engine's thread does when a request of an adapter without a slot starts. `file_to_token`:
each adapter is asked twice, first while only its file is there, then again with another prompt; the difference of the
two times to first token, the engine being idle.
"""

import argparse
import asyncio
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import base
from benchmarks.record import Clock, figure, write
from benchmarks.traffic import ask, serving
from graftwork.serving.engine.engine import NativeEngine
from graftwork.serving.spec import EngineSpec
from graftwork.storage.store import Store


def to_slots(engine: NativeEngine, folders: list[Path], rounds: int) -> list[float]:
    """Milliseconds of each taking of a place, with the engine's thread not yet started. Leaves no adapter behind."""
    times = []
    for number, folder in enumerate(folders):
        engine.load_adapter(f"v{number}", folder)
    for turn in range(rounds + 1):
        for number in range(len(folders)):
            began = time.perf_counter()
            engine.runner.planner.admit(engine.pool.copy_to_device(f"v{number}", engine.runner.device))
            if turn:  # the first turn makes the tables
                times.append((time.perf_counter() - began) * 1e3)
        for number in range(len(folders)):
            engine.runner.planner.forget(f"v{number}")
    for number in range(len(folders)):
        engine.retire_adapter(f"v{number}")
    return times


async def to_tokens(engine: NativeEngine, store: Store, digest: str, tasks: list[str]) -> list[tuple[float, float]]:
    """Time to first token (ms) of each adapter: from its file, and again."""
    pairs = []
    async with serving(engine, store, digest) as residency:
        await ask(engine, residency, None, new=4)
        for task in tasks:
            first, second = [(await ask(engine, residency, f"{task}@latest", new=2)).ttft_s * 1e3 for _ in range(2)]
            pairs.append((first, second))
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--adapters", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock, resolved = Clock(), base.resolve()
    model = base.load(resolved.folder)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        folders = base.write_adapters(base.linears(model), root / "weights", args.adapters)
        store = Store(str(root / "store"))
        tasks = base.publish_many(store, resolved.digest, folders, args.adapters, root / "scratch")
        spec = EngineSpec(max_seq_len=256, max_loaded=args.adapters, num_threads=args.threads)
        engine = NativeEngine(model, spec, "cpu")
        slot_ms = to_slots(engine, folders, args.rounds)
        pairs = asyncio.run(to_tokens(engine, store, resolved.digest, tasks))
    figures = {
        "host_to_slot": figure(slot_ms, "ms"),
        "file_to_token": figure([first - second for first, second in pairs], "ms"),
    }
    detail = {"ttft_from_file_ms": [first for first, _ in pairs], "ttft_again_ms": [second for _, second in pairs]}
    meta = {"adapters": args.adapters, "rank": base.RANK, "dtype": "float32", "threads": args.threads}
    write("adapter_load", args.out, figures, detail, meta, clock)


if __name__ == "__main__":
    main()
