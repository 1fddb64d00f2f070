"""LoRA, rank-stabilised LoRA, per-module ranks, DoRA. The reference is peft 0.21 (`peft/tuners/lora/`).

DoRA (arXiv 2402.09353): each output channel of `W + scaling * B A` has a trained length, its magnitude. The channel's
own length is computed once at load, so that decoding multiplies each channel by `magnitude / length`; peft computes it
at every forward pass. Cost of the load: one product [out, rank] x [rank, in] and a norm per linear.
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from graftwork.adapters.experts import file_modules
from graftwork.adapters.kind import MODULE_PREFIX
from graftwork.adapters.lora import HALF_KEY, MAGNITUDE_KEY
from graftwork.errors import ArtifactError
from graftwork.serving.engine.adapters.base_view import BaseView
from graftwork.serving.engine.adapters.format import (
    AdapterWeights,
    ConfigFile,
    ExpertLora,
    ReadOptions,
    SiteScale,
    SiteWeights,
    Targets,
    is_positive,
    matches_module,
)
from graftwork.serving.engine.adapters.token_rows import ROW_KEYS, replaced_rows
from graftwork.serving.engine.adapters.weights_file import TensorFile


def rescaled(
    site: SiteWeights, magnitude_O: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None
) -> tuple[SiteWeights, SiteScale]:
    """The LoRA part, lora_B multiplied by the channel's scale, and the scale itself. weight_OI: the base's, fp32."""
    a_RI, b_OR = (half.float().to(weight_OI.device) for half in (site.a_RI, site.b_OR))
    delta_OI = linear(a_RI.t(), b_OR).t()  # peft's product, without its unit matrix
    length_O = torch.linalg.norm(weight_OI + site.scaling * delta_OI, dim=1).to(magnitude_O.device)
    scale_O = magnitude_O / length_O
    folded = SiteWeights(site.a_RI, (scale_O[:, None] * site.b_OR.float()).to(site.b_OR.dtype), site.scaling)
    return folded, SiteScale(output_O=scale_O, bias_O=bias_O, dora=site)


_EXPECTED = f"{MODULE_PREFIX}MODULE.lora_A.weight and .lora_B.weight, and what the config names"
_HONOURED = frozenset(
    {"r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"}
    | {"target_parameters"}
    | {"layers_to_transform", "layers_pattern", "init_lora_weights"}
    | ROW_KEYS
)
_WITHOUT_EFFECT_HERE = frozenset(
    {"lora_dropout", "fan_in_fan_out", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"}
    | {"qalora_group_size", "runtime_config"}
)
"""Training and bookkeeping only. `fan_in_fan_out`: the base's linears store [in, out], which the tensors of a LoRA do
not depend on. `loftq_config` and its kin act through `init_lora_weights`, which is checked."""
_NEUTRAL_INIT = (True, False, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the base weights as they are; pissa, olora, corda, loftq, ... change the base itself."""
_WHY_REFUSED = {
    "bias": "trained biases would replace the base's for every request",
    "lora_bias": "a bias on lora_B is not applied",
    "layer_replication": "replicated layers make another base model",
    "alora_invocation_tokens": "activated LoRA switches on in the middle of a sequence",
    "megatron_config": "Megatron's parallel linears are not used here",
}


