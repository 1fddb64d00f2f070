"""Four LoRA trials at once on one frozen base, against the same four one after the other: seconds and losses.

    python -m benchmarks.together                  3 rounds of each size of forward pass, about 12 minutes

Rows of airport-card, SmolLM2-135M at nf4, LoRA on all linears (ranks 4, 16, 16, 64), 4 rows a step in one pass or in
four, held-out loss of 16 rows every 3 steps, as in a sweep of `graftwork tune`. Arms, in turns, each a process of one
thread, as a trial's is: `serial` (the loop of `graftwork train`, four times in one process), `together`
(`tuning.together`), `single` (the same with one trial at a time: what its layers gain without any sharing). `steps`
leaves out the first, which the four share because their adapters are still equal; `later` are those with evaluations;
`run` is all steps and evaluations; `process` the whole process, imports and base included. CPU seconds beside the wall
seconds: a busy machine disturbs them less.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.base import URI
from benchmarks.record import Clock, Figure, figure, ratios, write
from benchmarks.recorded import job_of
from graftwork import config
from graftwork.base import load as base_model
from graftwork.base.model_shape import ModelShape
from graftwork.environment import peak_rss_bytes
from graftwork.errors import RunError
from graftwork.quantization import compute_dtype
from graftwork.training.autotune import sizes_of
from graftwork.training.planning.memory import predict_training
from graftwork.training.worker_messages import StepReport, TrainJob
from graftwork.tuning.multi_lora.group import predict_together
from graftwork.tuning.run import Sweep
from graftwork.tuning.search import Values
from graftwork.tuning.spec import TuneSpec

TRIALS: tuple[Values, ...] = tuple(
    {"adapter.rank": rank, "optim.lr": lr} for rank, lr in ((16, 1e-3), (16, 4e-3), (4, 2e-3), (64, 2e-3))
)
ARMS = ("serial", "together", "single")
SIZES = (4, 1)
REPORT_EVERY = 3


def jobs(micro_batch: int, steps: int) -> dict[str, TrainJob]:
    """The trials' jobs as a sweep would make them."""
    space = {key: {"kind": "choice", "values": sorted({one[key] for one in TRIALS})} for key in TRIALS[0]}  # type: ignore[type-var]
    train: dict[str, Any] = {
        "name": "airport-card",
        "base": URI,
        "data": {"train": "recipe://airport-card/train.jsonl", "eval": "recipe://airport-card/valid.jsonl"},
        "prompt": {"system": "Answer with one airport card as JSON."},
        "optim": {"rows_per_step": 4, "micro_batch": micro_batch, "warmup_ratio": 0},
        "num_workers": 1,
    }
    given = {
        "name": "together",
        "train": train,
        "space": space,
        "num_trials": 16,
        "steps": steps,
        "report_every": REPORT_EVERY,
        "eval_rows": 16,
        "scheduler": None,
        "max_concurrent": 1,
    }
    sweep = Sweep.resolve(config.validate(TuneSpec, given, where="benchmarks.together"))
    return {json.dumps(values): job_of(sweep, values) for values in TRIALS}


def child(arm: str, micro_batch: int, steps: int) -> dict[str, Any]:
    """What one process measured."""
    every = {key: replace(job, report_every=1) for key, job in jobs(micro_batch, steps).items()}
    apart = arm != "together"
    loops = [measured(arm, {key: job}) for key, job in every.items()] if apart else [measured(arm, every)]
    sums = {name: sum(one[name] for one in loops) for name in ("run_s", "steps_s", "later_s", "later_cpu_s")}
    losses = {key: loss for one in loops for key, loss in one["losses"].items()}
    peaks = {"peak_bytes": peak_rss_bytes(), "predicted_bytes": predicted(arm, every)}
    return {**sums, "cpu_s": time.process_time(), **peaks, "losses": losses}


def predicted(arm: str, trials: Mapping[str, TrainJob]) -> int:
    """Peak of a process of that arm, as planned."""
    specs, data = [job.spec for job in trials.values()], next(iter(trials.values())).data
    shape = ModelShape.from_config(base_model.resolve(specs[0].base).config)
    rows, width = sizes_of(data.train), compute_dtype(specs[0].quant, "cpu")[0].itemsize
    if arm == "together":
        return predict_together(specs, shape, rows, value_bytes=width).peak_bytes
    return max(predict_training(spec, shape, rows, value_bytes=width).peak_bytes for spec in specs)


