"""Matrix of docs/bases.md: decoder families with the facts of a published model, and the stages that each supports.

    python -m tests.base_matrix              prints the table of docs/bases.json
    python -m tests.base_matrix --write      checks every family, writes docs/bases.json and the table of docs/bases.md
    python -m tests.base_matrix --write qwen3 gemma2      checks these, and leaves the others as they are

A config is the class defaults of transformers with the facts below over them: those that decide the structure, from the
config.json of the model that is named. Sizes are those of the defaults.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
RESULTS, PAGE = DOCS / "bases.json", DOCS / "bases.md"
BEGIN, END = "<!-- table: python -m tests.base_matrix --write -->\n", "<!-- end of the table -->\n"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 4096,
    "short_factor": [1.0] * 48,
    "long_factor": [1.0 + place for place in range(48)],
}
ATTENTION, MAMBA = "attention", "mamba"

FAMILIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    # name of the model: (model_type, facts that are not the defaults of its class)
    "Llama 3.1 8B": (
        "llama",
        {"num_key_value_heads": 8, "rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 131072},
    ),
    "Llama 4 Scout, text": ("llama4_text", {}),
    "Qwen 2.5 7B": ("qwen2", {"num_key_value_heads": 4, "num_attention_heads": 28, "hidden_size": 3584}),
    "Qwen 3 8B": ("qwen3", {"num_key_value_heads": 8, "intermediate_size": 12288, "num_hidden_layers": 36}),
    "Qwen 3 30B-A3B": ("qwen3_moe", {}),
    "Qwen 3 Next 80B-A3B": ("qwen3_next", {}),
    "Qwen 3.5, text": ("qwen3_5_text", {}),
    "Qwen 3.5 MoE": ("qwen3_5_moe", {}),
    "Gemma 7B": ("gemma", {}),
    "Gemma 2 9B": ("gemma2", {}),
    "Gemma 3 1B": ("gemma3_text", {}),
    "Gemma 3 4B": ("gemma3", {}),
    "Gemma 3n E4B, text": ("gemma3n_text", {}),
    "Gemma 4, text": ("gemma4_text", {}),
    "Gemma 4": ("gemma4", {}),
    "Mistral 7B v0.1": ("mistral", {}),
    "Ministral 8B": ("ministral", {"head_dim": 128}),
    "Ministral 3": ("ministral3", {}),
    "Mistral Small 3.1": ("mistral3", {}),
    "Mixtral 8x7B": ("mixtral", {}),
    "Phi 2": ("phi", {}),
    "Phi 4": ("phi3", {"num_key_value_heads": 10, "num_attention_heads": 40, "hidden_size": 5120}),
    "Phi 4 mini": (
        "phi3",
        {
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "rope_parameters": LONGROPE,
            "max_position_embeddings": 131072,
        },
    ),
    "Phi 3.5 MoE": ("phimoe", {}),
    "gpt-oss": ("gpt_oss", {}),
    "DeepSeek V3": ("deepseek_v3", {}),
    "GLM 4 9B": ("glm", {}),
    "GLM 4 9B 0414": ("glm4", {}),
    "GLM 4.5 Air": ("glm4_moe", {}),
    "SmolLM 2 135M": ("llama", {"num_key_value_heads": 3, "num_attention_heads": 9, "hidden_size": 576}),
    "SmolLM 3 3B": ("smollm3", {}),
    "Granite 3 8B": ("granite", {"num_key_value_heads": 8}),
    "Granite 3 MoE": ("granitemoe", {}),
    "Granite 4 micro": (
        "granitemoehybrid",
        {
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "num_key_value_heads": 8,
            "layer_types": [ATTENTION] * 32,
            "position_embedding_type": "rope",
            "shared_intermediate_size": 8192,
        },
    ),
    "Granite 4 tiny": (
        "granitemoehybrid",
        {
            "num_local_experts": 64,
            "num_experts_per_tok": 6,
            "num_key_value_heads": 8,
            "layer_types": [MAMBA, MAMBA, MAMBA, MAMBA, MAMBA, ATTENTION, MAMBA, MAMBA] * 4,
        },
    ),
    "OLMo 1": ("olmo", {}),
    "OLMo 2 7B": ("olmo2", {}),
    "OLMo 3 7B": ("olmo3", {}),
    "OLMoE 1B-7B": ("olmoe", {}),
    "Command R": ("cohere", {}),
    "Command R7B": ("cohere2", {}),
    "EXAONE 4 32B": ("exaone4", {}),
    "Ernie 4.5 0.3B": ("ernie4_5", {}),
    "Ernie 4.5 21B-A3B": ("ernie4_5_moe", {}),
    "Hunyuan 7B": ("hunyuan_v1_dense", {"head_dim": 128, "num_key_value_heads": 8}),
    "Hunyuan A13B": (
        "hunyuan_v1_moe",
        {"head_dim": 128, "num_key_value_heads": 8, "num_experts": 64, "moe_topk": 8, "moe_intermediate_size": 3072},
    ),
    "Falcon H1": ("falcon_h1", {}),
    "LFM 2 1.2B": ("lfm2", {"num_hidden_layers": 16, "full_attn_idxs": [2, 5, 8, 10, 12, 14]}),
    "LFM 2 8B-A1B": (
        "lfm2_moe",
        {"layer_types": ["conv", "conv", "full_attention", "conv"] * 6, "num_hidden_layers": 24},
    ),
    "Bamba 9B": ("bamba", {"attn_layer_indices": [9, 18, 27]}),
    "Mamba 2": ("mamba2", {}),
    "StableLM 2": ("stablelm", {}),
    "Nemotron (Minitron)": ("nemotron", {"num_key_value_heads": 8, "head_dim": 128}),
    "StarCoder 2 3B": ("starcoder2", {}),
    "Pythia": ("gpt_neox", {}),
    "GPT-2": ("gpt2", {}),
    "OPT 125M": ("opt", {}),
}
CORE = ("Gemma 3 4B", "gpt-oss", "GPT-2", "Nemotron (Minitron)", "Falcon H1")
"""Checked by `make test`: a tower, sinks and experts, transposed linears, no keyword arguments, recurrent layers."""


def config_of(family: str) -> dict[str, Any]:
    """Return the config.json of a family: the defaults of its class and the facts of the table."""
    from transformers import AutoConfig

    kind, facts = FAMILIES[family]
    whole: dict[str, Any] = AutoConfig.for_model(kind, **facts).to_dict()
    return whole


def results() -> dict[str, Any]:
    """Return the committed checks by family."""
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    return found


def table(checks: Mapping[str, Any]) -> str:
    """Return the table of docs/bases.md: a line a family, a number where a stage is rejected, and their reasons."""
    from graftwork.base.support import STAGES

    reasons: list[str] = []
    lines = [f"| model | model_type | {' | '.join(STAGES)} |", f"|---|---|{'---|' * len(STAGES)}"]
    for family, check in checks.items():
        cells = [_cell(check["stages"][stage], reasons) for stage in STAGES]
        lines.append(f"| {family} | {check['model_type']} | {' | '.join(cells)} |")
    notes = "".join(f"\n{number}. {reason}" for number, reason in enumerate(reasons, 1))
    return "\n".join(lines) + f"\n\nReasons and notes:\n{notes}\n"


def _cell(found: Mapping[str, str], reasons: list[str]) -> str:
    text = {"supported": "yes", "rejected": "no", "untested": "?"}[found["status"]]
    if not (reason := found["reason"]):
        return text
    if reason not in reasons:
        reasons.append(reason)
    return f"{text} ({reasons.index(reason) + 1})"


def page(checks: Mapping[str, Any]) -> str:
    """Return docs/bases.md with this table."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    return before + BEGIN + table(checks) + END + rest.split(END)[1]


def main(arguments: Sequence[str]) -> None:
    """Print the table, or check families and write both files."""
    if "--write" not in arguments:
        sys.stdout.write(table(results()))
        return
    from graftwork.stages.base_check import check_base

    asked = [family for family in arguments if family != "--write"] or [*FAMILIES]
    checks = results()
    for family in asked:
        checks[family] = check_base(config_of(family)).as_dict()
        bad = {stage: one for stage, one in checks[family]["stages"].items() if one["status"] != "supported"}
        sys.stdout.write(f"{family}: {json.dumps(bad)}\n")
        sys.stdout.flush()
        ordered = {name: checks[name] for name in FAMILIES if name in checks}
        RESULTS.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(ordered), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
