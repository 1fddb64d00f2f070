"""Bottleneck adapters of one step: small networks behind a linear, each on the rows of its own adapter.

One adapter after the other: two small matmuls for each, and each linear that it stands behind.
"""

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from graftwork.serving.engine.adapters.changes import SiteBottleneck
from graftwork.serving.engine.lora import LoraSegment
from graftwork.serving.engine.sites import Deltas, LoraLayer
from graftwork.serving.engine.slots import LoadedAdapter

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}
Rows = torch.Tensor | slice


class StepBottlenecks:
    """Adds them to a linear's result, after the step's other changes. Stands in for those in `Sites`."""

    def __init__(self, rows: Sequence[tuple[LoadedAdapter, Rows]], then: Deltas | None) -> None:
        self._rows, self._then = rows, then

    def add(self, site: LoraLayer, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Changes the linear's own fresh output in place."""
        if self._then is not None:
            result = self._then.add(site, x, result)
        out_TO = result.view(-1, result.shape[-1])
        for weights, rows in self._rows:
            network = weights.bottlenecks.get(site.name)
            if network is not None:
                own_MO = out_TO[rows]
                out_TO[rows] = own_MO + _through(network, own_MO)
        return result


def bottlenecks_of(
    decoding: Sequence[LoadedAdapter | None],
    segments: Sequence[LoraSegment],
    then: Deltas | None,
    device: torch.device,
) -> StepBottlenecks | None:
    """decoding: the adapter of each decoding token. None: no row of the step has such an adapter."""
    own: dict[LoadedAdapter, list[int]] = {}
    for row, weights in enumerate(decoding):
        if weights is not None and weights.bottlenecks:
            own.setdefault(weights, []).append(row)
    rows: list[tuple[LoadedAdapter, Rows]] = [(one, torch.tensor(some, device=device)) for one, some in own.items()]
    rows += [(one.weights, slice(one.first, one.stop)) for one in segments if one.weights.bottlenecks]
    return StepBottlenecks(rows, then) if rows else None


def _through(network: SiteBottleneck, result_MO: torch.Tensor) -> torch.Tensor:
    inner_MR = functional.linear(result_MO, network.down_RO, network.down_bias_R)
    outer_MO = functional.linear(_ACTIVATIONS[network.activation](inner_MR), network.up_OR, network.up_bias_O)
    return outer_MO * network.scaling
