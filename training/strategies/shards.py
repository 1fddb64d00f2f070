"""What a worker holds of the weights."""

from typing import Any

from torch.distributed.tensor import DTensor

from graftwork.training.strategy_rules import WEIGHTS_SHARDED


def held_bytes(model: Any) -> tuple[int, int]:
    """(bytes of the weights on this worker between passes, bytes of all weights). A tied weight counts once."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # FSDP2 keeps the head's weights whole after a pass forward
    here = whole = 0
    for parameter in model.parameters():
        part = getattr(parameter, "ds_tensor", None)  # ZeRO-3
        if part is None:
            part = parameter.to_local() if isinstance(parameter, DTensor) else parameter  # FSDP2
        here += part.numel() * part.element_size()
        whole += getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
    return here, whole


def notes(kind: str, model: Any, world: int) -> tuple[str, ...]:
    """What sharding came to; nothing where each worker holds all weights. After training began."""
    if kind not in WEIGHTS_SHARDED:
        return () if kind == "ddp" else (f"strategy={kind} on {world} workers",)
    here, whole = held_bytes(model)
    assert world == 1 or here < whole, f"{kind} sharded nothing"  # accelerate 1.15 does so on a CPU, silently
    return (
        f"strategy={kind}: each of {world} workers holds {here / whole:.0%} of the weights' {whole / 2**20:.1f} MiB",
    )
