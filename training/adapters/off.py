"""The base that lies under a trained adapter: a reference model, and the figures "before", without a second copy."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel

from graftwork.errors import ConfigError


@contextmanager
def adapter_disabled(model: Any) -> Iterator[None]:
    """Inside it the model of `attach`, or a trainer's wrapping of it, answers as the base does; every kind but full.

    Gradients of what runs inside do not reach the adapter. Raises ConfigError where all weights are trained.
    """
    inner = model
    while not isinstance(inner, PeftModel) and hasattr(inner, "module"):
        inner = inner.module  # DistributedDataParallel, DeepSpeed's engine
    if not isinstance(inner, PeftModel):
        raise ConfigError(
            "the base under adapter.kind=full",
            "training all weights leaves no base behind",
            "a base is kept beside an adapter alone",
            "set adapter.kind=lora, or load the base a second time",
        )
    with inner.disable_adapter():
        yield
