"""Adapters of all kinds: the reader of a PEFT folder by its kind, and one step of a batch with mixed kinds.

A kind has a module here with its name, and in it `read`; every other kind of PEFT is rejected with the reason.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from graftwork.adapters.spec import PEFT_KINDS, name_of
from graftwork.artifacts.verify import CONFIG_FILE, WEIGHTS_FILE
from graftwork.serving.engine.adapters.base_view import BaseView
from graftwork.serving.engine.adapters.bottleneck import bottlenecks_of
from graftwork.serving.engine.adapters.format import AdapterWeights, ConfigFile, ReadOptions
from graftwork.serving.engine.adapters.ia3 import ScalePlanner
from graftwork.serving.engine.adapters.loaded import LoadedAdapter
from graftwork.serving.engine.adapters.token_rows import changed_result, input_change, output_change
from graftwork.serving.engine.adapters.weights_file import TensorFile
from graftwork.serving.engine.attention import StepBatch
from graftwork.serving.engine.expert_layers import ExpertLayers, expert_rows
from graftwork.serving.engine.lora_batch import DeltaPlanner
from graftwork.serving.engine.lora_layers import Deltas, LoraSegment, Sites

_MODULES = {peft_type: name_of(kind) for peft_type, kind in PEFT_KINDS.items()} | {
    "PROMPT_TUNING": "prefix",
    "P_TUNING": "prefix",
    "TRAINABLE_TOKENS": "token_rows",
}
"""Module of this folder with the reader of a `peft_type`: for a kind that we train the module with the kind's name."""
SERVED = tuple(_MODULES)
Reader = Callable[[ConfigFile, TensorFile, BaseView, ReadOptions], AdapterWeights]
SCORING = ("SEQ_CLS", "TOKEN_CLS")
"""Tasks of adapters whose head gives scores in place of tokens."""
_DELTAS = frozenset(
    {"ADALORA", "ADAMSS", "BOFT", "C3A", "DELORA", "FOURIERFT", "FROD", "GRALORA", "HIRA", "HRA", "LOHA", "LOKR"}
    | {"MISS", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHIRA", "TINYLORA", "UNILORA"}
    | {"VBLORA", "VERA", "WAVEFT"}
)
"""Kinds whose delta is one matrix a linear, so that the base can take it over."""
_WHY_REFUSED = {
    "ADAPTION_PROMPT": "its attention to adaption prompts is not computed here",
    "CARTRIDGE": "its cache belongs to one document's positions",
    "CPT": "its prompt depends on labelled tokens",
    "LN_TUNING": "trained norms would replace the base's for every request",
    "MULTITASK_PROMPT_TUNING": "its prompt depends on a task id that requests do not carry",
    "POLY": "its mixture depends on a task id that requests do not carry",
    "XLORA": "its gates need a second forward pass for every token",
}


def read_adapter(
    folder: Path,
    base: BaseView,
    options: ReadOptions,
    digests: Mapping[str, str] | None = None,
) -> AdapterWeights:
    """Return what the adapter changes, on the CPU. A DoRA adapter reads the base's weights.

    digests: sha256 by file name (the manifest's), taken over the very bytes that are used.
    Raises ArtifactError that names the key, what was found and the rule, for anything that cannot be served exactly.
    """
    known = digests or {}
    config = ConfigFile.read(folder, known.get(CONFIG_FILE))
    kind = config.values.get("peft_type")
    served = f"served are {', '.join(SERVED)}"
    if isinstance(kind, str) and kind in _DELTAS and kind not in SERVED:
        move = "convert it with peft's convert_to_lora, or merge it into the base and serve that as a base of its own"
        raise config.make_error("peft_type", f"{kind} is not computed row by row; {served}", move)
    if not isinstance(kind, str) or kind not in SERVED:
        why = f"{_WHY_REFUSED[kind]}; " if isinstance(kind, str) and kind in _WHY_REFUSED else ""
        raise config.make_error("peft_type", why + served, "train it as one of those")
    if config.values.get("task_type") in SCORING:
        raise config.make_error(
            "task_type",
            "it scores answers (a reward model, a classifier) and writes none",
            "serve what was trained with it; rewards are asked in training",
        )
    tensors = TensorFile(folder, known.get(WEIGHTS_FILE))
    return reader_of(kind)(config, tensors, base, options)


def reader_of(peft_type: str) -> Reader:
    """Return the reader of a served `peft_type`."""
    module = importlib.import_module(f"{__package__}.{_MODULES[peft_type]}")
    reader: Reader = module.read
    return reader


Adapters = Sequence[LoadedAdapter | None]


class MixedKinds:
    """The hooks and planners beyond LoRA, for the engine's thread. Steps of LoRA and base rows never come here."""

    def __init__(
        self, model: Any, sites: Sites, experts: ExpertLayers, lora: DeltaPlanner, device: torch.device
    ) -> None:
        self._sites, self._experts, self._lora, self._device = sites, experts, lora, device
        self._embedding, self._output = model.get_input_embeddings(), model.get_output_embeddings()
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
        changes = (
            (self._embedding, input_change(batch, adapters)),
            (self._output, output_change(batch, adapters, wanted)),
        )
        with contextlib.ExitStack() as stack:
            for layer, change in changes:
                if change is not None:
                    stack.enter_context(changed_result(layer, change))
            self._sites.inputs = scales if scales is not None and scales.changes_inputs else None
            stack.callback(setattr, self._sites, "inputs", None)
            self._experts.adapters = expert_rows(decoding, segments, self._device)
            stack.callback(setattr, self._experts, "adapters", ())
            yield scaled if networks is None else networks

    def forget(self, version: str) -> None:
        """Drops references to a freed adapter."""
        self._scales.forget(version)
