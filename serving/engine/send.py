"""Small host values on their way to the device."""

from typing import Any

import numpy
import numpy.typing
import torch


def send(values: numpy.typing.NDArray[Any], device: torch.device) -> torch.Tensor:
    """On the CPU the same memory; on a GPU a copy from pinned memory that the host does not wait for."""
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
