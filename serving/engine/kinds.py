"""One step with adapters that are more than LoRA: sets what each hook of the model changes, and takes it away again."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from graftwork.serving.engine.batch import StepBatch
from graftwork.serving.engine.bottlenecks import bottlenecks_of
from graftwork.serving.engine.lora import DeltaPlanner, LoraSegment
from graftwork.serving.engine.scales import ScalePlanner
from graftwork.serving.engine.sites import Deltas, Sites
from graftwork.serving.engine.slots import LoadedAdapter
from graftwork.serving.engine.token_rows import LayerEnd, input_change, output_change

Adapters = Sequence[LoadedAdapter | None]


class MixedKinds:
    """The hooks and planners beyond LoRA, for the engine's thread. Steps of LoRA and base rows never come here."""

    def __init__(self, model: Any, sites: Sites, lora: DeltaPlanner, device: torch.device) -> None:
        self._sites, self._lora, self._device = sites, lora, device
        self._embedding = LayerEnd(model.get_input_embeddings())
        self._output = LayerEnd(model.get_output_embeddings())
        self._scales = ScalePlanner(device)

    @contextlib.contextmanager
    def step(
        self,
        batch: StepBatch,
        decoding: Adapters,
        prompts: Adapters,
        segments: Sequence[LoraSegment],
        wanted: Sequence[int],
    ) -> Iterator[Deltas | None]:
        """Around one forward pass; yields its deltas. segments: every prompt segment that has an adapter."""
        plain = [segment for segment in segments if segment.weights.groups and not segment.weights.scales]
        lora = self._lora.plan([one if one is not None and one.groups else None for one in decoding], plain)
        scales = self._scales.plan(decoding, segments, lora)
        scaled = lora if scales is None else scales
        networks = bottlenecks_of(decoding, segments, scaled, self._device)
        adapters = [*decoding, *prompts]
        try:
            self._sites.inputs = scales if scales is not None and scales.changes_inputs else None
            self._embedding.change = input_change(batch, adapters)
            self._output.change = output_change(batch, adapters, wanted)
            yield scaled if networks is None else networks
        finally:
            self._sites.inputs = self._embedding.change = self._output.change = None

    def forget(self, version: str) -> None:
        """Drops references to a freed adapter."""
        self._scales.forget(version)

    def unhook(self) -> None:
        """Gives both layers back as they were."""
        self._output.unhook()
        self._embedding.unhook()
