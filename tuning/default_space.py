"""What a sweep tries where its spec names no space: the learning rate, and of a LoRA the rank."""

from graftwork.training.adapter_spec import AdapterSpec
from graftwork.tuning.space_spec import LogUniform, PowerOfTwo, Space

RATES = {
    "full": (1e-5, 1e-3),
    "lora": (1e-4, 1e-2),
    "bottleneck": (1e-4, 1e-2),
    "ia3": (1e-3, 1e-1),
    "prefix": (1e-3, 1e-1),
}
"""Learning rates by kind of adapter, two decades each.

LoRA's best rate is about ten times that of all weights (Schulman 2025, "LoRA Without Regret"; fifteen times in runs of
under 100 steps), and all weights of instruction-tuned models are usually trained at 1e-5 to 1e-4, small models higher.
Bottlenecks: Houlsby et al. (arXiv 1902.00751) tried 3e-5 to 3e-3, AdapterHub takes 1e-4. IA3: 3e-3 in its paper (arXiv
2205.05638). Each range holds the rate that docs/guide-training.md measured with on SmolLM2-135M, short runs: all
weights 2e-4, LoRA 4e-3, bottlenecks 2e-3, IA3 2e-2, prefix 1e-2.
"""
RANKS = (2, 64)
"""Capacity goes with the rank, so powers of two; a few thousand rows fit into 64 (the same source)."""


def default_space(adapter: AdapterSpec) -> Space:
    """For the adapter that is trained."""
    low, high = RATES[adapter.kind]
    space: Space = {"optim.lr": LogUniform(low=low, high=high)}
    if adapter.kind == "lora":
        space["adapter.rank"] = PowerOfTwo(low=RANKS[0], high=RANKS[1])
    return space
