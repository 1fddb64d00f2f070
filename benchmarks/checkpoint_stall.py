"""What a checkpoint on S3 costs the training that goes on beside its upload.

    python -m benchmarks.checkpoint_stall [--base FOLDER] [--rank 256]

LoRA on all linears in nf4, small steps of 2 rows (as in training_speed), one process of as many threads as cores, root
on SeaweedFS on loopback. `stall` is how much later the step after a checkpoint begins than after any other step: the
trainer writes its files, the checkpoint before is waited for, files are handed over. `stall_share` is that against 100
steps, the interval that the goal names. What sums and upload take from the training's cores shows in `slower`: steps
right after a checkpoint to the others.
"""

import argparse
import json
import os
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.base import URI
from benchmarks.record import Clock, figure, write
from benchmarks.training_speed import questions

INTERVAL, WARM = 100, 2


def steps_on_s3(base: str, rank: int, steps: int, every: int) -> tuple[list[Any], float]:
    """The steps' reports, and the MB of a checkpoint, on a server of the benchmark's own."""
    from graftwork.storage.store import RunPaths, Store
    from graftwork.training.checkpoint import Checkpoints
    from graftwork.training.loop import run_steps
    from graftwork.training.objectives.rows import prepare
    from graftwork.training.spec import TrainSpec
    from graftwork.training.worker_messages import TrainJob
    from tests.s3_server import S3Server

    s3_server, found = S3Server(), []
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in questions()), encoding="utf-8")
        try:
            s3_server.start()
            os.environ.update(s3_server.environment())
            spec = TrainSpec.model_validate(
                {
                    "name": "stall",
                    "root": f"s3://{s3_server.bucket}/stall",
                    "base": base,
                    "data": {"train": str(data)},
                    "adapter": {"rank": rank},
                    "optim": {"rows_per_step": 2, "micro_batch": 2, "lr": 1e-4},
                    "checkpoint_every": every,
                    "num_workers": 1,
                    "cpus_per_worker": os.cpu_count() or 1,
                }
            )
            run = RunPaths(Store(spec.root), "stall", "0" * 64)

            def report(step: Any) -> bool:
                found.append(step)
                return True

            run_steps(TrainJob(spec, prepare(spec), run, max_steps=steps), report)
            mark = Checkpoints(run).newest()
        finally:
            s3_server.remove()
    assert mark is not None, "the last step is saved"
    return found, sum(kept.size_bytes for kept in mark.files.values()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--base", default=URI)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=49)
    parser.add_argument("--every", type=int, default=8, help="steps between checkpoints")
    args = parser.parse_args()
    clock = Clock()
    steps, size_mb = steps_on_s3(args.base, args.rank, args.steps, args.every)
    gaps = {a.step: b.elapsed_s - a.elapsed_s - b.step_s for a, b in pairwise(steps[WARM:])}
    usual_s = figure([gap for step, gap in gaps.items() if step % args.every], "s")["value"]
    stalls = [gap - usual_s for step, gap in gaps.items() if step % args.every == 0]
    after = [step.step_s for step in steps[WARM:] if step.step % args.every == 1]
    others = figure([step.step_s for step in steps[WARM:] if step.step % args.every != 1], "s")
    figures = {
        "step": others,
        "stall": figure([1e3 * stall for stall in stalls], "ms"),
        "stall_share": figure([100 * stall / (INTERVAL * others["value"]) for stall in stalls], "%"),
        "slower": figure([one / others["value"] for one in after], "x"),
        "checkpoint": figure([size_mb], "MB"),
    }
    meta = {"base": args.base, "rank": args.rank, "steps": args.steps, "every": args.every, "interval": INTERVAL}
    write("checkpoint_stall", args.out, figures, [step.step_s for step in steps], meta, clock)


if __name__ == "__main__":
    main()
