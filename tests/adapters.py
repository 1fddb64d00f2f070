"""Tiny adapters in PEFT's form, written without torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict, cast

from graftwork.artifacts.manifest import AdapterManifest
from graftwork.artifacts.registry import Listing
from graftwork.storage.store import Store


class Facts(TypedDict):
    """The keyword arguments of `artifact.publish` that a training run gives."""

    base_digest: str
    quant: Mapping[str, object]
    template_digest: str
    tokenizer_digest: str
    method: Mapping[str, object]
    prompt: Mapping[str, object]
    data_fingerprint: str
    metrics: Mapping[str, float]
    run: str
    provenance: Mapping[str, object]


def facts(**changed: object) -> Facts:
    """What a training run knows of its adapter, with some of it changed."""
    usual = Facts(
        base_digest="b" * 64,
        quant={"kind": "nf4", "double_quant": False},
        template_digest="c" * 64,
        tokenizer_digest="d" * 64,
        method={"kind": "lora", "rank": 4, "alpha": 8.0},
        prompt={"system": "Answer with one JSON object."},
        data_fingerprint="e" * 64,
        metrics={"eval_loss": 1.25},
        run="support-01234567",
        provenance={"seed": 0},
    )
    return cast(Facts, {**usual, **changed})


def write_adapter(folder: Path, seed: int = 0, rank: int = 4, hidden: int = 8, modules: int = 2) -> Path:
    """A LoRA adapter as PEFT's `save_pretrained` leaves it, README included. Equal seeds give equal bytes."""
    import numpy as np
    from safetensors.numpy import save_file

    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(modules):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = rng.standard_normal((rank, hidden)).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = rng.standard_normal((hidden, rank)).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_config(folder, r=rank)
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n")
    return folder


def write_config(folder: Path, **changed: object) -> None:
    """The adapter_config.json of `write_adapter`, with keys replaced."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "v_proj"],
        "base_model_name_or_path": "/home/somebody/base",
        "auto_mapping": None,
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changed}))


def list_adapters(store: Store) -> list[AdapterManifest]:
    """Return every visible version of a store, by task and then by age."""
    return [manifest for manifest, _ in Listing(store).read()]
