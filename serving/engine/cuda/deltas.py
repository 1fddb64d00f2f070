"""The adapters of one decode step, added by the LoRA kernels."""

import torch

from graftwork.serving.engine.cuda.kernels.lora import expand, shrink
from graftwork.serving.engine.cuda.table import SlotTable
from graftwork.serving.engine.cuda.tiles import Tiles
from graftwork.serving.engine.sites import LoraLayer


class TableDeltas:
    """What `Sites` adds: one shrink for the linears of a group (q/k/v, gate/up), one expand each."""

    def __init__(self, tiles: Tiles, table: SlotTable) -> None:
        self._tiles, self._table = tiles, table
        self._group = ""
        self._input: torch.Tensor | None = None
        self._partial: torch.Tensor | None = None

    def add(self, site: LoraLayer, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Adds in place: `result` is the linear's own fresh output."""
        if self._partial is None or site.group != self._group or x is not self._input:
            self._group, self._input = site.group, x
            x_NI = x.reshape(-1, x.shape[-1])
            self._partial = shrink(x_NI, self._tiles, self._table, self._table.groups[site.group])
        out_NO = result.view(-1, result.shape[-1])
        expand(self._partial, self._tiles, self._table, self._table.sites[site.name], out_NO)
        return result
