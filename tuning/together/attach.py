"""Put the adapters of several trials on one base, each with the weights that PEFT draws for it alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import set_seed

from graftwork.training.adapters.attach import lora_config
from graftwork.training.job import TrainJob
from graftwork.training.spec import LoraSpec
from graftwork.tuning.together.adapters import Adapters, LinearGroup, Trial, cut_a, cut_b
from graftwork.tuning.together.layer import Adapted, StackedLoras

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Last names of linears that one input goes through, in the families of transformers. Another input is noticed."""


def attach_together(model: Any, jobs: Mapping[str, TrainJob], steps: int) -> Adapters:
    """Replace the targeted linears of a loaded base. `jobs` by trial; `steps` of each schedule."""
    specs = {key: job.spec for key, job in jobs.items()}
    layers = _drawn(model, [(spec.adapter, spec.seed) for spec in specs.values()])
    places = _places(layers)
    trials = [
        Trial.create(key, spec.adapter, spec.optim, steps, _flat(layers, places, number))
        for number, (key, spec) in enumerate(specs.items())
        if isinstance(spec.adapter, LoraSpec)
    ]
    adapters = Adapters(trials, places, model.dtype)
    for number, place in enumerate(places):
        siblings = StackedLoras(adapters, number, [layers[name].get_base_layer() for name in place.names])
        for which, name in enumerate(place.names):
            model.set_submodule(name, Adapted(siblings, which))
    return adapters


def _drawn(model: Any, adapters: Sequence[tuple[Any, int]]) -> dict[str, LoraLayer]:
    """PEFT's layers by name, adapter N of each called `N`; the model itself is as it was before."""
    configs = [lora_config(adapter, model) for adapter, _ in adapters]
    set_seed(adapters[0][1])
    peft = get_peft_model(model, configs[0], adapter_name="0")
    for number, (config, (_, seed)) in enumerate(zip(configs[1:], adapters[1:], strict=True), 1):
        set_seed(seed)
        peft.add_adapter(str(number), config)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    peft.unload()
    return layers


def _places(layers: Mapping[str, LoraLayer]) -> list[LinearGroup]:
    """The layers in the order of the model, those with one input together."""
    together: dict[tuple[str, str], list[str]] = {}
    for name in layers:
        block, _, last = name.rpartition(".")
        names = next((names for names in SAME_INPUT if last in names), (last,))
        together.setdefault((block, names[0]), []).append(name)
    return [
        LinearGroup(
            tuple(names),
            layers[names[0]].lora_A["0"].in_features,
            tuple(layers[name].lora_B["0"].out_features for name in names),
        )
        for names in together.values()
    ]


@torch.no_grad()
def _flat(layers: Mapping[str, LoraLayer], places: Sequence[LinearGroup], number: int) -> torch.Tensor:
    """The weights of one adapter end to end, in fp32."""
    adapter = str(number)
    rank = layers[places[0].names[0]].r[adapter]
    size = rank * sum(len(place.names) * place.inputs + sum(place.outputs) for place in places)
    weights_1P = torch.zeros((1, size), device=layers[places[0].names[0]].lora_A[adapter].weight.device)
    for place, a_1SI, bs_1OR in zip(
        places, cut_a(weights_1P, places, rank), cut_b(weights_1P, places, rank), strict=True
    ):
        a_1SI[0] = torch.cat([layers[name].lora_A[adapter].weight for name in place.names])
        for name, b_1OR in zip(place.names, bs_1OR, strict=True):
            b_1OR[0] = layers[name].lora_B[adapter].weight
    return weights_1P[0]
