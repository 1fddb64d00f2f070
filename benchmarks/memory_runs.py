"""Memory of whole runs on real rows: what the plan predicts of a training worker, and the peak that it reached.

    python -m benchmarks.memory_runs [--only TEXT] [--rounds N]
    python -m benchmarks.memory_runs --again     what the formulas predict now of the runs in the results

Each run is `graftwork train` in processes of its own: Ray Train's workers, held-out losses, checkpoints, publishing.
Rows are real, of uneven length: user agents, airport cards with and without passages, preferences about them, and the
docstrings of the standard library (`benchmarks/training_speed.py`). A prediction is that of `graftwork plan`, without
what earlier runs on the machine have shown. Measured is the largest resident set of any worker. `python -m
benchmarks.memory_plan` has rows of one length for each setting, and more kinds of adapters and strategies.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.base import URI
from benchmarks.record import RESULTS, Clock, Figure, figure, write
from benchmarks.training_speed import questions
from graftwork.base import load as base_model
from graftwork.base.model_shape import ModelShape
from graftwork.planning.hardware import Machine
from graftwork.planning.memory import RowSizes
from graftwork.training.planning.memory import predict_training
from graftwork.training.planning.plan import resolve_auto
from graftwork.training.spec import TrainSpec

DOCS = "docs.jsonl"
"""Made of the running Python's standard library."""
PLAIN: dict[str, Any] = {"quant": {"kind": "none"}}
CARD: dict[str, Any] = {"prompt": {"system": "Answer with one airport card as JSON."}}


@dataclass(frozen=True)
class Setting:
    """One run: a training spec without its base."""

    name: str
    spec: dict[str, Any] = field(default_factory=dict)


def _docs(rows: int, **more: Any) -> dict[str, Any]:
    return {"data": {"train": DOCS, "train_rows": rows}, **more}


def _recipe(name: str, rows: int, held_out: int = 8, **more: Any) -> dict[str, Any]:
    files = {"train": f"recipe://{name}/train.jsonl", "eval": f"recipe://{name}/valid.jsonl"}
    return {"data": {**files, "train_rows": rows, "eval_rows": held_out, **more.pop("data", {})}, **more}


RAFT: dict[str, Any] = {"context": {"corpus": "recipe://airport-card/corpus.jsonl", "k": 3}}
SETTINGS = (
    Setting("user agents, QLoRA", _recipe("ua-parse", 96)),
    Setting("airport cards, QLoRA", _recipe("airport-card", 96, **CARD)),
    Setting("airport cards with passages, QLoRA", _recipe("airport-card", 96, data=RAFT, **CARD)),
    Setting(
        "airport cards, LoRA, DPO",
        _recipe("airport-pairs", 64, objective={"kind": "dpo"}, **PLAIN, **CARD, optim={"micro_batch": 2, "lr": 1e-3}),
    ),
    Setting("docstrings, QLoRA", _docs(96)),
    Setting("docstrings, QLoRA, fp32", _docs(64, quant={"kind": "nf4", "dtype": "float32"})),
    Setting("docstrings, QLoRA, one worker", _docs(64, num_workers=1)),
    Setting("docstrings, LoRA, checkpointing", _docs(64, **PLAIN, optim={"gradient_checkpointing": True})),
    Setting(
        "docstrings, all weights, one worker",
        _docs(
            32,
            **PLAIN,
            num_workers=1,
            adapter={"kind": "full"},
            optim={"lr": 1e-5, "rows_per_step": 4, "micro_batch": 1},
        ),
    ),
    Setting("user agents, QLoRA, outcomes of the task", _recipe("ua-parse", 32, outcomes={"task": {"rows": 16}})),
)


def spec_of(setting: Setting, folder: Path) -> TrainSpec:
    """The setting's spec with its data and root in a folder."""
    tree = json.loads(json.dumps(setting.spec))
    if tree["data"]["train"] == DOCS:
        tree["data"]["train"] = str(folder / DOCS)
    return TrainSpec.model_validate({"name": "memory-runs", "root": str(folder / "root"), "base": URI, **tree})