@dataclass(frozen=True)
class LoraSettings:
    """The keys of adapter_config.json that decide the delta."""

    rank: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]

    @classmethod
    def from_config(cls, config: ConfigFile) -> "LoraSettings":
        """Refuses every key that this engine cannot honour."""
        values = config.values
        if values.get("init_lora_weights", True) not in _NEUTRAL_INIT:
            why = "this initialisation changes the base weights; convert the adapter to plain LoRA when saving it"
            raise config.make_error("init_lora_weights", why)
        config.require_known(_HONOURED, _WITHOUT_EFFECT_HERE, _WHY_REFUSED)
        alpha = values.get("lora_alpha", 8)
        if not is_positive(alpha):
            raise config.make_error("lora_alpha", "alpha is a number above 0")
        ranks = config.numbers("rank_pattern")
        if any(rank != int(rank) for rank in ranks.values()):
            raise config.make_error("rank_pattern", "a rank is a whole number from 1")
        return cls(
            rank=config.positive_int("r", 8),
            alpha=float(alpha),
            use_rslora=bool(values.get("use_rslora", False)),
            use_dora=bool(values.get("use_dora", False)),
            rank_pattern=ranks,
            alpha_pattern=config.numbers("alpha_pattern"),
        )

    def rank_of(self, module: str) -> int:
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def scaling_of(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA (arXiv 2312.03732)."""
        alpha, rank = _by_pattern(self.alpha_pattern, module, self.alpha), self.rank_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def read(config: ConfigFile, tensors: TensorFile, base: BaseView, options: ReadOptions) -> AdapterWeights:
    """Return a LoRA or DoRA adapter, with the embedding and output rows that were trained with it."""
    settings, targets = LoraSettings.from_config(config), Targets.from_config(config)
    inputs, outputs = replaced_rows(config, tensors, base, options.dtype)
    keep = frozenset({torch.bfloat16}) if options.narrow and not settings.use_dora else frozenset()
    experts = _experts(settings, targets.parameters, config, tensors, base, options, keep)
    routers = _routers(settings, targets.parameters, tensors, base, options, keep)
    modules = _modules(tensors, alone=not (experts or routers))
    targets.check(modules, base.linears, config, tensors.path)
    sites = {module: _site(settings, module, tensors, base, options, keep) for module in modules}
    scales: dict[str, SiteScale] = {}
    if settings.use_dora:
        for module, site in sites.items():
            key = f"{MODULE_PREFIX}{module}.{MAGNITUDE_KEY}"
            key = key if tensors.holds(key) else f"{key}.weight"  # peft's form between two refactorings of DoRA
            magnitude_O = tensors.take(key, (base.linears[module].out_features,), torch.float32)
            sites[module], scales[module] = rescaled(site, magnitude_O, base.weight(module), base.bias(module))
    tensors.require_empty(_EXPECTED)
    return AdapterWeights(sites, scales, experts=experts, routers=routers, inputs=inputs, outputs=outputs)


def _experts(
    settings: LoraSettings,
    targets: tuple[str, ...],
    config: ConfigFile,
    tensors: TensorFile,
    base: BaseView,
    options: ReadOptions,
    keep: Collection[torch.dtype],
) -> dict[str, ExpertLora]:
    """The LoRA of experts by parameter: PEFT stacks the ranks of all experts, lora_A by expert and lora_B by rank."""
    modules: dict[str, list[str]] = {}
    for name, weight in base.experts.items():
        if targets and matches_module(targets, name):
            modules.setdefault(weight.module, []).append(name)
    meant = [*base.experts, *(f"{name}.weight" for name in (*base.linears, *base.routers))]
    for target in targets:
        if not any(matches_module((target,), name) for name in meant):
            rule = "every target is a parameter of experts, or the weight of a linear or of a router"
            raise config.make_error("target_parameters", rule, value=target)
    if modules and settings.use_dora:
        raise config.make_error("use_dora", "an adapter of experts is a plain LoRA")
    found = {}
    for names in modules.values():
        for name, module in file_modules(names).items():
            weight, rank = base.experts[name], settings.rank_of(name)
            _require_rank(rank, name, tensors, options)
            lines, key = rank * weight.experts, f"{MODULE_PREFIX}{module}"
            a = tensors.take(f"{key}.lora_A.weight", (lines, weight.inputs), options.dtype, keep)
            b = tensors.take(f"{key}.lora_B.weight", (weight.outputs, lines), options.dtype, keep)
            a_ERI = a.view(weight.experts, rank, weight.inputs)
            b_EOR = b.view(weight.outputs, rank, weight.experts).permute(2, 0, 1).contiguous()
            found[name] = ExpertLora(a_ERI, b_EOR, settings.scaling_of(name))
    return found


def _routers(
    settings: LoraSettings,
    targets: tuple[str, ...],
    tensors: TensorFile,
    base: BaseView,
    options: ReadOptions,
    keep: Collection[torch.dtype],
) -> dict[str, SiteWeights]:
    """The LoRA of routers by module. PEFT names a router's weight alone, so it is the module's only wrapper."""
    found = {}
    for name in sorted(base.routers):
        if not targets or not matches_module(targets, f"{name}.weight"):
            continue
        rank, (outputs, inputs) = settings.rank_of(f"{name}.weight"), base.weight(name).shape
        _require_rank(rank, name, tensors, options)
        a_RI = tensors.take(f"{MODULE_PREFIX}{name}.lora_A.weight", (rank, inputs), options.dtype, keep)
        b_OR = tensors.take(f"{MODULE_PREFIX}{name}.lora_B.weight", (outputs, rank), options.dtype, keep)
        found[name] = SiteWeights(a_RI, b_OR, settings.scaling_of(f"{name}.weight"))
    return found


def _modules(tensors: TensorFile, *, alone: bool) -> list[str]:
    """Modules with a lora_A and a lora_B; half a pair is refused, and none at all where it is `alone` in the file."""
    halves: dict[str, set[str]] = {}
    for match in tensors.match(HALF_KEY):
        halves.setdefault(match["module"], set()).add(match["half"])
    for module, found in halves.items():
        if len(found) != 2:
            missing = ({"A", "B"} - found).pop()
            raise tensors.make_error(f"{module} has no lora_{missing}", "A and B come in pairs")
    if not halves and alone:
        tensors.require_empty(_EXPECTED)
        raise tensors.make_error("no tensors", "an adapter adapts at least one linear")
    return list(halves)


def _site(
    settings: LoraSettings,
    module: str,
    tensors: TensorFile,
    base: BaseView,
    options: ReadOptions,
    keep: Collection[torch.dtype],
) -> SiteWeights:
    shape, rank, dtype = base.linears[module], settings.rank_of(module), options.dtype
    _require_rank(rank, module, tensors, options)
    a_RI = tensors.take(f"{MODULE_PREFIX}{module}.lora_A.weight", (rank, shape.in_features), dtype, keep)
    b_OR = tensors.take(f"{MODULE_PREFIX}{module}.lora_B.weight", (shape.out_features, rank), dtype, keep)
    if a_RI.dtype != b_OR.dtype:
        a_RI, b_OR = a_RI.to(dtype), b_OR.to(dtype)
    return SiteWeights(a_RI, b_OR, settings.scaling_of(module))


def _require_rank(rank: int, module: str, tensors: TensorFile, options: ReadOptions) -> None:
    if rank > options.max_rank:
        rule, move = f"ranks go up to engine.max_rank={options.max_rank}", f"raise engine.max_rank to {rank}"
        raise ArtifactError(f"{tensors.path}: {module}", f"r={rank}", rule, move)


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """peft's `get_pattern_key`: the first pattern that matches the end of the name at a dot."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
