"""The base's fused experts and routers, hooked once: steps with adapters of them are computed here, others by it.

The base's part is that of transformers' experts interface (`use_experts_implementation`), expert by expert. PEFT adds
the product of an adapter's halves to the weights of all experts; here each row adds its own adapter's delta to the
result, `result + lora_B(lora_A(x)) * scaling`, so that rows of different adapters run in one pass.
Legend: T packed tokens, K experts a token, S = T * K pairs of token and expert sorted by expert, P pairs of one
adapter, E experts, R rank, I in, O out, H hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

from graftwork.adapters.experts import expert_weights, experts_problem, router_weights
from graftwork.compat.hf import apply_gate
from graftwork.serving.engine.adapters.format import ExpertLora
from graftwork.serving.engine.adapters.loaded import LoadedAdapter
from graftwork.serving.engine.lora_layers import LoraSegment, is_linear

UP, DOWN = "gate_up_proj", "down_proj"
_FEW_PAIRS = 64
"""Up to so many pairs of one adapter gather each pair's halves for one batched product; more go expert by expert."""


@dataclass(frozen=True)
class AdapterRows:
    """The packed tokens that run with one adapter of experts. own_T: true for each of them."""

    weights: LoadedAdapter
    own_T: torch.Tensor


def expert_rows(
    decoding: Sequence[LoadedAdapter | None], segments: Sequence[LoraSegment], device: torch.device
) -> tuple[AdapterRows, ...]:
    """Return the tokens of each adapter of experts in one step: decoding tokens first, then prompts' segments."""
    rows: dict[LoadedAdapter, list[int]] = {}
    for row, weights in enumerate(decoding):
        if weights is not None and (weights.experts or weights.routers):
            rows.setdefault(weights, []).append(row)
    for segment in segments:
        if segment.weights.experts or segment.weights.routers:
            rows.setdefault(segment.weights, []).extend(range(segment.first, segment.stop))
    tokens = max([len(decoding), *(segment.stop for segment in segments)], default=0)
    found = []
    for weights, own in rows.items():
        own_T = torch.zeros(tokens, dtype=torch.bool)
        own_T[own] = True
        found.append(AdapterRows(weights, own_T.to(device)))
    return tuple(found)


