"""What 64 and 1,000 registered adapters cost under Zipf(1) traffic, and whether one of them waits longer than others.

    python -m benchmarks.zipf

Base-only, 64 and 1,000 adapters are asked in turns in one process: 32 requests at a time, prompt 64, answer 32 tokens.
A throughput is generated tokens by wall seconds of a turn, loads included; the first turn of each is left out. For
fairness 64 ask at a time of an engine that runs 32: the largest p95 of the time to first token over the adapters,
against the median over all requests.
"""

import argparse
import asyncio
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import base
from benchmarks.record import Clock, figure, ratios, write
from benchmarks.traffic import NEW, PROMPT, Asked, closed_loop, serving, zipf
from graftwork.metrics import quantile
from graftwork.serving.adapter_cache import AdapterCache
from graftwork.serving.engine.engine import NativeEngine
from graftwork.serving.spec import EngineSpec
from graftwork.storage.store import Store

ROWS = 32
HOST_BYTES = 6 << 30
CONTENTS = 16
"""Different weights among the 1,000 adapters; see `base.publish_many`."""


async def measure(
    engine: NativeEngine, residency: AdapterCache, tasks: Sequence[str], args: argparse.Namespace
) -> dict[str, list[float]]:
    """Tokens a second of each turn, by arm."""
    speeds: dict[str, list[float]] = defaultdict(list)
    for turn in range(args.rounds + 1):
        for name, count in (("base", 0), ("registered_64", 64), ("registered_1000", len(tasks))):
            refs = zipf(tasks[:count], args.requests, turn) if count else [None] * args.requests
            began = time.perf_counter()
            await closed_loop(engine, residency, refs, ROWS)
            seconds = time.perf_counter() - began
            if turn:
                speeds[name].append(args.requests * NEW / seconds)
            print(f"turn {turn} {name:16s} {args.requests * NEW / seconds:7.1f} tokens/s", flush=True)
    return speeds


def unfairness(answered: Sequence[Asked]) -> tuple[float, dict[str, float]]:
    """The largest p95 of an adapter over the median of all, and what it is made of."""
    by_ref: dict[str | None, list[float]] = defaultdict(list)
    for one in answered:
        by_ref[one.ref].append(one.ttft_s)
    p95 = {ref: quantile(times, 0.95) for ref, times in by_ref.items()}
    median, worst = quantile([one.ttft_s for one in answered], 0.5), max(p95.values())
    return worst / median, {"median_s": median, "worst_p95_s": worst, "adapters_asked": len(p95)}


async def run(store: Store, digest: str, tasks: Sequence[str], model_folder: Path, args: argparse.Namespace) -> None:
    clock = Clock()
    spec = EngineSpec(
        max_batch=ROWS, max_seq_len=256, kv_tokens=16_384, host_cache_bytes=HOST_BYTES, num_threads=args.threads
    )
    engine = NativeEngine(base.load(model_folder), spec, "cpu")
    async with serving(engine, store, digest) as residency:
        speeds = await measure(engine, residency, tasks, args)
        waits = [
            unfairness(await closed_loop(engine, residency, zipf(tasks, args.requests * 2, 100 + turn), 2 * ROWS))
            for turn in range(args.rounds)
        ]
    figures = {name: figure(ratios(speeds[name], speeds["base"]), "x") for name in ("registered_64", "registered_1000")}
    figures["worst_to_median"] = figure([worst for worst, _ in waits], "x")
    detail = {"tokens_per_s": dict(speeds), "ttft": [parts for _, parts in waits]}
    meta = {
        "prompt": PROMPT,
        "new_tokens": NEW,
        "requests": args.requests,
        "rounds": args.rounds,
        "rows": ROWS,
        "threads": args.threads,
        "adapters": len(tasks),
        "different_weights": CONTENTS,
        "rank": base.RANK,
        "max_loaded": spec.max_loaded,
        "host_cache_bytes": HOST_BYTES,
        "dtype": "float32",
    }
    write("zipf", args.out, figures, detail, meta, clock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=96, help="of a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(1)  # as `open_engine`: the engine's thread alone has helpers
    resolved = base.resolve()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shapes = base.linears(base.load(resolved.folder))
        contents = base.write_adapters(shapes, root / "weights", min(CONTENTS, args.adapters), torch.bfloat16)
        store = Store(str(root / "store"))
        tasks = base.publish_many(store, resolved.digest, contents, args.adapters, root / "scratch")
        asyncio.run(run(store, resolved.digest, tasks, resolved.folder, args))


if __name__ == "__main__":
    main()
