"""What is trained: all weights, or one of the adapters. The fields are those of the papers and of PEFT."""

from typing import Annotated, Any, Literal

from pydantic import Field

from graftwork.config import Spec

Targets = Literal["all-linear", "attention", "mlp"]


class LoraSpec(Spec):
    """A low-rank adapter (Hu et al. 2021, arXiv 2106.09685), attached and exported by PEFT."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(default=16, ge=1, le=256)
    """Inner dimension r of the update B·A."""
    alpha: float = Field(default=32.0, gt=0)
    """Scale: the update is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input while training."""
    targets: Targets = "all-linear"
    """Which linear layers get an adapter; the head never does."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank): steady at high ranks (rsLoRA, arXiv 2312.03732)."""
    dora: bool = False
    """Train the magnitude of each output beside its direction (DoRA, arXiv 2402.09353)."""

    def describe(self) -> str:
        """Return the adapter as text."""
        return f"{'rs' * self.rslora}LoRA{' with DoRA' * self.dora} r{self.rank}"


class FullSpec(Spec):
    """All weights, in fp32. The run ends in a new base, `<root>/bases/<name>/<version>`, rather than an adapter."""

    kind: Literal["full"] = "full"

    def describe(self) -> str:
        """Return the adapter as text."""
        return "all weights"


class Ia3Spec(Spec):
    """Learned scales of keys, values and the MLP's inner activations (IA3, arXiv 2205.05638)."""

    kind: Literal["ia3"] = "ia3"

    def describe(self) -> str:
        """Return the adapter as text."""
        return "IA3"


class PrefixSpec(Spec):
    """Trained keys and values before every sequence (prefix tuning, arXiv 2101.00190)."""

    kind: Literal["prefix"] = "prefix"
    tokens: int = Field(default=16, ge=1, le=1024)
    """Virtual tokens."""

    def describe(self) -> str:
        """Return the adapter as text."""
        return f"prefix of {self.tokens}"


class BottleneckSpec(Spec):
    """Small two-layer networks inside each block (Houlsby, arXiv 1902.00751; Pfeiffer, arXiv 2005.00247)."""

    kind: Literal["bottleneck"] = "bottleneck"
    placement: Literal["houlsby", "pfeiffer"] = "pfeiffer"
    """houlsby: behind the attention's and the MLP's output; pfeiffer: behind the MLP's alone."""
    size: int = Field(default=48, ge=1)
    """Width of the hidden layer."""
    activation: Literal["relu", "gelu", "silu", "tanh"] = "gelu"

    def describe(self) -> str:
        """Return the adapter as text."""
        return f"{self.placement.capitalize()} bottleneck of {self.size}"


AdapterSpec = Annotated[LoraSpec | FullSpec | Ia3Spec | PrefixSpec | BottleneckSpec, Field(discriminator="kind")]


def with_kind(tree: Any, key: str, default: str) -> Any:
    """The tree of a spec with `key.kind` set where the key is given without a kind."""
    given = tree.get(key) if isinstance(tree, dict) else None
    if isinstance(given, dict) and "kind" not in given:
        return {**tree, key: {"kind": default, **given}}
    return tree
