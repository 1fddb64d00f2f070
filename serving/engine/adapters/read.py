"""Reads a PEFT adapter folder for serving: each kind by its own reader, every other kind refused with the reason."""

from collections.abc import Mapping
from pathlib import Path

import torch

from graftwork.artifact_check import CONFIG_FILE, WEIGHTS_FILE
from graftwork.errors import ArtifactError
from graftwork.serving.engine.adapters.base_view import BaseView
from graftwork.serving.engine.adapters.bottleneck import read_bottleneck
from graftwork.serving.engine.adapters.changes import AdapterWeights
from graftwork.serving.engine.adapters.config_file import ConfigFile
from graftwork.serving.engine.adapters.ia3 import read_ia3
from graftwork.serving.engine.adapters.lead import read_prefix, read_prompt
from graftwork.serving.engine.adapters.lora import read_lora
from graftwork.serving.engine.adapters.rows import read_trained_tokens
from graftwork.serving.engine.adapters.tensor_file import TensorFile

SERVED = ("LORA", "IA3", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "TRAINABLE_TOKENS", "BOTTLENECK")
SCORING = ("SEQ_CLS", "TOKEN_CLS")
"""Tasks of adapters whose head gives scores in place of tokens."""
_DELTAS = frozenset(
    {
        "ADALORA",
        "ADAMSS",
        "BOFT",
        "C3A",
        "DELORA",
        "FOURIERFT",
        "FROD",
        "GRALORA",
        "HIRA",
        "HRA",
        "LOHA",
        "LOKR",
        "MISS",
    }
    | {"OFT", "OSF", "PEANUT", "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHIRA", "TINYLORA", "UNILORA", "VBLORA", "VERA"}
    | {"WAVEFT"}
)
"""Kinds whose delta is one matrix a linear, so that the base can take it over."""
_WHY_REFUSED = {
    "ADAPTION_PROMPT": "its attention to adaption prompts is not computed here",
    "CARTRIDGE": "its cache belongs to one document's positions",
    "CPT": "its prompt depends on labelled tokens",
    "LN_TUNING": "trained norms would replace the base's for every request",
    "MULTITASK_PROMPT_TUNING": "its prompt depends on a task id that requests do not carry",
    "POLY": "its mixture depends on a task id that requests do not carry",
    "XLORA": "its gates need a second forward pass for every token",
}


def read_adapter(
    folder: Path,
    base: BaseView,
    *,
    max_rank: int,
    dtype: torch.dtype,
    digests: Mapping[str, str] | None = None,
    narrow: bool = False,
) -> AdapterWeights:
    """What the adapter changes, on the CPU, weights in `dtype`. A DoRA adapter reads the base's weights.

    narrow: plain LoRA that was saved in bf16 stays so, in half the memory: widened where it is used, it has the same
    values. digests: sha256 by file name (the manifest's), taken over the very bytes that are used.
    Raises ArtifactError that names the key, what was found and the rule, for anything that cannot be served exactly.
    """
    known = digests or {}
    config = ConfigFile.read(folder, known.get(CONFIG_FILE))
    kind = config.values.get("peft_type")
    if not isinstance(kind, str) or kind not in SERVED:
        raise _refused_kind(config, kind)
    if config.values.get("task_type") in SCORING:
        raise config.make_error("task_type", "it scores answers (a reward model, a classifier) and writes none",
                             "serve what was trained with it; rewards are asked in training")  # fmt: skip
    tensors = TensorFile(folder, known.get(WEIGHTS_FILE))
    if kind == "LORA":
        return read_lora(config, tensors, base, max_rank=max_rank, dtype=dtype, narrow=narrow)
    if kind == "BOTTLENECK":
        return read_bottleneck(config, tensors, base, max_rank=max_rank, dtype=dtype)
    if kind == "IA3":
        return read_ia3(config, tensors, base, dtype=dtype)
    if kind == "TRAINABLE_TOKENS":
        return read_trained_tokens(config, tensors, base, dtype=dtype)
    read = read_prefix if kind == "PREFIX_TUNING" else read_prompt
    return read(config, tensors, base, dtype=dtype)


def _refused_kind(config: ConfigFile, kind: object) -> ArtifactError:
    served = f"served are {', '.join(SERVED)}"
    if isinstance(kind, str) and kind in _DELTAS:
        move = "convert it with peft's convert_to_lora, or merge it into the base and serve that as a base of its own"
        return config.make_error("peft_type", f"{kind} is not computed row by row; {served}", move)
    why = f"{_WHY_REFUSED[kind]}; " if isinstance(kind, str) and kind in _WHY_REFUSED else ""
    return config.make_error("peft_type", why + served, "train it as one of those")
