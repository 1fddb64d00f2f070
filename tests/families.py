"""Decoder families of transformers, scaled down: the sizes of a config.json by `model_type`."""

from pathlib import Path
from typing import Any

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EQUAL_HEADS = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "head_dim")}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_local_experts": 4}
ROUTED = {
    **EXPERTS,
    "n_routed_experts": 4,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
}
WINDOW = {"sliding_window": 24}
BOTH = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
PER_LAYER = {**BOTH, "vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "qwen2": SIZES,
    "qwen3": SIZES,
    "mistral": {**SIZES, **WINDOW},
    "ministral3": SIZES,
    "gemma": SIZES,
    "gemma2": {**SIZES, **WINDOW, "query_pre_attn_scalar": 16},
    "gemma3_text": {**SIZES, **BOTH, "query_pre_attn_scalar": 16},
    "gemma3": {"text_config": {**SIZES, **BOTH}, "vision_config": TOWER, "mm_tokens_per_image": 4},
    "gemma3n_text": {
        **SIZES,
        **PER_LAYER,
        "laurel_rank": 8,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_text": {**SIZES, **PER_LAYER, "global_head_dim": 16},
    "phi": SIZES,
    "phi3": SIZES,
    "smollm3": SIZES,
    "granite": {**SIZES, "logits_scaling": 4.0, "attention_multiplier": 0.2},
    "olmo2": SIZES,
    "olmo3": {**SIZES, **WINDOW},
    "cohere": SIZES,
    "cohere2": {**SIZES, **WINDOW},
    "starcoder2": SIZES,
    "stablelm": SIZES,
    "nemotron": SIZES,
    "exaone4": {**SIZES, **WINDOW},
    "ernie4_5": SIZES,
    "glm4": SIZES,
    "hunyuan_v1_dense": SIZES,
    "gpt_neox": EQUAL_HEADS,
    "gpt2": {**EQUAL_HEADS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "opt": {**EQUAL_HEADS, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "mixtral": {**SIZES, **EXPERTS},
    "qwen3_moe": {**SIZES, **EXPERTS, "mlp_only_layers": []},
    "olmoe": {**SIZES, **EXPERTS},
    "phimoe": {**SIZES, **EXPERTS},
    "granitemoe": {**SIZES, **EXPERTS},
    "gpt_oss": {**SIZES, **WINDOW, **EXPERTS},
    "glm4_moe": {**SIZES, **ROUTED},
    "deepseek_v3": {
        **EQUAL_HEADS,
        **ROUTED,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
    },
    "llama4_text": {
        **SIZES,
        **EXPERTS,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 96,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 32,
    },
    "qwen3_next": {**SIZES, **EXPERTS, **LINEAR, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": {**SIZES, **LINEAR},
    "lfm2": {**SIZES, "layer_types": ["conv", "full_attention"]},
    "bamba": {**SIZES, **MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **SIZES,
        **MAMBA,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 96,
        "layer_types": ["mamba", "attention"],
    },
    "falcon_h1": {
        **SIZES,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
    },
    "mamba2": {**SIZES, "num_heads": 8, "state_size": 16, "n_groups": 1, "expand": 2},
}


def config_of(kind: str) -> dict[str, Any]:
    """The config.json of a family scaled down."""
    return {"model_type": kind, **FAMILIES[kind]}


def write_family(folder: Path, kind: str, *, dtype: Any = None, max_shard_size: str = "50GB", **sizes: Any) -> Path:
    """Write the family's random weights and a tokenizer as a base, and return `folder`. sizes: in place of its own."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.tiny import write_tiny_tokenizer

    write_tiny_tokenizer(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**FAMILIES[kind], **sizes}), dtype=dtype)
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
