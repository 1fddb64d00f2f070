"""Sizes of Llamas that tests plan for, counted on transformers' own class."""

from graftwork.base.model_shape import ModelShape


def llama(
    hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, intermediate: int, vocab: int, *, tied: bool
) -> ModelShape:
    """A Llama of these sizes."""
    return ModelShape.from_config(
        {
            "model_type": "llama",
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "intermediate_size": intermediate,
            "vocab_size": vocab,
            "tie_word_embeddings": tied,
            "dtype": "bfloat16",
        }
    )


SMOLLM2 = llama(576, 30, 9, 3, 64, 1536, 49152, tied=True)
"""HuggingFaceTB/SmolLM2-135M."""
LLAMA_8B = llama(4096, 32, 32, 8, 128, 14336, 128256, tied=False)
"""meta-llama/Llama-3.1-8B."""
LLAMA_13B = llama(5120, 40, 40, 40, 128, 13824, 32000, tied=False)
"""meta-llama/Llama-2-13b-hf."""
TEN_B = llama(4096, 48, 32, 8, 128, 14336, 32000, tied=False)
"""upstage/SOLAR-10.7B-v1.0."""
