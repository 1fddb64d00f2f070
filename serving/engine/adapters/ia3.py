"""(IA)^3 (arXiv 2205.05638): trained factors on the results of some linears and on the inputs of others.

The reference is peft 0.21 (`peft/tuners/ia3/`).
"""

import re

import torch

from graftwork.serving.engine.adapters.base_view import BaseView
from graftwork.serving.engine.adapters.changes import AdapterWeights, SiteScale
from graftwork.serving.engine.adapters.config_file import ConfigFile, Names, Targets
from graftwork.serving.engine.adapters.rows import ROW_KEYS, replaced_rows
from graftwork.serving.engine.adapters.tensor_file import MODULE_PREFIX, TensorFile

_FACTOR_KEY = re.compile(rf"^{re.escape(MODULE_PREFIX)}(?P<module>.+)\.ia3_l$")
_HONOURED = ROW_KEYS | {"target_modules", "exclude_modules", "feedforward_modules"}
_WITHOUT_EFFECT_HERE = frozenset({"init_ia3_weights"})
_WHY_REFUSED = {"fan_in_fan_out": "the base's linears store [out, in]"}


def read_ia3(config: ConfigFile, tensors: TensorFile, base: BaseView, *, dtype: torch.dtype) -> AdapterWeights:
    """Factors stay fp32, as peft holds them."""
    config.require_known(_HONOURED, _WITHOUT_EFFECT_HERE, _WHY_REFUSED)
    targets, feedforward = Targets.from_config(config), config.optional_names("feedforward_modules")
    inputs, outputs = replaced_rows(config, tensors, base, dtype)
    modules = [match["module"] for match in map(_FACTOR_KEY.match, tensors.unread_names()) if match]
    targets.check(modules, base.linears, config, tensors.path)
    scales = {
        module: _scale(module, tensors, base, on_input=_is_feedforward(feedforward, module)) for module in modules
    }
    tensors.require_empty(f"{MODULE_PREFIX}MODULE.ia3_l, and what the config names")
    if not scales:
        raise tensors.make_error("no tensors", "an adapter adapts at least one linear")
    return AdapterWeights(scales=scales, inputs=inputs, outputs=outputs)


def _scale(module: str, tensors: TensorFile, base: BaseView, *, on_input: bool) -> SiteScale:
    shape = base.linears[module]
    wanted = (1, shape.in_features) if on_input else (shape.out_features, 1)
    factor = tensors.take(f"{MODULE_PREFIX}{module}.ia3_l", wanted, torch.float32).flatten()
    return SiteScale(input_I=factor) if on_input else SiteScale(output_O=factor)


def _is_feedforward(names: Names, module: str) -> bool:
    """peft's rule: a bare suffix, not one that begins at a dot."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module.endswith(name) for name in names)
