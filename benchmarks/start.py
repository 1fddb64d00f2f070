"""How long a replica takes from the start of its process to its first answer, and on what.

    python -m benchmarks.start

Each round is a fresh process that makes an EngineReplica as Ray Serve does (nf4, the base converted in the cache) and
answers one question. Phases: the interpreter and our own modules, torch, bitsandbytes, transformers, making the replica
(digest, template, the model's code, the kept weights, unpacking, the engine's probe), the first answer.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import Clock, figure, write
from graftwork.quantization import import_bitsandbytes

PHASES = ("modules", "torch", "bitsandbytes", "transformers", "replica", "first_answer")


def child(threads: int) -> dict[str, float]:
    """Seconds of each phase of this process, the interpreter's start included."""
    import psutil

    marks = [psutil.Process().create_time()]
    from graftwork.prompts.render import Message
    from graftwork.serving.messages import ArmRequest
    from graftwork.serving.replica import EngineReplica
    from graftwork.serving.spec import ArmSpec, ServeSpec

    marks.append(time.time())
    import torch  # noqa: F401

    marks.append(time.time())
    import_bitsandbytes()
    marks.append(time.time())
    from transformers import AutoModelForCausalLM  # noqa: F401

    marks.append(time.time())
    from benchmarks.base import URI

    async def play(root: str) -> None:
        spec = ServeSpec.model_validate({"base": URI, "root": root, "engine": {"num_threads": threads}})
        replica = EngineReplica.__new__(EngineReplica)
        await replica.__init__(spec.model_dump(mode="json"))  # type: ignore[misc]
        marks.append(time.time())
        arm = ArmSpec(name="base", max_new_tokens=1)
        await replica.choices(ArmRequest(arm, (Message("user", "Hello"),), "first"))
        marks.append(time.time())
        await asyncio.to_thread(replica.stop)

    with tempfile.TemporaryDirectory() as root:
        asyncio.run(play(root))
    return {name: after - before for name, before, after in zip(PHASES, marks[:-1], marks[1:], strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.threads)))
        return
    clock, found = Clock(), []
    command = [sys.executable, "-m", "benchmarks.start", "--child", "--threads", str(args.threads)]
    for _ in range(args.rounds):
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    figures = {name: figure([one[name] for one in found], "s") for name in PHASES}
    figures["ready"] = figure([sum(one.values()) for one in found], "s")
    write("start", args.out, figures, found, {"rounds": args.rounds, "threads": args.threads, "quant": "nf4"}, clock)


if __name__ == "__main__":
    main()
