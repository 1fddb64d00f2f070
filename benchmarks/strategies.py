"""Memory and seconds of each strategy on two ranks: what sharding takes off a worker, and what it costs.

    python -m benchmarks.strategies [--out FILE] [--only WORD]

A random Llama of 29.6 M parameters (hidden 512, 8 layers, vocabulary 8,192; 113 MiB in fp32), fp32 on a CPU, gloo; one
thread a rank; four steps of 8 rows of 64 tokens, 2 rows a forward pass. Each strategy runs in two fresh processes that
form a torch.distributed group, as torchrun does. Peaks are largest resident sets, so loading counts: under ZeRO-3 each
rank reads its part of plain weights, all others (quantised bases as well) are read whole. `above_ddp_mib` is what a
strategy's worker takes more than ddp's (less: negative). DeepSpeed's libraries alone are about 40 MiB of it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import Clock, Figure, figure, write

WORLD, STEPS, ROWS, TOKENS = 2, 4, 8, 64
MIB = 2**20


@dataclass(frozen=True)
class Setting:
    """One run."""

    adapter: str
    strategy: str
    quant: str = "none"
    offload: str = "none"

    @property
    def name(self) -> str:
        parts = (
            self.adapter,
            self.quant if self.quant != "none" else "",
            self.strategy,
            "offload" if self.offload != "none" else "",
        )
        return "_".join(part for part in parts if part)


SETTINGS = (
    *(Setting("full", kind) for kind in ("ddp", "zero1", "zero2", "zero3", "fsdp2")),
    *(Setting("lora", kind) for kind in ("ddp", "zero3", "fsdp2")),
    *(Setting("lora", kind, quant="nf4") for kind in ("ddp", "zero3", "fsdp2")),
)


def write_base(folder: Path) -> Path:
    """The random base, with a tokenizer that nothing asks."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny import write_tiny_tokenizer

    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    write_tiny_tokenizer(folder)
    return folder


def spec_of(base: str, setting: Setting) -> Any:
    from graftwork.training.spec import TrainSpec

    tree: dict[str, Any] = {
        "name": "strategies",
        "base": base,
        "quant": {"kind": setting.quant, "dtype": "float32"},
        "data": {"train": "made-up"},
        "max_length": TOKENS,
        "adapter": {"kind": setting.adapter},
        "optim": {"lr": 1e-4, "rows_per_step": ROWS, "micro_batch": 2},
        "strategy": {"kind": setting.strategy, "offload_optimizer": setting.offload},
        "num_workers": WORLD,
    }
    return TrainSpec.model_validate(tree)


def one_rank(base: str, setting: Setting, rank: int, port: int) -> None:
    """Train as one rank; rank 0 says what both took."""
    import numpy as np
    import torch.distributed as dist

    from graftwork.training.loop import run_steps
    from graftwork.training.objectives.rows import PreparedData, TokenRows
    from graftwork.training.worker_messages import StepReport, TrainJob

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(WORLD),
        LOCAL_WORLD_SIZE=str(WORLD),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    dist.init_process_group("gloo")
    rng = np.random.default_rng(0)
    rows = [(rng.integers(3, 8000, TOKENS).tolist(), [False] * 32 + [True] * 32) for _ in range(ROWS)]
    data = PreparedData(
        train=TokenRows.from_pairs(rows), eval=None, dropped=0, dropped_eval=0, pad_id=2, fingerprint=""
    )
    seconds: list[float] = []

    def report(step: StepReport) -> bool:
        seconds.append(step.step_s)
        return True

    result = run_steps(TrainJob(spec_of(base, setting), data, max_steps=STEPS), report)
    if rank == 0:
        print(
            json.dumps(
                {
                    "peak_bytes": result.peak_rss_bytes_per_worker,
                    "step_s": seconds[1:],
                    "losses": [loss for _, loss in result.train_loss],
                    "notes": result.notes,
                }
            )
        )
    dist.destroy_process_group()


def measured(base: str, setting: Setting) -> dict[str, Any]:
    """The setting on fresh processes."""
    from tests.ports import free_port

    told = ["--rank", base, json.dumps(asdict(setting)), str(free_port())]
    command = [sys.executable, "-m", "benchmarks.strategies", *told]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True, env=environment)
        for rank in range(WORLD)
    ]
    said = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * WORLD
    found: dict[str, Any] = json.loads(said[0].splitlines()[-1])
    print(f"{setting.name:20s} {[peak // MIB for peak in found['peak_bytes']]} MiB, {found['notes'][-1]}", flush=True)
    return {**asdict(setting), **found}


def figures_of(detail: list[dict[str, Any]]) -> dict[str, Figure]:
    """Peaks and seconds of each setting, and the peaks beside those of ddp."""
    figures: dict[str, Figure] = {}
    plain = {(one["adapter"], one["quant"]): max(one["peak_bytes"]) for one in detail if one["strategy"] == "ddp"}
    for one in detail:
        name = Setting(one["adapter"], one["strategy"], one["quant"], one["offload"]).name
        figures[f"{name}_peak"] = figure([peak / MIB for peak in one["peak_bytes"]], "MiB")
        figures[f"{name}_step"] = figure(one["step_s"], "s")
        if one["strategy"] != "ddp" and (one["adapter"], one["quant"]) in plain:
            above = [(peak - plain[one["adapter"], one["quant"]]) / MIB for peak in one["peak_bytes"]]
            figures[f"{name}_above_ddp"] = figure(above, "MiB")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="settings whose names contain it")
    parser.add_argument("--rank", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        base, setting, port, rank = args.rank
        one_rank(base, Setting(**json.loads(setting)), int(rank), int(port))
        return
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        base = str(write_base(Path(folder) / "base"))
        detail = [measured(base, one) for one in SETTINGS if args.only in one.name]
    sizes = {"world": WORLD, "steps": STEPS, "rows_per_step": ROWS, "tokens": TOKENS}
    write("strategies", args.out, figures_of(detail), detail, sizes, clock)


if __name__ == "__main__":
    main()
