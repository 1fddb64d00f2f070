"""What Ray Train adds to a training step and to its start: the same loop on two of its workers and on bare processes.

    python -m benchmarks.ray_overhead

LoRA r16 on SmolLM2-135M (nf4), rows of the airport-card recipe, 8 a step, one thread a process, gloo. In turns: `bare`
starts two processes that form a torch.distributed group, as torchrun does; `ray` is `training.fit`. A step's seconds
are rank 0's; its first two are left out. The start is from the call to the end of the first step.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.base import URI
from benchmarks.record import Clock, figure, ratios, write
from graftwork.storage.store import RunPaths, Store

WORKERS, WARM = 2, 2


def spec_of(root: Path) -> Any:
    from graftwork.training.spec import TrainSpec

    return TrainSpec.model_validate(
        {
            "name": "overhead",
            "root": str(root),
            "base": URI,
            "data": {"train": "recipe://airport-card/train.jsonl"},
            "num_workers": WORKERS,
            "checkpoint_every": 10_000,
        }
    )


def run_of(root: Path, name: str) -> RunPaths:
    """A run of its own for each turn, so that none goes on from another."""
    return RunPaths(Store(str(root)), name, "0" * 64)


def bare(root: Path, name: str, steps: int) -> None:
    """Two processes beside this one; each trains its share."""
    from tests.ports import free_port

    port = str(free_port())
    command = [sys.executable, "-m", "benchmarks.ray_overhead", "--rank"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), port, str(root), name, str(steps)],
            stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # as Ray sets it for a worker of one CPU
        )
        for rank in range(WORKERS)
    ]
    assert [rank.wait(timeout=600) for rank in ranks] == [0] * WORKERS


def one_rank(rank: int, port: int, root: Path, name: str, steps: int) -> None:
    """One of the bare processes."""
    import torch.distributed as dist

    from graftwork.training.loop import run_steps
    from graftwork.training.objectives.rows import prepare
    from graftwork.training.worker_messages import TrainJob

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORKERS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    dist.init_process_group("gloo")
    spec = spec_of(root)
    run_steps(TrainJob(spec, prepare(spec), run_of(root, name), max_steps=steps), lambda _: True)
    dist.barrier()  # gloo's threads of a rank that ends first take the other one down
    dist.destroy_process_group()


def on_ray(root: Path, name: str, steps: int) -> None:
    """The same under Ray Train; this process has a Ray."""
    from graftwork.training.objectives.rows import prepare
    from graftwork.training.ray_worker import fit
    from graftwork.training.worker_messages import TrainJob

    spec = spec_of(root)
    fit(TrainJob(spec, prepare(spec), run_of(root, name), max_steps=steps))


def measured(root: Path, arm: str, number: int, steps: int) -> dict[str, Any]:
    """One turn: seconds of each step, and from the call to the first step's end."""
    from graftwork.training.worker_messages import read_steps

    name = f"{arm}-{number}"
    began = time.perf_counter()
    (bare if arm == "bare" else on_ray)(root, name, steps)
    took, found = time.perf_counter() - began, read_steps(run_of(root, name))
    return {"arm": arm, "step_s": [step.step_s for step in found], "start_s": took - found[-1].elapsed_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rank", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        rank, port, root, name, steps = args.rank
        one_rank(int(rank), int(port), Path(root), name, int(steps))
        return
    from graftwork.cluster.session import session
    from graftwork.metrics import quantile

    clock, detail = Clock(), []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):  # a Ray that idles beside the bare processes would slow them
            detail.append(measured(Path(folder), "bare", number, args.steps))
            with session("local", num_cpus=WORKERS):
                detail.append(measured(Path(folder), "ray", number, args.steps))
    steps = {
        arm: [quantile(one["step_s"][WARM:], 0.5) for one in detail if one["arm"] == arm] for arm in ("bare", "ray")
    }
    starts = {arm: [one["start_s"] for one in detail if one["arm"] == arm] for arm in ("bare", "ray")}
    figures = {
        "step_bare": figure(steps["bare"], "s"),
        "step_ray": figure(steps["ray"], "s"),
        "ray_to_bare": figure(ratios(steps["ray"], steps["bare"]), "x"),
        "start_more": figure([a - b for a, b in zip(starts["ray"], starts["bare"], strict=True)], "s"),
    }
    write("ray_overhead", args.out, figures, detail, {"rounds": args.rounds, "steps": args.steps}, clock)


if __name__ == "__main__":
    main()