def measured(arm: str, trials: Mapping[str, TrainJob]) -> dict[str, Any]:
    """One loop: seconds from its first step on, those after the first step, and the held-out losses in the end."""
    from graftwork.training.loop import run_steps
    from graftwork.tuning.multi_lora.train import run_together

    seen: list[StepReport] = []
    clocks: list[tuple[float, float]] = []
    losses: dict[str, float] = {}

    def note(steps: Mapping[str, StepReport], lost: Mapping[str, RunError]) -> dict[str, bool]:
        assert not lost, f"a trial diverged: {lost}"
        seen.append(next(iter(steps.values())))
        clocks.append((time.perf_counter(), time.process_time()))
        losses.update({key: step.eval_loss for key, step in steps.items() if step.eval_loss is not None})
        return dict.fromkeys(steps, True)

    if arm == "serial":
        ((key, job),) = trials.items()
        run_steps(job, lambda step: note({key: step}, {})[key])
    else:
        run_together(trials, note)
    (first_s, first_cpu_s), (last_s, last_cpu_s) = clocks[0], clocks[-1]
    steps_s = sum(step.step_s for step in seen[1:])
    return {
        "run_s": seen[-1].elapsed_s,
        "steps_s": steps_s,
        "later_s": last_s - first_s,
        "later_cpu_s": last_cpu_s - first_cpu_s,
        "losses": losses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="rows of a forward pass of one trial")
    parser.add_argument("--child", nargs=2, metavar=("ARM", "SIZE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child[0], int(args.child[1]), args.steps)))
        return
    clock, detail = Clock(), []
    for number in range(args.rounds):
        for size in args.sizes:
            for arm in ARMS:
                began = time.perf_counter()
                command = [sys.executable, "-m", "benchmarks.together", "--child", arm, str(size)]
                done = subprocess.run(
                    [*command, "--steps", str(args.steps)], check=True, stdout=subprocess.PIPE, text=True
                )
                found = json.loads(done.stdout.splitlines()[-1])
                detail.append(
                    {
                        "round": number,
                        "micro_batch": size,
                        "arm": arm,
                        **found,
                        "process_s": time.perf_counter() - began,
                    }
                )
                print({key: value for key, value in detail[-1].items() if key != "losses"}, flush=True)

    def samples(size: int, arm: str, name: str) -> list[float]:
        return [one[name] for one in detail if (one["micro_batch"], one["arm"]) == (size, arm)]

    figures: dict[str, Figure] = {}
    for size in args.sizes:
        for name in ("steps_s", "later_s", "later_cpu_s", "run_s", "process_s", "cpu_s"):
            over = samples(size, "serial", name)
            for arm in ARMS[1:]:
                figures[f"{arm}_{size}_{name}"] = figure(ratios(over, samples(size, arm, name)), "x")
        for arm in ARMS:
            figures[f"{arm}_{size}"] = figure(samples(size, arm, "later_s"), "s")
    sizes = [one["predicted_bytes"] / one["peak_bytes"] for one in detail if one["arm"] == "together"]
    figures["peak_predicted"] = figure(sizes, "x")
    figures["loss_apart"] = figure(apart(detail, "together"), "share")
    if len(args.sizes) > 1:
        figures["rounding_apart"] = figure(apart(detail, "serial"), "share")
    meta = {"rounds": args.rounds, "steps": args.steps, "trials": TRIALS}
    write("together", args.out, figures, detail, meta, clock)


def apart(detail: list[dict[str, Any]], arm: str) -> list[float]:
    """Of each process of an arm how far the worst trial's last held-out loss lies from the serial arm's, relative.

    Those of the serial arm itself are held against its first size: they differ by rounding in bfloat16 alone.
    """
    serial = {(one["round"], one["micro_batch"]): one["losses"] for one in detail if one["arm"] == "serial"}
    first = detail[0]["micro_batch"]
    return [
        max(abs(loss / serial[one["round"], size][key] - 1) for key, loss in one["losses"].items())
        for one in detail
        if one["arm"] == arm and (arm != "serial" or one["micro_batch"] != first)
        for size in [first if arm == "serial" else one["micro_batch"]]
    ]


if __name__ == "__main__":
    main()
