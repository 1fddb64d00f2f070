"""One decode step as the model sees it: packed tokens, one a request, and attention over each request's own KV.

Legend: N rows of the step (padding included), H query heads, K key-value heads, D head size.
"""

import torch

from graftwork.serving.engine.attention import Call
from graftwork.serving.engine.cuda.inputs import StepInputs
from graftwork.serving.engine.cuda.kernels import attention
from graftwork.serving.engine.kv import KvStore


class DecodeBatch:
    """Stands for a `StepBatch` in the model's keyword arguments; everything it reads has a fixed address."""

    def __init__(self, inputs: StepInputs, rows: int, kv: KvStore) -> None:
        self.ids_1T, self.positions_1T = inputs.ids_1N(rows), inputs.positions_1N(rows)
        self._places, self._kv = inputs.places(rows), kv

    def attend(
        self, call: Call, query_1HND: torch.Tensor, key_1KND: torch.Tensor, value_1KND: torch.Tensor
    ) -> torch.Tensor:
        """Writes the new keys and values, then attends. Returns [N, H, D]."""
        q_NHD, k_NKD, v_NKD = (_rows(part) for part in (query_1HND, key_1KND, value_1KND))
        keys, values = self._kv.keys[call.layer], self._kv.values[call.layer]
        attention.write_kv(keys, values, k_NKD, v_NKD, self._places)
        return attention.attend(
            q_NHD, keys, values, k_NKD.shape[1], self._places,
            longest=self._kv.classes[-1], scale=call.scale, window=call.window, softcap=call.softcap,
        )  # fmt: skip


def _rows(part_1HND: torch.Tensor) -> torch.Tensor:
    """[1, H, N, D] -> [N, H, D] with a contiguous last dimension; a view where it is one already."""
    part_NHD = part_1HND[0].transpose(0, 1)
    return part_NHD if part_NHD.stride(-1) == 1 else part_NHD.contiguous()