def write_docs(folder: Path) -> None:
    """The docstrings as rows."""
    (folder / DOCS).write_text("".join(json.dumps(row) + "\n" for row in questions()), encoding="utf-8")


def predicted(spec: TrainSpec) -> dict[str, Any]:
    """What the plan says of a worker of this spec, and of which rows."""
    from graftwork.training.autotune import sizes_of
    from graftwork.training.objectives.rows import prepare

    shape, machine = ModelShape.from_config(base_model.resolve(spec.base).config), Machine.detect().at(spec.quant)
    rows: RowSizes = sizes_of(prepare(spec).train)
    spec = resolve_auto(spec, shape, rows, machine).spec
    plan = predict_training(spec, shape, rows, value_bytes=machine.value_bytes)
    tokens = {"rows": rows.count, "shortest": rows.shortest, "mean": round(rows.mean, 1), "longest": rows.longest}
    return {
        "peak_bytes_predicted": plan.peak_bytes,
        "parts": dict(plan.parts),
        "tokens": tokens,
        "value_bytes": machine.value_bytes,
    }


def measured(spec: TrainSpec, folder: Path) -> list[int]:
    """Peak of each worker of a whole run."""
    file = folder / "spec.yaml"
    file.write_text(
        yaml.safe_dump({**spec.model_dump(mode="json", exclude_unset=True), "kind": "train"}), encoding="utf-8"
    )
    command = [sys.executable, "-c", "from graftwork.cli import main; main()", "train", str(file), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise SystemExit(f"{spec.name}: {done.stderr[-1500:]}")
    peaks: list[int] = json.loads(done.stdout)["peak_rss_bytes_per_worker"]
    return peaks


def row_of(setting: Setting, plan: dict[str, Any], peaks: list[list[int]]) -> dict[str, Any]:
    """One row of the table: the largest peak of all workers and rounds."""
    most = max(peak for run in peaks for peak in run)
    error = round(plan["peak_bytes_predicted"] / most - 1, 4)
    return {**asdict(setting), **plan, "peak_bytes": most, "peaks_bytes": peaks, "peak_error": error}


def figures_of(rows: list[dict[str, Any]]) -> dict[str, Figure]:
    """Errors over the settings: of either sign, and how far the worst one is below the truth."""
    errors = [100 * abs(row["peak_error"]) for row in rows]
    below = [max(0.0, -100 * row["peak_error"]) for row in rows]

    def worst(samples: list[float]) -> Figure:
        return Figure(value=max(samples), q1=max(samples), q3=max(samples), n=len(samples), unit="%")

    return {"error": figure(errors, "%"), "worst": worst(errors), "worst_below": worst(below)}


def shown(row: dict[str, Any]) -> str:
    """A row of the table, for people."""
    predicted, most = row["peak_bytes_predicted"] / 2**30, row["peak_bytes"] / 2**30
    return f"{row['name']:42s} {predicted:5.2f} GiB predicted {most:5.2f} measured {row['peak_error']:+6.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()
    clock = Clock()
    path = args.out or RESULTS / "memory_runs.json"
    known = {row["name"]: row for row in json.loads(path.read_text())["result"]["detail"]} if path.exists() else {}
    rows, names = [], [setting.name for setting in SETTINGS]
    for setting in SETTINGS:
        with tempfile.TemporaryDirectory(prefix="gw-memory-") as name:
            folder = Path(name)
            write_docs(folder)
            spec, peaks = spec_of(setting, folder), known.get(setting.name, {}).get("peaks_bytes", [])
            wanted = args.only == setting.name if args.only in names else args.only in setting.name
            if wanted and not args.again:
                peaks = []
                for number in range(args.rounds):
                    root = {"root": str(folder / f"root-{number}")}
                    peaks.append(measured(spec.with_(root), folder))
            if peaks:
                rows.append(row_of(setting, predicted(spec), peaks))
                print(shown(rows[-1]), flush=True)
    write("memory_runs", args.out, figures_of(rows), rows, {"load": os.getloadavg()[0]}, clock)


if __name__ == "__main__":
    main()
