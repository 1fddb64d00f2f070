"""How adapters are merged: PEFT's methods, and what each of them takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftwork.errors import ArtifactError, ConfigError

SUMS = ("cat", "svd", "linear")
PRUNED = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
METHODS = (*SUMS, *PRUNED, *(f"{name}_svd" for name in PRUNED))
DENSITY = 0.5
_NO_SUM = {
    "use_dora": "DoRA's magnitudes are no part of a sum",
    "modules_to_save": "whole trained modules are not added",
    "trainable_token_indices": "trained token rows are not added",
    "lora_bias": "biases are not added",
    "rank_pattern": "ranks that differ by layer are not added",
    "alpha_pattern": "scales that differ by layer are not added",
}


@dataclass(frozen=True)
class MergeSpec:
    """One merge of n adapters."""

    method: str
    """cat: the weighted sum itself, as one adapter of all ranks together. svd: the nearest to it of a lower rank.
    linear: A and B summed on their own, so products of different adapters come in. ties, dare_*, magnitude_prune
    (arXiv 2306.01708, 2311.03099): small or random entries of A and B are dropped first, or with _svd those of the
    whole deltas."""
    weights: tuple[float, ...]
    density: float | None = None
    """Share of the entries that is kept; of the pruning methods."""
    rank: int | None = None
    """Of the result; of the methods that end in svd."""
    seed: int = 0
    """Of the entries that dare drops."""

    @classmethod
    def create(
        cls, method: str, count: int, weights: Sequence[float], density: float | None, rank: int | None, seed: int
    ) -> "MergeSpec":
        """Checked, defaults filled in: equal shares that sum to 1. Raises ConfigError."""
        if method not in METHODS:
            raise ConfigError(f"--method {method}", "no such method", f"methods are {', '.join(METHODS)}")
        if count < 2:
            raise ConfigError("merge", f"{count} adapter given", "a merge takes at least two", "name another one")
        if weights and len(weights) != count:
            raise ConfigError(
                f"--weights {','.join(f'{weight:g}' for weight in weights)}",
                f"{len(weights)} weights for {count} adapters",
                "one weight an adapter, in their order",
            )
        if not any(weights) and weights:
            raise ConfigError("--weights", "all are 0", "something must be left of the adapters")
        pruning = any(method.startswith(name) for name in PRUNED)
        if density is not None and not (pruning and 0 < density <= 1):
            rule = "a share above 0, up to 1" if pruning else f"it is of {', '.join(PRUNED)}"
            raise ConfigError(f"--density {density:g} with --method {method}", "it can't take effect", rule)
        if rank is not None and not (method.endswith("svd") and rank > 0):
            rule = "it is of the methods that end in svd, and above 0"
            raise ConfigError(f"--rank {rank} with --method {method}", "it can't take effect", rule)
        shares = tuple(weights) or (1 / count,) * count
        return cls(method, shares, density if density is not None else DENSITY if pruning else None, rank, seed)

    def record(self) -> dict[str, Any]:
        """As the manifest keeps it."""
        kept: dict[str, Any] = {"method": self.method, "weights": list(self.weights)}
        kept |= {"density": self.density} if self.density is not None else {}
        return kept | ({"seed": self.seed} if self.method.startswith("dare") else {})


def require_deltas(asked: str, config: Mapping[str, Any]) -> None:
    """Raise ArtifactError unless an adapter_config.json is that of plain deltas, which can be added up."""
    found, why = "", ""
    if config["peft_type"] != "LORA":
        found, why = f"it is {config['peft_type']}", "only LoRA's deltas of weights can be added up"
    for key, reason in _NO_SUM.items():
        if config.get(key):
            found, why = f"{key}={config[key]}", reason
    if found:
        raise ArtifactError(asked, found, why, "take plain LoRA adapters of one base, or train one on both data")
