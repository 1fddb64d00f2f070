"""A base of the structure of another and of a thousandth of its size: random weights, a tokenizer of bytes.

`scale_down` keeps the kinds of layers, the grouping of heads, experts, towers, windows and every switch of a
config.json, and replaces its widths and counts. `graftwork base check` runs the stages on such a base.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HIDDEN, HEADS, HEAD_DIM, VOCAB = 64, 4, 16, 512
MOST_LAYERS = 4
WEIGHT_RANGE = 0.2
"""Standard deviation of the weights: with the usual 0.02 the greedy tokens of a random model depend on rounding."""
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LEFT_OUT = ("dtype", "torch_dtype", "quantization_config", "auto_map", "architectures", "_name_or_path")

_SIZES = {
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "intermediate_size_mlp"), 96),
    "shared_intermediate_size": 96,
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("head_dim", "global_head_dim", "query_pre_attn_scalar", "rotary_dim"), HEAD_DIM),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    "qk_head_dim": 16,
    **dict.fromkeys(("mamba_d_head", "mamba_d_state", "state_size", "mamba_d_ssm"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "sliding_window": 24,
    "attention_chunk_size": 256,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    "mm_tokens_per_image": 4,
}
"""Largest value of a key of the text decoder."""
_EACH = {key: most for key, most in _SIZES.items() if key != "head_dim"}
_TOWER = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "d_model", "embed_dim", "projection_dim", "output_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "depth", "num_layers", "conf_num_hidden_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads", "conf_num_attention_heads"), 2),
    "head_dim": 16,
    "image_size": 28,
}
_DROPOUT = "drop"
"""Part of the names of dropout's shares, which are set to 0: losses of two runs are compared."""
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
_HEAD_COUNTS = ("num_attention_heads", "n_head")
_LAYER_PLACES = ("attn_layer_indices", "full_attn_idxs", "mlp_only_layers", "moe_layers")
"""Lists of the numbers of layers."""
_LEADING = ("first_k_dense_replace", "num_dense_layers")
"""Counts of the first layers, which differ from the others."""
_TRAILING = ("num_kv_shared_layers",)


def scale_down(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of the small base. `config` has the keys of its class, defaults included."""
    small = {key: value for key, value in config.items() if key not in LEFT_OUT}
    for key, value in config.items():
        if isinstance(value, Mapping) and key.endswith("_config"):
            small[key] = _decoder(value) if key == "text_config" else _shrink(value, _TOWER)
    return _decoder(small) if "text_config" not in small else _shrink(small, {"mm_tokens_per_image": 4})


def full_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json with the values that its class in transformers adds. Raises ValueError, KeyError."""
    from tempfile import TemporaryDirectory

    from transformers import AutoConfig

    given = {key: value for key, value in config.items() if key not in LEFT_OUT}
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(given), encoding="utf-8")
        whole: dict[str, Any] = AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()
    return whole


