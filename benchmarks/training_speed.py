"""How many tokens a second supervised finetuning takes on this CPU, beside plain TRL on the same rows.

    python -m benchmarks.training_speed

Rows: a question and the docstring of each function of the standard library that has one, 20 to 500 tokens long, in the
base's chat template. LoRA r16 on all linears of SmolLM2-135M, 8 rows a step in passes of 4, one process of as many
threads as cores. Arms, each in processes of their own, in turns: `ours` (the loop of `graftwork train`), `trl`
(SFTTrainer as it comes: it recomputes activations, casts adapters to bf16 on a quantised base, pads random rows
together), `trl_no_recompute` (the same without recomputation) and `trl_best` (its best settings: no recomputation,
adapters in fp32 without autocast, rows grouped by length).
A second counts tokens without padding; the first two steps are left out.

Grouping sorts 50 steps' rows at a time, longest first. `trl_best` takes steps evenly from one such group, in random
order, so that a few steps have rows of all lengths as the other arms' have.
"""

import argparse
import ast
import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.base import URI
from benchmarks.record import Clock, Figure, figure, ratios, write

ARMS = ("ours", "trl", "trl_no_recompute", "trl_best")
MAX_LENGTH, ROWS_PER_STEP, MICRO_BATCH, WARM = 512, 8, 4, 2
GROUP = 50
"""Steps whose rows `group_by_length` sorts together."""


def questions() -> Iterator[dict[str, Any]]:
    """A row for each documented function of the standard library's top level."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            said = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if said:
                asked = f"What does {path.stem}.{node.name} do?"  # type: ignore[attr-defined]
                yield {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}


def child(arm: str, quant: str, steps: int) -> dict[str, float]:
    """Tokens a second of one arm, in this process."""
    with tempfile.TemporaryDirectory() as name:
        rows = list(questions())
        data = Path(name) / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        step_s, tokens = (_ours if arm == "ours" else _trl)(arm, quant, steps, data)
    counted = tokens[WARM:] if len(tokens) > 1 else tokens
    return {"tokens_per_s": sum(counted) / sum(step_s[WARM:]), "step_s": float(np.median(step_s[WARM:]))}


def _ours(_: str, quant: str, steps: int, data: Path) -> tuple[list[float], list[int]]:
    from graftwork.training.loop import run_steps
    from graftwork.training.objectives.rows import prepare
    from graftwork.training.worker_messages import StepReport, TrainJob

    spec = _spec(quant, data)
    found: list[StepReport] = []

    def report(step: StepReport) -> bool:
        found.append(step)
        return True

    run_steps(TrainJob(spec, prepare(spec), max_steps=steps), report)
    ends = [0, *(step.tokens for step in found)]
    return [step.step_s for step in found], [after - before for before, after in zip(ends[:-1], ends[1:], strict=True)]


def _spec(quant: str, data: Path) -> Any:
    from graftwork.training.spec import TrainSpec

    return TrainSpec.model_validate(
        {
            "name": "speed",
            "root": str(data.parent),
            "base": URI,
            "quant": {"kind": quant},
            "data": {"train": str(data)},
            "max_length": MAX_LENGTH,
            "optim": {"rows_per_step": ROWS_PER_STEP, "micro_batch": MICRO_BATCH, "lr": 1e-4},
            "num_workers": 1,
            "cpus_per_worker": os.cpu_count() or 1,
        }
    )


def _trl(arm: str, quant: str, steps: int, data: Path) -> tuple[list[float], list[int]]:
    """SFTTrainer on the same base, fed with messages: TRL renders and tokenises them itself."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from graftwork.base import load as base_model

    torch.set_num_threads(os.cpu_count() or 1)
    spec = _spec(quant, data)
    base = base_model.resolve(spec.base)
    loaded = base_model.load(base, spec.quant, device="cpu", purpose="train")
    began: list[float] = []
    step_s: list[float] = []

    class Clocked(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            began.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            step_s.append(time.perf_counter() - began[-1])

    class Counted(SFTTrainer):  # type: ignore[misc]  # trl has no types
        tokens = 0

        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self.tokens += int(inputs["attention_mask"].sum())
            counts.append(self.tokens)
            return super().training_step(model, inputs, *args, **kwargs)

    counts: list[int] = []
    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    rows, best = [json.loads(line) for line in data.read_text().splitlines()], arm == "trl_best"
    settings: dict[str, Any] = {"bf16": loaded.dtype == torch.bfloat16}
    if arm == "trl_no_recompute":
        settings["gradient_checkpointing"] = False
    if best:
        rows = _grouped(rows, tokenizer, steps)
        settings = {"bf16": False, "gradient_checkpointing": False, "train_sampling_strategy": "sequential"}
    trainer = Counted(
        model=loaded.model,
        args=SFTConfig(
            output_dir=str(data.parent / "out"),
            max_steps=steps,
            per_device_train_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=ROWS_PER_STEP // MICRO_BATCH,
            max_length=MAX_LENGTH,
            learning_rate=1e-4,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Clocked()],
    )
    for parameter in trainer.model.parameters() if best else ():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trainer.train()
    passes = ROWS_PER_STEP // MICRO_BATCH
    ends = [0, *counts[passes - 1 :: passes]]
    return step_s, [after - before for before, after in zip(ends[:-1], ends[1:], strict=True)]


def _grouped(rows: list[dict[str, Any]], tokenizer: Any, steps: int) -> list[dict[str, Any]]:
    """Rows of `steps` steps out of one group of 50 as transformers' `group_by_length` makes it."""
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    chance = random.Random(0)
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    lengths = [min(len(ids), MAX_LENGTH) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    order = get_length_grouped_indices(lengths, ROWS_PER_STEP, generator=torch.Generator().manual_seed(0))
    group = [order[at : at + ROWS_PER_STEP] for at in range(0, GROUP * ROWS_PER_STEP, ROWS_PER_STEP)]
    chosen = chance.sample([group[round((step + 0.5) * GROUP / steps - 0.5)] for step in range(steps)], steps)
    return [rows[index] for step in chosen for index in step]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--child", nargs=2, metavar=("ARM", "QUANT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        arm, quant = args.child
        print(json.dumps(child(arm, quant, args.steps)))
        return
    clock, detail = Clock(), []
    for number in range(args.rounds):
        for quant in ("nf4", "none"):
            for arm in ARMS:
                command = [sys.executable, "-m", "benchmarks.training_speed", "--child", arm, quant]
                done = subprocess.run(
                    [*command, "--steps", str(args.steps)], check=True, stdout=subprocess.PIPE, text=True
                )
                detail.append({"round": number, "quant": quant, "arm": arm, **json.loads(done.stdout.splitlines()[-1])})

    def speeds(quant: str, arm: str) -> list[float]:
        return [one["tokens_per_s"] for one in detail if (one["quant"], one["arm"]) == (quant, arm)]

    figures: dict[str, Figure] = {}
    for quant, name in (("nf4", "qlora"), ("none", "lora")):
        figures |= {f"{name}_{arm}": figure(speeds(quant, arm), "tok/s") for arm in ARMS}
        for arm in ARMS[1:]:
            figures[f"{name}_to_{arm}"] = figure(ratios(speeds(quant, "ours"), speeds(quant, arm)), "x")
    meta = {"rounds": args.rounds, "steps": args.steps, "threads": os.cpu_count(), "max_length": MAX_LENGTH}
    write("training_speed", args.out, figures, detail, meta, clock)


if __name__ == "__main__":
    main()