class ExpertLayers:
    """All hooked modules of experts of one model. `adapters` is set around a pass; empty costs a comparison a block."""

    def __init__(self, model: Any) -> None:
        self.adapters: Sequence[AdapterRows] = ()
        self._hooked: list[Any] = []
        for name in dict.fromkeys(one.module for one in expert_weights(model)):
            module = model.get_submodule(name)
            if not experts_problem(module):
                self._hook(name, module, module.forward)
        for name in router_weights(model):
            router = model.get_submodule(name.removesuffix(".weight"))
            if is_linear(router):  # inside of a router (Hunyuan), hooked with the other linears
                continue
            self._hook_router(name.removesuffix(".weight"), router, router.forward)

    def unhook(self) -> None:
        """Gives every module its own forward back."""
        for module in self._hooked:
            del module.forward
        self._hooked.clear()

    def _hook(self, name: str, module: Any, base: Callable[..., torch.Tensor]) -> None:
        names = {f"{name}.{UP}", f"{name}.{DOWN}"}

        def forward(x_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
            adapters = [one for one in self.adapters if not names.isdisjoint(one.weights.experts)]
            if not adapters:
                return base(x_TH, index_TK, weight_TK)
            return _adapted(name, module, adapters, x_TH, index_TK, weight_TK)

        module.forward = forward
        self._hooked.append(module)

    def _hook_router(self, name: str, router: Any, base: Callable[..., Any]) -> None:
        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            adapters = [one for one in self.adapters if name in one.weights.routers]
            result = base(x, *args, **kwargs)
            if not adapters:
                return result
            x_TH, parts = x.reshape(-1, x.shape[-1]), list(result)
            for one in adapters:
                own_T = _padded(one.own_T, len(x_TH))
                lora, plain = one.weights.routers[name], router.weight.data
                a_RI, b_OR = lora.widened(plain.dtype)
                router.weight.data = plain + (b_OR @ a_RI) * lora.scaling  # as PEFT adds it
                try:
                    for part, own in zip(parts, base(x_TH[own_T], *args, **kwargs), strict=True):
                        part[own_T] = own
                finally:
                    router.weight.data = plain
            return tuple(parts)

        router.forward = forward
        self._hooked.append(router)


def _adapted(
    name: str,
    module: Any,
    adapters: Sequence[AdapterRows],
    x_TH: torch.Tensor,
    index_TK: torch.Tensor,
    weight_TK: torch.Tensor,
) -> torch.Tensor:
    """Results of all tokens [T, H]: of the experts and of each token's adapter."""
    tokens, width = index_TK.shape
    expert_S, order_S = index_TK.flatten().sort(stable=True)
    token_S = order_S // width
    pairs = _Pairs(expert_S, torch.bincount(expert_S, minlength=module.num_experts).tolist())
    # a step that pads has more tokens than rows; those beyond have no adapter
    own = [(one.weights, (_padded(one.own_T, tokens)[token_S]).nonzero().flatten()) for one in adapters]
    inputs_SI = x_TH[token_S]
    up_SO = _product(module, UP, inputs_SI, pairs)
    for weights, spots_P in own:
        _add(weights.experts.get(f"{name}.{UP}"), spots_P, pairs, inputs_SI, up_SO)
    inner_SI = apply_gate(module, up_SO)
    down_SH = _product(module, DOWN, inner_SI, pairs)
    for weights, spots_P in own:
        _add(weights.experts.get(f"{name}.{DOWN}"), spots_P, pairs, inner_SI, down_SH)
    weighted_SH = torch.empty_like(down_SH)
    weighted_SH[order_S] = down_SH
    mixed_TKH = weighted_SH.view(tokens, width, -1) * weight_TK[..., None]
    return mixed_TKH.sum(1).to(x_TH.dtype)


@dataclass(frozen=True)
class _Pairs:
    """The expert of each pair, ascending, and the number of pairs of each expert."""

    expert_S: torch.Tensor
    counts: Sequence[int]


def _padded(own_T: torch.Tensor, tokens: int) -> torch.Tensor:
    return own_T if len(own_T) == tokens else torch.nn.functional.pad(own_T, (0, tokens - len(own_T)))


def _product(module: Any, key: str, x_SI: torch.Tensor, pairs: _Pairs) -> torch.Tensor:
    """The base's part [S, O], one product an expert that has pairs."""
    weight, parts, first = getattr(module, key), [], 0
    for expert, count in enumerate(pairs.counts):
        if count:
            own_CI = x_SI[first : first + count]
            parts.append(own_CI @ weight[expert] if module.is_transposed else linear(own_CI, weight[expert]))
            first += count
    result = torch.cat(parts)
    return result + getattr(module, f"{key}_bias")[pairs.expert_S] if module.has_bias else result


def _add(
    lora: ExpertLora | None, spots_P: torch.Tensor, pairs: _Pairs, x_SI: torch.Tensor, result_SO: torch.Tensor
) -> None:
    """Add the deltas of one adapter to its pairs."""
    if lora is None or not len(spots_P):
        return
    x_PI, expert_P = x_SI[spots_P], pairs.expert_S[spots_P]
    if len(spots_P) <= _FEW_PAIRS:
        a_PRI, b_POR = lora.a_ERI[expert_P].to(x_PI.dtype), lora.b_EOR[expert_P].to(x_PI.dtype)
        delta_PO = torch.bmm(b_POR, torch.bmm(a_PRI, x_PI[..., None]))[..., 0]
    else:
        parts, first = [], 0
        for expert, count in zip(*(one.tolist() for one in expert_P.unique(return_counts=True)), strict=True):
            own_CI = x_PI[first : first + count]
            a_RI, b_OR = lora.a_ERI[expert].to(x_PI.dtype), lora.b_EOR[expert].to(x_PI.dtype)
            parts.append(linear(linear(own_CI, a_RI), b_OR))
            first += count
        delta_PO = torch.cat(parts)
    result_SO.index_add_(0, spots_P, delta_PO, alpha=lora.scaling)
