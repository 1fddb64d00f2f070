"""Groups of trials that share a process, and its memory: the base once, all else once per trial."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from graftwork.adapters.lora import LoraSpec
from graftwork.base import load as base_model
from graftwork.base.model_shape import ModelShape
from graftwork.planning.hardware import FP32
from graftwork.planning.memory import MemoryPlan, RowSizes, frozen_bytes
from graftwork.training.objectives.cpt import CptSpec
from graftwork.training.objectives.rows import PreparedData
from graftwork.training.objectives.sft import SftSpec
from graftwork.training.planning.memory import (
    ALLOCATOR_SHARE,
    Pass,
    micro_batch,
    pass_of,
    predict_training,
    score_bytes,
)
from graftwork.training.spec import TrainSpec
from graftwork.tuning.finals import knows_all
from graftwork.tuning.search import Search, rows_key
from graftwork.tuning.trial_store import Ledger
from graftwork.tuning.trials import TrialRecord

SpecOf = Callable[[TrialRecord], TrainSpec]


def group_of(
    first: TrialRecord, most: int, ledger: Ledger, search: Search, spec_of: SpecOf, rows: PreparedData
) -> dict[str, TrainSpec]:
    """The specs of `first` and of at most `most - 1` others, by trial: pending ones, then what the search suggests.

    All are set to running, so that the search counts them; a trial that does not fit stays pending. `rows`: those of
    `first`. Raises ConfigError when the values of a point contradict each other.
    """
    spec = spec_of(first)
    group = {first.trial_id: spec}
    ledger.update(first.trial_id, state="running")
    if most == 1:
        return group
    reason = why_alone(spec, base_model.resolve(spec.base).config)
    if first.smaller:
        reason = "it ran out of memory before"
    elif rows.trained_tokens:
        reason = "rows of the embedding are trained with the adapter"
    while len(group) < most and reason is None:
        found = _next_partner(first, spec, ledger, search, spec_of)
        if found is None:
            break
        ledger.update(found.trial_id, state="running")
        group[found.trial_id] = spec_of(found)
    for trial_id in group:
        others = ", ".join(other for other in group if other != trial_id)
        note = f"trained in one process with {others}" if others else f"trained alone: {reason}" if reason else None
        if note:
            ledger.update(trial_id, notes=(*ledger.records[trial_id].notes, note))
    return group


def _next_partner(
    first: TrialRecord, spec: TrainSpec, ledger: Ledger, search: Search, spec_of: SpecOf
) -> TrialRecord | None:
    """The next trial that can share a process with `first`: a pending one, else one that the search suggests.

    The search is called once, or while it has more where its points don't depend on results.
    """

    def fits(other: TrialRecord) -> bool:
        same_rows = rows_key(other.values) == rows_key(first.values)
        return same_rows and not other.smaller and can_share(spec, spec_of(other))

    found = next((record for record in ledger.trials if record.state == "pending" and fits(record)), None)
    waiting = any(record.state == "pending" for record in ledger.trials)
    while found is None and (knows_all(search) or not waiting):
        drawn = ledger.next_trial(search)
        if not isinstance(drawn, TrialRecord):
            break
        found, waiting = (drawn if fits(drawn) else None), True
    return found


LOGIT_COPIES = 3
"""In the compute dtype: the logits, the gradient that is stored in their place, and that times the loss's."""


def predict_together(
    specs: Sequence[TrainSpec], model: ModelShape, rows: RowSizes | None = None, *, value_bytes: int = FP32
) -> MemoryPlan:
    """Peak of one process for trials that can share it (`can_share`), like `predict_training` for one.

    It is that of one trial with all their ranks in one adapter and all their rows in one forward pass; on a CPU with
    the activations that these layers store, on a GPU an upper bound.
    """
    whole, rows = _as_one(specs), rows and replace(rows, each=None)  # every trial takes the same rows: the longest
    plan = predict_training(whole, model, rows, value_bytes=value_bytes)
    taken = pass_of(whole, rows or RowSizes.at_most(whole.max_length), micro_batch(whole))
    changed = {} if whole.gpus else _on_cpu(whole, model, taken, plan, value_bytes)
    parts = tuple((name, changed.get(name, size)) for name, size in plan.parts)
    copies = ("adapters as multiplied", whole.adapter.trained_params(model) * value_bytes)
    return replace(plan, parts=(*parts, copies), assumptions=(f"{len(specs)} trials on one base", *plan.assumptions))


