"""Our spec in vLLM's words: the keyword arguments of `vllm.AsyncEngineArgs` (vLLM 0.29.0). Plain data."""

from pathlib import Path
from typing import Any

from graftwork.base_model import QuantSpec
from graftwork.errors import ConfigError
from graftwork.serving.spec import EngineSpec

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as `max_lora_rank`."""
BLOCK_TOKENS = 16
"""Tokens of one block of vLLM's key-value memory."""
HOST_ADAPTERS = 100_000
"""Versions in vLLM's host cache: more than fit, because residency bounds them by bytes and retires them itself. One
that vLLM dropped by its own rule would be read again from disk in the middle of a step."""
DEFAULTS_OF_VLLM = "vllm"
"""`generation_config`: the base's own sampling defaults are not taken over."""


def engine_arguments(folder: Path, spec: EngineSpec, quant: QuantSpec) -> dict[str, Any]:
    """Raises ConfigError for what vLLM cannot do as asked."""
    rank = next((rank for rank in RANKS if rank >= spec.max_rank), None)
    if rank is None:
        raise ConfigError(f"engine.max_rank={spec.max_rank}", "engine.kind=vllm", f"vLLM's ranks end at {RANKS[-1]}")
    return {
        "model": str(folder),
        "tokenizer": str(folder),
        "tensor_parallel_size": spec.tensor_parallel_size,
        "gpu_memory_utilization": spec.gpu_memory_utilization,
        "max_model_len": spec.max_seq_len,
        "max_num_seqs": spec.max_batch,
        "max_num_batched_tokens": spec.prefill_tokens + spec.max_batch,  # decoded rows count too
        "block_size": BLOCK_TOKENS,
        "num_gpu_blocks_override": -(-spec.kv_tokens // BLOCK_TOKENS),
        "enable_prefix_caching": spec.prefix_cache,
        "enable_lora": True,
        "max_loras": min(spec.max_loaded, spec.max_batch),
        "max_cpu_loras": HOST_ADAPTERS,
        "max_lora_rank": rank,
        "generation_config": DEFAULTS_OF_VLLM,
        "seed": 0,
        "dtype": "bfloat16" if quant.dtype == "auto" else quant.dtype,  # as on every GPU that our own engine serves on
        **_quantisation(quant),
    }


def _quantisation(quant: QuantSpec) -> dict[str, Any]:
    """vLLM's bitsandbytes (its plugin) quantises at the start, to nf4 with quantised scales, and to nothing else."""
    if quant.kind == "none":
        return {}
    if quant.kind == "int8":
        raise _other_weights("quant.kind=int8", "vLLM quantises to bitsandbytes' int8 no base that is not so on disk")
    if not quant.double_quant:
        rule = "vLLM's bitsandbytes always quantises the scales too; other scales are other weights"
        raise _other_weights("quant.double_quant=false", rule)
    if quant.resident == "dequantised":
        raise _other_weights("quant.resident=dequantised", "vLLM keeps nf4 packed")
    return {"quantization": "bitsandbytes", "load_format": "bitsandbytes"}


def _other_weights(asked: str, rule: str) -> ConfigError:
    move = "set quant.kind=none, or quant.kind=nf4 with double_quant=true, or engine.kind=graftwork"
    return ConfigError(asked, "engine.kind=vllm", rule, move)
