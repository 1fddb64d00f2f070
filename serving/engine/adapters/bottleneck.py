"""Bottleneck adapters: a small two-layer network behind a linear, added to what the linear gives.

Behind the attention's and the MLP's last linear it is Houlsby's (arXiv 1902.00751), behind the MLP's alone Pfeiffer's
(arXiv 2005.00247). PEFT has no such kind, so its form on disk is defined here, after PEFT's own:

    adapter_config.json  peft_type "BOTTLENECK", bottleneck_size, activation (relu, gelu, silu, tanh), use_bias,
                         scaling, target_modules and exclude_modules as in PEFT, e.g. ["o_proj", "down_proj"]
    weights              base_model.model.MODULE.bottleneck_down.weight [size, out], .bottleneck_up.weight [out, size],
                         and with use_bias .bottleneck_down.bias [size], .bottleneck_up.bias [out]

    result + up(activation(down(result))) * scaling
"""

import re

import torch

from graftwork.errors import ArtifactError
from graftwork.serving.engine.adapters.base_view import BaseView
from graftwork.serving.engine.adapters.changes import AdapterWeights, SiteBottleneck
from graftwork.serving.engine.adapters.config_file import ConfigFile, Targets
from graftwork.serving.engine.adapters.tensor_file import MODULE_PREFIX, TensorFile

ACTIVATIONS = ("relu", "gelu", "silu", "tanh")
_KEY = re.compile(rf"^{re.escape(MODULE_PREFIX)}(?P<module>.+)\.bottleneck_down\.weight$")
_HONOURED = frozenset({"bottleneck_size", "activation", "use_bias", "scaling", "target_modules", "exclude_modules"})


def read_bottleneck(
    config: ConfigFile, tensors: TensorFile, base: BaseView, *, max_rank: int, dtype: torch.dtype
) -> AdapterWeights:
    """A network for each target. Its size counts as a rank."""
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
    modules = [match["module"] for match in map(_KEY.match, tensors.unread_names()) if match]
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