def _as_one(specs: Sequence[TrainSpec]) -> TrainSpec:
    """One trial that is as large as all. No valid user spec: ranks end at 256 there."""
    first, count = specs[0], len(specs)
    ranks = [spec.adapter.rank for spec in specs if isinstance(spec.adapter, LoraSpec)]
    assert len(ranks) == count, "trials that share a process train a LoRA each"
    sizes = {"rows_per_step": first.optim.rows_per_step * count, "micro_batch": micro_batch(first) * count}
    adapter = first.adapter.model_copy(update={"rank": sum(ranks)})
    return first.model_copy(update={"adapter": adapter, "optim": first.optim.model_copy(update=sizes)})


def _on_cpu(whole: TrainSpec, model: ModelShape, taken: Pass, plan: MemoryPlan, value_bytes: int) -> dict[str, int]:
    """The parts that are not those of PEFT's layers and TRL's loss."""
    logits = LOGIT_COPIES * taken.scored * model.vocab * value_bytes
    logits = max(logits, score_bytes(whole, model, taken, value_bytes))  # not at once
    activations = plan.part("activations")
    if not whole.optim.gradient_checkpointing:
        activations = taken.tokens * (
            model.layers * _block(whole, model, taken, value_bytes) + 2 * model.hidden * value_bytes
        )
    allocator = round(ALLOCATOR_SHARE * (activations + logits))
    return {"activations": activations, "logits": logits, "allocator": allocator}


def _block(whole: TrainSpec, model: ModelShape, taken: Pass, value_bytes: int) -> int:
    """Bytes that a token leaves in one block: of the frozen block, of the inputs of its targets, once for siblings, and
    the chances of short rows, in fp32 and in the compute dtype."""
    frozen = frozen_bytes(model, taken.row if model.keeps_scores else None, 0, value_bytes)
    read = model.read(whole.adapter.which) if isinstance(whole.adapter, LoraSpec) else 0
    products = taken.row <= LONGEST and value_bytes < FP32 and not model.keeps_scores  # else `frozen` has them
    return round(frozen) + read * value_bytes + products * model.heads * taken.row * (FP32 + value_bytes)


OWN = {
    "adapter": ("rank", "alpha", "rslora"),
    "optim": (
        *("lr", "betas", "eps", "weight_decay", "max_grad_norm"),
        *("schedule", "warmup_ratio", "min_lr_ratio", "decay_ratio", "factors"),
    ),
}
"""Keys in which trials of one process may differ: each has its own adapter, and its own optimizer."""

LONGEST = 160
"""Most tokens of a row whose attention is computed as products, on a CPU in bfloat16: longer ones gain nothing."""


def can_share(one: TrainSpec, other: TrainSpec) -> bool:
    """Return whether trials with equal rows (`search.rows_key`) can train in one process: decided in the driver."""
    own = {part: set(keys) for part, keys in OWN.items()}
    shared = [spec.model_dump(mode="json", exclude=own) for spec in (one, other)]
    return shared[0] == shared[1] and not why_alone(one)


def why_alone(spec: TrainSpec, base: Mapping[str, Any] | None = None) -> str | None:
    """Return why a trial cannot share its process; None where it can. `base`: the model's config.json."""
    adapter, objective = spec.adapter, spec.objective
    if spec.num_workers > 1:
        return f"num_workers={spec.num_workers}: its workers share its rows"
    if not isinstance(adapter, LoraSpec):
        return f"adapter.kind={adapter.kind}: LoRA trials alone share a base"
    if spec.optim.kind != "adamw":
        return f"optim.kind={spec.optim.kind}: each trial is stepped by AdamW"
    if adapter.modules_to_save:
        return "adapter.modules_to_save: each trial trains modules of its own"
    if adapter.dora:
        return "adapter.dora: each adapter scales the base's own output"
    if adapter.dropout > 0:
        return f"adapter.dropout={adapter.dropout:g}: what is dropped would depend on the other trials"
    if not isinstance(objective, SftSpec | CptSpec):
        return f"objective.kind={objective.kind}: trials of sft and cpt alone share a process"
    if isinstance(objective, SftSpec) and objective.answers is not None:
        return "objective.answers: held-out answers are generated with one adapter at a time"
    if spec.init_from is not None or spec.base_adapter is not None:
        return "init_from or base_adapter: each trial begins from an adapter of its own"
    for key, value in (base or {}).items():  # `attention_dropout`, GPT-2's `resid_pdrop`
        if "drop" in key and isinstance(value, float) and value > 0:
            return f"the base trains with {key}={value:g}: what is dropped would depend on the other trials"
    if experts := next((key for key in base or {} if "experts" in key), None):
        return f"the base has {experts}: it deals the tokens of all rows to them"
    return None