def write_scaled_base(config: Mapping[str, Any], folder: Path, seed: int = 0) -> Path:
    """Write the small base of the base with this config.json to `folder`, and return it.

    Raises BaseModelError where transformers cannot build it.
    """
    import torch
    from transformers.utils import logging

    from graftwork.base.meta_model import model_from

    logging.disable_progress_bar()
    write_byte_tokenizer(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_from(scale_down(full_config(config)))
    for parameter in model.parameters():
        if not torch.isfinite(parameter).all():  # left as it was allocated
            torch.nn.init.normal_(parameter, std=WEIGHT_RANGE)
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(folder)
    return folder


def write_byte_tokenizer(folder: Path) -> Path:
    """Write a tokenizer with one token a byte, ChatML's special tokens and its template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIALS, *letters]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIALS[1],
        "eos_token": SPECIALS[2],
        "pad_token": SPECIALS[2],
        "model_max_length": 2048,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    return folder


def _decoder(config: Mapping[str, Any]) -> dict[str, Any]:
    """A text decoder scaled down: widths by `_SIZES`, heads in groups as before, one layer of each kind."""
    small = _shrink(config, _SIZES)
    heads = next((int(config[key]) for key in _HEAD_COUNTS if config.get(key)), HEADS)
    for key in _HEAD_COUNTS:
        if config.get(key):
            small[key] = HEADS
    if groups := config.get("num_key_value_heads"):
        small["num_key_value_heads"] = HEADS if groups == heads else min(int(groups), 2)
    if groups := config.get("num_global_key_value_heads"):
        small["num_global_key_value_heads"] = min(int(groups), 2)
    if config.get("qk_rope_head_dim") and "head_dim" in small:
        small["head_dim"] = small["qk_rope_head_dim"]
    if config.get("mamba_n_heads"):  # their widths are the inner width
        inner = int(config.get("mamba_expand") or 2) * HIDDEN
        if config.get("mamba_d_ssm"):
            inner = small["mamba_d_ssm"] = HIDDEN
        small["mamba_n_heads"] = inner // small["mamba_d_head"]
    if config.get("state_size") and config.get("num_heads"):  # Mamba-2
        small["num_heads"] = int(config.get("expand") or 2) * HIDDEN // small["head_dim"]
    small["initializer_range"] = WEIGHT_RANGE
    small |= dict.fromkeys((key for key, value in config.items() if _DROPOUT in key and isinstance(value, float)), 0.0)
    small |= {"pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    turning = int(small.get("head_dim") or HEAD_DIM)
    _keep_layers(config, small)
    return {key: _rotary(value, turning) if key.startswith("rope_") else value for key, value in small.items()}


def _keep_layers(config: Mapping[str, Any], small: dict[str, Any]) -> None:
    """Keep one layer of each kind, two at least and `MOST_LAYERS` at most, in the model's order."""
    name = next((key for key in _LAYER_COUNTS if config.get(key)), None)
    if name is None:
        return
    layers = int(config[name])
    lists = [key for key, value in config.items() if isinstance(value, Sequence) and len(value) == layers]
    lists = [key for key in lists if key not in _LAYER_PLACES and not isinstance(config[key], str)]
    places = [key for key in _LAYER_PLACES if isinstance(config.get(key), Sequence)]
    leading = [key for key in _LEADING if config.get(key)]
    trailing = [key for key in _TRAILING if config.get(key)]
    each: Mapping[str, Mapping[str, Any]] = config.get("per_layer_config") or {}

    def kind_of(layer: int) -> tuple[object, ...]:
        return (
            *(json.dumps(config[key][layer]) for key in lists),
            *(layer in config[key] for key in places),
            *(layer < config[key] for key in leading),
            *(layer >= layers - config[key] for key in trailing),
            *(json.dumps(value) for place, value in each.items() if int(place) == layer),
        )

    kinds: dict[tuple[object, ...], int] = {}
    for layer in range(layers):
        kinds.setdefault(kind_of(layer), layer)
    chosen = sorted(kinds.values())[:MOST_LAYERS]
    step = min(2, int(config.get("interleave_moe_layer_step") or config.get("decoder_sparse_step") or 1))
    for layer in range(layers):
        if len(chosen) < max(2, step) and layer not in chosen:
            chosen.append(layer)
    chosen.sort()
    small[name] = len(chosen)
    for key in lists:
        small[key] = [small[key][layer] for layer in chosen]
    for key in places:
        small[key] = [place for place, layer in enumerate(chosen) if layer in config[key]]
    if each:
        ratio = HEAD_DIM / int(config.get("head_dim") or HEAD_DIM)
        small["per_layer_config"] = {
            str(chosen.index(int(layer))): {
                key: int(one * ratio) if key == "head_dim" else one for key, one in _shrink(values, _EACH).items()
            }
            for layer, values in each.items()
            if int(layer) in chosen
        }
    for key in leading:
        small[key] = sum(layer < config[key] for layer in chosen)
    for key in trailing:
        small[key] = sum(layer >= layers - config[key] for layer in chosen)


def _shrink(config: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """The values of the keys in `sizes`, and those of lists there, no larger than theirs."""
    small = dict(config)
    for key, most in sizes.items():
        value = config.get(key)
        if isinstance(value, list) and all(isinstance(one, int) for one in value):
            small[key] = [min(one, most) for one in value]
        elif isinstance(value, int) and not isinstance(value, bool):
            small[key] = min(value, most)
    return small


def _rotary(value: Any, turning: int) -> Any:
    """Rotary parameters of a head of `turning` values: factors by frequency cut, sections of the axes scaled."""
    if not isinstance(value, Mapping):
        return value
    small = {key: _rotary(one, turning) for key, one in value.items()}
    pairs = int(turning * float(value.get("partial_rotary_factor") or 1.0)) // 2
    for key in ("short_factor", "long_factor"):
        if isinstance(value.get(key), list):
            small[key] = value[key][:pairs]
    if isinstance(value.get("mrope_section"), list):
        sections = [pairs * one // sum(value["mrope_section"]) for one in value["mrope_section"]]
        sections[0] += pairs - sum(sections)
        small["mrope_section"] = sections
    return small
