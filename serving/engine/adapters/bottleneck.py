"""Bottleneck adapters (form on disk: `graftwork.adapters.bottleneck`): reader, and networks of one step."""

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from graftwork.adapters.bottleneck import ACTIVATIONS, DOWN_KEY
from graftwork.adapters.kind import MODULE_PREFIX
from graftwork.errors import ArtifactError
from graftwork.serving.engine.adapters.base_view import BaseView
from graftwork.serving.engine.adapters.format import AdapterWeights, ConfigFile, ReadOptions, SiteBottleneck, Targets
from graftwork.serving.engine.adapters.loaded import LoadedAdapter
from graftwork.serving.engine.adapters.weights_file import TensorFile
from graftwork.serving.engine.lora_layers import Deltas, LoraLayer, LoraSegment

_HONOURED = frozenset({"bottleneck_size", "activation", "use_bias", "scaling", "target_modules", "exclude_modules"})


def read(config: ConfigFile, tensors: TensorFile, base: BaseView, options: ReadOptions) -> AdapterWeights:
    """Return a network for each target. Its size counts as a rank."""
    max_rank, dtype = options.max_rank, options.dtype
    config.require_known(_HONOURED, (), {})
    size, targets = config.positive_int("bottleneck_size"), Targets.from_config(config)
    if size > max_rank:
        rule, move = f"sizes go up to engine.max_rank={max_rank}", f"raise engine.max_rank to {size}"
        raise ArtifactError(str(config.path), f"bottleneck_size={size}", rule, move)
    activation, scaling = config.values.get("activation"), config.values.get("scaling", 1.0)
    if activation not in ACTIVATIONS:
        raise config.make_error("activation", f"activations are {', '.join(ACTIVATIONS)}")
    if isinstance(scaling, bool) or not isinstance(scaling, int | float):
        raise config.make_error("scaling", "scaling is a number")
    modules = [match["module"] for match in tensors.match(DOWN_KEY)]
    targets.check(modules, base.linears, config, tensors.path)
    with_bias = bool(config.values.get("use_bias", True))
    networks = {}
    for module in modules:
        out, name = base.linears[module].out_features, f"{MODULE_PREFIX}{module}.bottleneck"
        networks[module] = SiteBottleneck(
            tensors.take(f"{name}_down.weight", (size, out), dtype),
            tensors.take(f"{name}_down.bias", (size,), dtype) if with_bias else None,
            tensors.take(f"{name}_up.weight", (out, size), dtype),
            tensors.take(f"{name}_up.bias", (out,), dtype) if with_bias else None,
            str(activation),
            float(scaling),
        )
    tensors.require_empty(f"{MODULE_PREFIX}MODULE.bottleneck_down and .bottleneck_up")
    if not networks:
        raise tensors.make_error("no tensors", "an adapter adapts at least one linear")
    return AdapterWeights(bottlenecks=networks)


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}
Rows = torch.Tensor | slice


class StepBottlenecks:
    """Adds the networks' results to a linear's, after the step's other changes. Takes the place of those in `Sites`.

    One adapter after the other: two small products for each, and each linear that has a network behind it.
    """

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
                inner_MR = functional.linear(own_MO, network.down_RO, network.down_bias_R)
                active_MR = _ACTIVATIONS[network.activation](inner_MR)
                outer_MO = functional.linear(active_MR, network.up_OR, network.up_bias_O)
                out_TO[rows] = own_MO + outer_MO * network.scaling
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
