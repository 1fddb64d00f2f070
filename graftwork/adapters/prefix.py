"""Prefix tuning: trained keys and values before every sequence."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from graftwork.adapters.kind import AdapterKind, ValueBytes

if TYPE_CHECKING:
    from peft import PrefixTuningConfig

    from graftwork.base.model_shape import ModelShape

EMBEDDINGS_KEY = "prompt_embeddings"
"""Name of the one tensor: [tokens, layers * 2 * KV heads * head size]."""


class PrefixSpec(AdapterKind):
    """Trained keys and values before every sequence (prefix tuning, arXiv 2101.00190)."""

    peft_type: ClassVar[str] = "PREFIX_TUNING"
    trains_matrices: ClassVar[bool] = False
    learning_rates: ClassVar[tuple[float, float]] = (1e-3, 1e-1)
    """Measured on SmolLM2-135M, short runs (docs/guide-training.md): 1e-2."""

    kind: Literal["prefix"] = "prefix"
    tokens: int = Field(default=16, ge=1, le=1024)
    """Virtual tokens."""

    @property
    def virtual_tokens(self) -> int:
        return self.tokens

    def describe(self) -> str:
        """Return the adapter in a few words."""
        return f"prefix of {self.tokens}"

    def peft_config(self, model: Any) -> "PrefixTuningConfig":
        """Return PEFT's prefix tuning."""
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(num_virtual_tokens=self.tokens, task_type="CAUSAL_LM")

    def begin(self, attached: Any) -> None:
        """Start from keys and values of real words, drawn at random: the paper's remedy against a slow start.

        PEFT starts from noise, unlike any input of the base: tiny or large, it draws the attention or none of it.
        """
        import torch
        from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values

        base = attached.get_base_model()
        with torch.no_grad():
            ids_1P = torch.randint(base.config.vocab_size, (1, self.tokens)).to(base.device)
            past = base(input_ids=ids_1P, attention_mask=torch.ones_like(ids_1P), use_cache=True).past_key_values
            initialize_kv_prefix_from_past_key_values(attached, past_key_values=past, num_virtual_tokens=self.tokens)

    def trained_params(self, model: "ModelShape") -> int:
        """Return the keys and values of the virtual tokens in all layers."""
        return model.layers * 2 * model.kv_heads * model.head_dim * self.tokens

    def saved_bytes(self, model: "ModelShape", size: ValueBytes) -> float:
        """Return 0: the longer keys, values and mask are counted with the frozen block."""
        return 0
