"""Sizes of a base model, read from its config.json without loading it: what memory and time are predicted from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from graftwork.errors import BaseModelError

NEEDED_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
Targets = Literal["all-linear", "attention", "mlp"]


@dataclass(frozen=True)
class Linear:
    """One linear layer of a block: y_O = W_OI x_I."""

    name: str
    inputs: int
    outputs: int

    @property
    def params(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a dense decoder with gated MLP, as its config.json names them."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    """The head is the embedding."""
    file_bytes: int = 2
    """Bytes of a weight in the checkpoint's file."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelShape":
        """From a Hugging Face config.json. Raises BaseModelError for an architecture that the formulas do not cover."""
        if any(key in config for key in ("num_experts", "num_local_experts", "n_routed_experts", "text_config")):
            raise _uncovered(config, "experts or a nested text model")
        missing = [key for key in NEEDED_KEYS if key not in config]
        if missing:
            raise _uncovered(config, f"no {', '.join(missing)} in its config.json")
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return cls(
            hidden=hidden,
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            intermediate=int(config["intermediate_size"]),
            vocab=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            file_bytes=4 if (config.get("dtype") or config.get("torch_dtype")) == "float32" else 2,
        )

    @property
    def q_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def attention(self) -> tuple[Linear, ...]:
        return (
            Linear("q_proj", self.hidden, self.q_size),
            Linear("k_proj", self.hidden, self.kv_size),
            Linear("v_proj", self.hidden, self.kv_size),
            Linear("o_proj", self.q_size, self.hidden),
        )

    @property
    def mlp(self) -> tuple[Linear, ...]:
        return (
            Linear("gate_proj", self.hidden, self.intermediate),
            Linear("up_proj", self.hidden, self.intermediate),
            Linear("down_proj", self.intermediate, self.hidden),
        )

    def targets(self, which: Targets) -> tuple[Linear, ...]:
        """The linears of one block that get an adapter."""
        return {"all-linear": self.attention + self.mlp, "attention": self.attention, "mlp": self.mlp}[which]

    @property
    def linear_params(self) -> int:
        """Weights of the blocks' linears: what is quantised, and the N of the FLOP count."""
        return self.layers * sum(linear.params for linear in self.attention + self.mlp)

    @property
    def head_params(self) -> int:
        return self.vocab * self.hidden

    @property
    def plain_params(self) -> int:
        """Embedding, head and norms: never quantised."""
        return self.head_params * (1 if self.tied else 2) + self.hidden * (2 * self.layers + 1)

    @property
    def params(self) -> int:
        return self.linear_params + self.plain_params

    def adapter_params(self, rank: int, which: Targets = "all-linear") -> int:
        """A (r x in) and B (out x r) of each target."""
        return self.layers * sum(rank * (linear.inputs + linear.outputs) for linear in self.targets(which))


def _uncovered(config: Mapping[str, Any], found: str) -> BaseModelError:
    return BaseModelError(
        f"plan for model_type={config.get('model_type')!r}",
        found,
        "memory is predicted for dense decoders with gated MLP (Llama, Mistral, Qwen, SmolLM2)",
        "run without a plan, and watch the first step's peak",
    )
