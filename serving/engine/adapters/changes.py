"""What an adapter changes in the base, kind by kind. A reader fills it from files; the engine applies it row by row.

Legend: R rank, I in, O out, K replaced rows, H hidden, N virtual tokens, V vocabulary, D head size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class LinearShape:
    """in and out features of one linear of the base."""

    in_features: int
    out_features: int


@dataclass(frozen=True)
class SiteWeights:
    """LoRA of one linear. a_RI: [rank, in], b_OR: [out, rank]; delta(x) = (x @ a.T @ b.T) * scaling.

    Both in the engine's dtype, or both in the narrower one that they were saved in: see `read_adapter`.
    """

    a_RI: torch.Tensor
    b_OR: torch.Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return int(self.a_RI.shape[0])

    def widened(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """a_RI and b_OR in the engine's dtype; the same tensors where they have it."""
        return self.a_RI.to(dtype), self.b_OR.to(dtype)


@dataclass(frozen=True)
class SiteScale:
    """Channels of one linear, multiplied: inputs by input_I, results by output_O (both fp32; None: left as they are).

    dora: the LoRA part, not multiplied, for prompts: `base + (output - 1) * (base - bias) + output * delta` is peft's
    order. bias_O is the base's, which DoRA leaves as it is and IA3 multiplies (None there).
    """

    input_I: torch.Tensor | None = None
    output_O: torch.Tensor | None = None
    bias_O: torch.Tensor | None = None
    dora: SiteWeights | None = None


@dataclass(frozen=True)
class SiteBottleneck:
    """A network behind one linear: `result + up(activation(down(result))) * scaling`."""

    down_RO: torch.Tensor
    down_bias_R: torch.Tensor | None
    up_OR: torch.Tensor
    up_bias_O: torch.Tensor | None
    activation: str
    scaling: float


@dataclass(frozen=True)
class InputRows:
    """Embedding rows that replace the base's."""

    rows_KH: torch.Tensor
    """As the embedding layer gives them out, its own scale included."""
    places: Mapping[int, int] | None
    """Row of each token id; None: rows_KH is a whole matrix, a row a token id."""


@dataclass(frozen=True)
class OutputRows:
    """Rows of the output layer that replace the base's."""

    rows_KH: torch.Tensor
    ids_K: torch.Tensor | None
    """Token ids of the rows; None: rows_KH is a whole matrix."""
    bias_V: torch.Tensor | None = None


@dataclass(frozen=True)
class VirtualTokens:
    """What stands before the first prompt token: `tokens` places of the KV row, either given or to be computed."""

    count: int
    keys: tuple[torch.Tensor, ...] = ()
    """A layer each, [Hkv, N, D]: prefix tuning. Empty: computed from embeddings_NH."""
    values: tuple[torch.Tensor, ...] = ()
    embeddings_NH: torch.Tensor | None = None
    """What goes in where word embeddings would: prompt tuning."""


@dataclass(frozen=True)
class AdapterWeights:
    """All that one adapter changes, on the CPU as its reader leaves it. Every part may be absent."""

    linears: Mapping[str, SiteWeights] = field(default_factory=dict)
    """By linear. For DoRA lora_B is already multiplied by the channel's scale."""
    scales: Mapping[str, SiteScale] = field(default_factory=dict)
    bottlenecks: Mapping[str, SiteBottleneck] = field(default_factory=dict)
    inputs: InputRows | None = None
    outputs: OutputRows | None = None
    virtual_tokens: VirtualTokens | None = None

    @property
    def rank(self) -> int:
        """Largest LoRA rank, or bottleneck, over its linears; 0 without either."""
        sizes = [site.rank for site in self.linears.values()]
        return max([*sizes, *(len(site.down_RO) for site in self.bottlenecks.values())], default=0)
