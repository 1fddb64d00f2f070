"""Inter-token times of streams, in quiet and during a flood of prompts that do not fit.

    python -m benchmarks.prompt_flood          about two minutes on two idle cores

SmolLM2-135M behind Ray Serve on a private Ray, one engine thread. Four callers stream without a pause. Windows take
turns: in `quiet` ones nothing else comes; in `flood` ones another process sends prompts of 4 MB one after the other
over two connections (refused by their bytes), in `tokenised` ones prompts of 80 kB, which are tokenised before they are
refused. All processes share the machine, the flooding one too.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks import base
from benchmarks.flooder import CONNECTIONS
from benchmarks.record import Clock, Figure, figure, ratios, write
from graftwork.cluster.session import session
from graftwork.metrics import quantile
from graftwork.serving.deploy import deploy
from graftwork.serving.spec import ServeSpec
from tests.ports import free_port

CALLERS, WINDOW_S = 4, 10.0
KINDS = {"quiet": 0, "flood": 3_900_000, "tokenised": 80_000}
"""Bytes of a prompt of the flood; 0: no flood."""


MODEL = "SmolLM2-135M-Instruct.Q4_1"


@dataclass
class Streams:
    """Callers that stream one answer after the other, and when each piece came."""

    url: str
    stamps: list[list[float]] = field(default_factory=list)

    async def caller(self, number: int, ended: asyncio.Event) -> None:
        """Until the end; each answer has a list of its own."""
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": f"Tell me of airport {number}."}],
            "max_tokens": 200,
            "ignore_eos": True,
            "stream": True,
        }
        async with httpx.AsyncClient(timeout=120) as client:
            while not ended.is_set():
                mine: list[float] = []
                self.stamps.append(mine)
                async with client.stream("POST", f"{self.url}/v1/chat/completions", json=body) as stream:
                    async for line in stream.aiter_lines():
                        if line.startswith("data: {"):
                            mine.append(time.perf_counter())

    def gaps_ms(self, begin: float, end: float) -> list[float]:
        """Times between two pieces of an answer, where both came in the window; the first piece has no text."""
        return [
            (after - before) * 1e3
            for mine in self.stamps
            for before, after in zip(mine[1:], mine[2:], strict=False)
            if begin <= before and after <= end
        ]


async def measure(url: str, port: int, rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """(p99 in ms of each window, seconds of each refused prompt), by kind."""
    streams, ended = Streams(url), asyncio.Event()
    callers = [asyncio.create_task(streams.caller(number, ended)) for number in range(CALLERS)]
    p99: dict[str, list[float]] = {kind: [] for kind in KINDS}
    refused: dict[str, list[float]] = {kind: [] for kind in KINDS}
    await asyncio.sleep(WINDOW_S / 2)
    for _ in range(rounds):
        for kind, size in KINDS.items():
            command = [sys.executable, "-m", "benchmarks.flooder", str(port), MODEL, str(size)]
            flooder = subprocess.Popen(command, stdin=-1, stdout=-1, text=True) if size else None
            await asyncio.sleep(1)
            begin = time.perf_counter()
            await asyncio.sleep(WINDOW_S)
            p99[kind].append(quantile(streams.gaps_ms(begin, time.perf_counter()), 0.99))
            if flooder is not None:
                told, _ = await asyncio.to_thread(flooder.communicate, "")
                refused[kind] += json.loads(told)
    ended.set()
    await asyncio.gather(*callers)
    return p99, refused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    clock = Clock()
    with session("local") as _:
        port = free_port()
        spec = ServeSpec.model_validate({"base": base.URI, "port": port, "arms": [], "adapters": []})
        with deploy(spec) as endpoint:
            assert endpoint.url is not None
            assert endpoint.base == MODEL
            p99, refused = asyncio.run(measure(endpoint.url, port, args.rounds))
    figures: dict[str, Figure] = {
        "p99_to_quiet": figure(ratios(p99["flood"], p99["quiet"]), "ratio"),
        "tokenised_p99_to_quiet": figure(ratios(p99["tokenised"], p99["quiet"]), "ratio"),
        **{f"{kind}_p99": figure(p99[kind], "ms") for kind in KINDS},
        **{f"{kind}_refused": figure(refused[kind], "s") for kind in KINDS if refused[kind]},
    }
    meta = {
        "callers": CALLERS,
        "connections": CONNECTIONS,
        "window_s": WINDOW_S,
        "bytes": KINDS,
        "spec": spec.model_dump(mode="json"),
    }
    write("prompt_flood", args.out, figures, {"p99_ms": p99}, meta, clock)


if __name__ == "__main__":
    main()
