"""IA3 (arXiv 2205.05638): reader, and channels multiplied row by row, for IA3 and DoRA in a batch of any adapters.

Prompt tokens go segment by segment in peft's own order of operations and equal it bit for bit at equal shape. Decoding
rows of such adapters are taken out, multiplied by their stacked factors and put back: `result * factor + shift`, where
DoRA's shift is `(1 - factor) * bias` and its LoRA part, multiplied by the factor at load, comes with the LoRA deltas.
Legend: N decoding tokens, M of them with factors, P adapters with factors, I in, O out.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from graftwork.adapters.ia3 import FACTOR_KEY
from graftwork.adapters.kind import MODULE_PREFIX
from graftwork.serving.engine.adapters.base_view import BaseView
from graftwork.serving.engine.adapters.format import AdapterWeights, ConfigFile, ReadOptions, SiteScale, Targets
from graftwork.serving.engine.adapters.loaded import LoadedAdapter
from graftwork.serving.engine.adapters.token_rows import ROW_KEYS, replaced_rows
from graftwork.serving.engine.adapters.weights_file import TensorFile
from graftwork.serving.engine.lora_layers import Deltas, LoraLayer, LoraSegment

_HONOURED = ROW_KEYS | {"target_modules", "exclude_modules", "feedforward_modules"}
_WITHOUT_EFFECT_HERE = frozenset({"init_ia3_weights"})
_WHY_REFUSED = {"fan_in_fan_out": "the base's linears store [out, in]"}


def read(config: ConfigFile, tensors: TensorFile, base: BaseView, options: ReadOptions) -> AdapterWeights:
    """Return factors of the results of some linears and of the inputs of others, in fp32 as in peft 0.21."""
    config.require_known(_HONOURED, _WITHOUT_EFFECT_HERE, _WHY_REFUSED)
    targets, feedforward = Targets.from_config(config), config.names("feedforward_modules", optional=True)
    inputs, outputs = replaced_rows(config, tensors, base, options.dtype)
    modules = [match["module"] for match in tensors.match(FACTOR_KEY)]
    targets.check(modules, base.linears, config, tensors.path)
    scales = {}
    for module in modules:
        shape = base.linears[module]
        if isinstance(feedforward, str):
            on_input = re.fullmatch(feedforward, module) is not None
        else:  # peft's rule: a bare suffix, not one that begins at a dot
            on_input = any(module.endswith(name) for name in feedforward)
        wanted = (1, shape.in_features) if on_input else (shape.out_features, 1)
        factor = tensors.take(f"{MODULE_PREFIX}{module}.ia3_l", wanted, torch.float32).flatten()
        scales[module] = SiteScale(input_I=factor) if on_input else SiteScale(output_O=factor)
    tensors.require_empty(f"{MODULE_PREFIX}MODULE.ia3_l, and what the config names")
    if not scales:
        raise tensors.make_error("no tensors", "an adapter adapts at least one linear")
    return AdapterWeights(scales=scales, inputs=inputs, outputs=outputs)


@dataclass(frozen=True)
class _Factors:
    """Stacked over the adapters of a step: [P, I] or [P, O]. shift None: no adapter has one."""

    factor: torch.Tensor
    shift: torch.Tensor | None = None


class _Stack:
    """Factors of the adapters that decode now, stacked by linear when it first runs; kept while these adapters run."""

    def __init__(self, active: Sequence[LoadedAdapter]) -> None:
        self.versions = tuple(weights.version for weights in active)
        self._scales: list[Mapping[str, SiteScale]] = [weights.scales for weights in active]
        self.changes_inputs = any(scale.input_I is not None for scales in self._scales for scale in scales.values())
        self._inputs: dict[str, _Factors | None] = {}
        self._outputs: dict[str, _Factors | None] = {}

    def inputs(self, site: LoraLayer) -> _Factors | None:
        """None where no adapter multiplies this linear's input."""
        if site.name not in self._inputs:
            self._inputs[site.name] = self._stacked(site, lambda scale: scale.input_I, site.shape.in_features)
        return self._inputs[site.name]

    def outputs(self, site: LoraLayer) -> _Factors | None:
        """None where no adapter multiplies this linear's result."""
        if site.name not in self._outputs:
            factors = self._stacked(site, lambda scale: scale.output_O, site.shape.out_features)
            shift = self._stacked(
                site,
                lambda one: (
                    None if one.bias_O is None or one.output_O is None else (1 - one.output_O) * one.bias_O.float()
                ),
                site.shape.out_features,
                neutral=0.0,
            )
            self._outputs[site.name] = factors and _Factors(factors.factor, shift.factor if shift else None)
        return self._outputs[site.name]

    def _stacked(
        self, site: LoraLayer, take: Callable[[SiteScale], torch.Tensor | None], size: int, neutral: float = 1.0
    ) -> _Factors | None:
        found = [take(scales[site.name]) if site.name in scales else None for scales in self._scales]
        some = next((factor for factor in found if factor is not None), None)
        if some is None:
            return None
        return _Factors(torch.stack([some.new_full((size,), neutral) if one is None else one for one in found]))


