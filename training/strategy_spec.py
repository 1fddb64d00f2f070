"""How the workers of a run share model and optimizer."""

from typing import Literal

from graftwork.config import Spec


class StrategySpec(Spec):
    """No part of a run's identity: every strategy computes the same step."""

    kind: Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"] = "ddp"
    """ddp: a copy a worker. zero1/2/3: DeepSpeed shards optimizer / + gradients / + weights (arXiv 1910.02054)."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    offload_weights: Literal["none", "cpu", "nvme"] = "none"
    """zero3 alone can."""
    nvme_path: str | None = None
    """Folder on a fast disk of each machine, where something is offloaded to nvme."""
