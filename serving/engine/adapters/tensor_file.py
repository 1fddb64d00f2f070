"""adapter_model.safetensors as data: named tensors that are taken out one by one; what is left over is refused."""

from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from graftwork.artifact_check import WEIGHTS_FILE
from graftwork.errors import ArtifactError
from graftwork.serving.engine.adapter_bytes import read_tensors

MODULE_PREFIX = "base_model.model."


class TensorFile:
    """The tensors of one adapter. `path` begins its errors."""

    def __init__(self, folder: Path, sha256: str | None = None) -> None:
        self.path = folder / WEIGHTS_FILE
        self._left = read_tensors(self.path, sha256)

    def unread_names(self) -> list[str]:
        """Names of the tensors that nobody has taken yet."""
        return list(self._left)

    def holds(self, key: str) -> bool:
        """Whether the tensor is there and not taken yet."""
        return key in self._left

    def take(
        self, key: str, shape: Sequence[int], dtype: torch.dtype, keep: Collection[torch.dtype] = ()
    ) -> torch.Tensor:
        """Takes a tensor of that shape out, in `dtype` unless it has one of `keep`. Raises ArtifactError."""
        if key not in self._left:
            raise self.make_error(f"no tensor {key}", "the config asks for it")
        tensor = self._left.pop(key)
        if tuple(tensor.shape) != tuple(shape):
            rule, move = f"this base needs {list(shape)}", "serve the adapter on the base it was trained on"
            raise self.make_error(f"{key} {list(tensor.shape)}", rule, move)
        return tensor if tensor.dtype in keep else tensor.to(dtype)

    def require_empty(self, expected: str) -> None:
        """Refuses tensors that nobody took. expected: what the weights may hold."""
        if self._left:
            raise self.make_error(
                f"tensor {min(self._left)} ({len(self._left)} such)", f"the weights hold only {expected}"
            )

    def make_error(self, found: str, rule: str, hint: str = "publish the adapter again") -> ArtifactError:
        """The error for something in the file."""
        return ArtifactError(str(self.path), found, rule, hint)
