"""Predicts bytes for training and for serving from a spec and the model's config, in closed form, in milliseconds.

Weights, linear layers and adapters are counted on the real class (`graftwork.model_shape`). Activations are formulas of
decoders whose blocks are one attention and one MLP, as transformers 5.23, PEFT 0.21, TRL 1.16 and DeepSpeed 0.19 run
them; each term names what it counts, and other bases are refused by name (`ModelShape.unplanned`).
`benchmarks/memory_plan.py` compares them with measured peaks, `graftwork plan --replay` with the same step on tensors
without memory.
"""

from graftwork.memory.activations import saved_bytes
from graftwork.memory.serving import predict_embedding, predict_serving
from graftwork.memory.sizes import BF16, FP32, GIB, MIB, MemoryPlan, RowSizes
from graftwork.memory.training import micro_batch, predict_training
from graftwork.memory.weights import full_training_bytes, kv_bytes, trained_params, weight_bytes

__all__ = [
    "BF16",
    "FP32",
    "GIB",
    "MIB",
    "MemoryPlan",
    "RowSizes",
    "full_training_bytes",
    "kv_bytes",
    "micro_batch",
    "predict_embedding",
    "predict_serving",
    "predict_training",
    "saved_bytes",
    "trained_params",
    "weight_bytes",
]
