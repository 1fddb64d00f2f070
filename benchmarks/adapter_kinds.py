"""What each kind of adapter costs and learns: equal rows, equal steps, its own learning rate, on SmolLM2-135M-Instruct.

    python -m benchmarks.adapter_kinds                    all kinds of examples/train-adapters, and LoRA
    python -m benchmarks.adapter_kinds --kinds ia3 full   these again; others stay as they were recorded
    python -m benchmarks.adapter_kinds --minutes 3        of those not yet recorded as many as begin in this time
    python -m benchmarks.adapter_kinds --table            nothing: the guide's table of what was recorded

One process and one thread a kind, one seed: the losses say what to try first, not which kind is best for a task.
"""

import argparse
import gc
import itertools
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import RESULTS, Clock, Figure, figure, write
from graftwork import config
from graftwork.base import load as base_model
from graftwork.storage.store import RunPaths, Store
from graftwork.training.checkpoint import is_of_model
from graftwork.training.loop import run_steps
from graftwork.training.objectives.rows import prepare
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import Report, StepReport, TrainJob

EXAMPLES = Path(__file__).parents[1] / "examples" / "train-adapters"
LORA = ["name=airport-card-lora", "adapter={kind: lora, rank: 16, alpha: 32}", "optim.lr=4.0e-3"]
KINDS = ("lora", "rslora", "dora", "ia3", "prefix", "houlsby", "pfeiffer", "full")
ROWS = 2
"""A step's."""
LAST = 5
"""Steps whose mean loss stands for the end."""


def spec_of(kind: str, root: Path) -> TrainSpec:
    """The example's spec in one process; nf4 as its exact values in fp32, which a CPU computes faster."""
    sets = [f"root={root}", "num_workers=1", "eval_every=1000", f"optim.rows_per_step={ROWS}"]
    sets += LORA if kind == "lora" else []
    sets += [] if kind == "full" else ["quant={kind: nf4, resident: dequantised, dtype: float32}"]
    spec = config.load(EXAMPLES / f"{'ia3' if kind == 'lora' else kind}.yaml", sets, expect="train")
    assert isinstance(spec, TrainSpec)
    return spec


def trained_parameters(spec: TrainSpec) -> int:
    """Numbers that the optimizer moves."""
    from graftwork.training.adapters.attach import attach  # imports peft, after the loop has made bitsandbytes quiet

    loaded = base_model.load(base_model.resolve(spec.base), spec.quant, device="cpu", purpose="train")
    model = attach(loaded.model, spec.adapter)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def measure(kind: str, root: Path, steps: int) -> dict[str, Any]:
    """One kind, trained and weighed."""
    spec = spec_of(kind, root)
    run = RunPaths(Store(spec.root), spec.name, "0" * 64)
    job = TrainJob(spec, prepare(spec), run, max_steps=steps)
    clock: list[float] = []
    result = run_steps(job, _told(kind, clock))
    losses = [loss for _, loss in result.train_loss]
    folder = run.store.local_dir(*run.checkpoints(f"checkpoint-{steps}"))
    gc.collect()
    return {
        "kind": kind,
        "said": spec.adapter.describe(),
        "lr": spec.optim.lr,
        "trained_parameters": trained_parameters(spec),
        "file_bytes": sum(path.stat().st_size for path in folder.iterdir() if is_of_model(path.name)),
        "first_loss": losses[0],
        "last_loss": sum(losses[-LAST:]) / LAST,
        "held_out_loss": result.eval_loss[-1][1],
        "step_cpu_s": [after - before for before, after in itertools.pairwise(clock[:-1])],
        "steps": result.steps,
        "seed": spec.seed,
    }


def _told(kind: str, clock: list[float]) -> Report:
    """Notes the CPU seconds of the process after each step; those of the last hold the evaluation."""

    def report(step: StepReport) -> bool:
        clock.append(time.process_time())
        if step.step % 10 == 0:
            print(f"{kind} step {step.step}: loss {step.loss:.3f}, {step.step_s:.1f} s", flush=True)
        return True

    return report


def recorded(path: Path) -> dict[str, dict[str, Any]]:
    """What an earlier run measured, by kind."""
    if not path.exists():
        return {}
    return {row["kind"]: row for row in json.loads(path.read_text(encoding="utf-8"))["result"]["detail"]}


def shown(rows: Mapping[str, dict[str, Any]]) -> str:
    """In Markdown, as docs/guide-training.md has it."""
    lines = ["| trained | numbers trained | file | lr | held-out loss |", "|---|---|---|---|---|"]
    for kind in KINDS:
        if kind in rows:
            row = rows[kind]
            parts = (row["said"], f"{row['trained_parameters']:,}", f"{row['file_bytes'] / 2**20:.1f} MiB")
            lines.append(f"| {' | '.join(parts)} | {row['lr']:g} | {row['held_out_loss']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "adapter_kinds.json")
    parser.add_argument("--kinds", nargs="+", choices=KINDS)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        print(shown(recorded(args.out)))
        return
    clock, rows = Clock(), recorded(args.out)
    torch.set_num_threads(1)
    began, left = time.monotonic(), [kind for kind in KINDS if args.minutes is None or kind not in rows]
    for kind in args.kinds or left:
        if args.minutes is not None and time.monotonic() - began > 60 * args.minutes:
            break
        with tempfile.TemporaryDirectory() as root:
            rows[kind] = measure(kind, Path(root), args.steps)
        _write(args.out, rows, args.steps, clock)


def _write(out: Path, rows: dict[str, dict[str, Any]], steps: int, clock: Clock) -> None:
    ordered = [rows[kind] for kind in KINDS if kind in rows]
    figures: dict[str, Figure] = {
        f"{row['kind']}_step": figure(row["step_cpu_s"], "CPU s") for row in ordered if "step_cpu_s" in row
    }
    figures |= {f"{row['kind']}_held_out": figure([row["held_out_loss"]], "nats") for row in ordered}
    meta = {"steps": steps, "rows_per_step": ROWS, "threads": 1, "base": "SmolLM2-135M-Instruct"}
    write("adapter_kinds", out, figures, ordered, meta, clock)


if __name__ == "__main__":
    main()