class StepScales:
    """The factors of one step; `then` are the step's LoRA deltas. Stands in for them in `Sites`."""

    def __init__(
        self,
        decoding: int,
        stack: _Stack | None,
        rows_M: torch.Tensor | None,
        places_M: torch.Tensor | None,
        segments: Sequence[LoraSegment],
        then: Deltas | None,
    ) -> None:
        self._decoding, self._stack, self._rows_M, self._places_M = decoding, stack, rows_M, places_M
        self._segments, self._then = segments, then
        self.changes_inputs = (stack is not None and stack.changes_inputs) or any(
            scale.input_I is not None for segment in segments for scale in segment.weights.scales.values()
        )

    def scaled(self, site: LoraLayer, x: torch.Tensor) -> torch.Tensor:
        """The input of a linear: a copy where some row's adapter multiplies it."""
        factors = self._stack.inputs(site) if self._stack is not None else None
        segments = [(segment, scale.input_I) for segment, scale in self._scales_of(site) if scale.input_I is not None]
        if factors is None and not segments:
            return x
        x = x.clone()
        x_TI = x.view(-1, x.shape[-1])
        if factors is not None:
            self._multiply(factors, x_TI)
        for segment, factor_I in segments:
            x_TI[segment.first : segment.stop].mul_(factor_I)
        return x

    def add(self, site: LoraLayer, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Multiplies the linear's own fresh output in place, then adds the LoRA deltas."""
        out_TO = result.view(-1, result.shape[-1])
        factors = self._stack.outputs(site) if self._stack is not None else None
        if factors is not None:
            self._multiply(factors, out_TO)
        for segment, scale in self._scales_of(site):
            if scale.output_O is not None:
                rows = slice(segment.first, segment.stop)
                _finish(scale, x.reshape(-1, x.shape[-1])[rows], out_TO[rows])
        return result if self._then is None else self._then.add(site, x, result)

    def _scales_of(self, site: LoraLayer) -> list[tuple[LoraSegment, SiteScale]]:
        return [(one, one.weights.scales[site.name]) for one in self._segments if site.name in one.weights.scales]

    def _multiply(self, factors: _Factors, rows_TO: torch.Tensor) -> None:
        """The decoding rows that have factors."""
        own_NO = rows_TO[: self._decoding]
        part = own_NO if self._rows_M is None else own_NO.index_select(0, self._rows_M)
        part.mul_(self._of_rows(factors.factor))
        if factors.shift is not None:
            part.add_(self._of_rows(factors.shift))
        if self._rows_M is not None:
            own_NO.index_copy_(0, self._rows_M, part)

    def _of_rows(self, stacked_PO: torch.Tensor) -> torch.Tensor:
        return stacked_PO if self._places_M is None else stacked_PO.index_select(0, self._places_M)


class ScalePlanner:
    """Makes each step's factors; keeps the last stack, which serves until another set of such adapters decodes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stack: _Stack | None = None

    def plan(
        self, decoding: Sequence[LoadedAdapter | None], segments: Sequence[LoraSegment], then: Deltas | None
    ) -> StepScales | None:
        """decoding: the adapter of each decoding token. None: nothing is multiplied in this step."""
        rows = [(row, weights) for row, weights in enumerate(decoding) if weights is not None and weights.scales]
        segments = [segment for segment in segments if segment.weights.scales]
        if not rows and not segments:
            return None
        active = {weights.version: weights for _, weights in sorted(rows, key=lambda pair: pair[1].version)}
        if rows and (self._stack is None or self._stack.versions != tuple(active)):
            self._stack = _Stack(list(active.values()))
        place = {version: n for n, version in enumerate(active)}
        every, alone = len(rows) == len(decoding), len(active) == 1
        return StepScales(
            len(decoding),
            self._stack if rows else None,
            None if every else self._tensor([row for row, _ in rows]),
            None if alone else self._tensor([place[weights.version] for _, weights in rows]),
            segments,
            then,
        )

    def forget(self, version: str) -> None:
        """Drops references to a freed adapter."""
        if self._stack is not None and version in self._stack.versions:
            self._stack = None

    def _tensor(self, numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, device=self._device)


def _finish(scale: SiteScale, x_TI: torch.Tensor, out_TO: torch.Tensor) -> None:
    """One prompt segment in peft's order."""
    factor_O = scale.output_O
    assert factor_O is not None, "the caller looked"
    if scale.dora is None:
        out_TO.mul_(factor_O)
        return
    base_TO = out_TO if scale.bias_O is None else out_TO - scale.bias_O
    delta_TO = linear(linear(x_TI, scale.dora.a_RI), scale.dora.b_OR)
    out_TO.add_((factor_O - 1) * base_TO + factor_O * delta_TO * scale.dora.scaling)
