"""Which trials can share a process: decided in the driver, from specs and the base's config."""

from collections.abc import Mapping
from typing import Any

from graftwork.training.objective_spec import SftSpec
from graftwork.training.spec import LoraSpec, TrainSpec
from graftwork.training.text_spec import CptSpec

OWN = {
    "adapter": ("rank", "alpha", "rslora"),
    "optim": ("lr", "schedule", "warmup_ratio", "weight_decay", "max_grad_norm", "factors"),
}
"""Keys in which trials of one process may differ: each has its own adapter, and its own optimizer."""

LONGEST = 160
"""Most tokens of a row whose attention is computed as products, on a CPU in bfloat16: longer ones gain nothing."""


def can_share(one: TrainSpec, other: TrainSpec) -> bool:
    """Whether both can be trained in one process, their rows being equal (`space.rows_key`)."""
    return _shared(one) == _shared(other) and not why_alone(one)


def why_alone(spec: TrainSpec, base: Mapping[str, Any] | None = None) -> str | None:
    """What of a spec keeps a trial from sharing its process; None where it can. `base`: the model's config.json."""
    adapter, objective = spec.adapter, spec.objective
    if spec.num_workers > 1:
        return f"num_workers={spec.num_workers}: its workers share its rows"
    if not isinstance(adapter, LoraSpec):
        return f"adapter.kind={adapter.kind}: LoRA trials alone share a base"
    if adapter.dora:
        return "adapter.dora: each adapter scales the base's own output"
    if adapter.dropout > 0:
        return f"adapter.dropout={adapter.dropout:g}: what is dropped would depend on the trials beside it"
    if not isinstance(objective, SftSpec | CptSpec):
        return f"objective.kind={objective.kind}: trials of sft and cpt alone share a process"
    if isinstance(objective, SftSpec) and objective.answers is not None:
        return "objective.answers: held-out answers are generated with one adapter at a time"
    if spec.init_from is not None or spec.base_adapter is not None:
        return "init_from or base_adapter: each trial begins from an adapter of its own"
    if dropped := _dropout_of(base or {}):
        return f"the base trains with {dropped}: what is dropped would depend on the trials beside it"
    if experts := next((key for key in base or {} if "experts" in key), None):
        return f"the base has {experts}: it deals the tokens of all rows to them"
    return None


def _shared(spec: TrainSpec) -> dict[str, Any]:
    """All of a spec but what each trial has of its own."""
    return spec.model_dump(mode="json", exclude={part: set(keys) for part, keys in OWN.items()})


def _dropout_of(config: Mapping[str, Any]) -> str | None:
    """The first dropout of a base that is not 0, by name (`attention_dropout`, GPT-2's `resid_pdrop`)."""
    found = (key for key, value in config.items() if "drop" in key and isinstance(value, float) and value > 0)
    return next((f"{key}={config[key]:g}" for key in found), None)
