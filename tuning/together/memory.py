"""What a process that trains several trials takes: the base once, all else as often as there are trials."""

from collections.abc import Sequence
from dataclasses import replace

from graftwork.memory import FP32, MemoryPlan, RowSizes, micro_batch, predict_training, saved_bytes, trained_params
from graftwork.memory.passes import Pass, pass_of
from graftwork.memory.training import ALLOCATOR_SHARE
from graftwork.model_shape import ModelShape
from graftwork.training.adapter_spec import LoraSpec, PrefixSpec
from graftwork.training.spec import TrainSpec
from graftwork.tuning.together.rule import LONGEST

LOGIT_COPIES = 3
"""In the compute dtype: the logits, the gradient that is kept in their place, and that times the loss's."""


def predict_together(
    specs: Sequence[TrainSpec], model: ModelShape, rows: RowSizes | None = None, *, value_bytes: int = FP32
) -> MemoryPlan:
    """Peak of one process for trials that can share it (`rule.can_share`), as `predict_training` tells it of one.

    It is that of one trial with all their ranks in one adapter and all their rows in one forward pass; on a CPU with
    the activations that these layers keep, on a GPU an upper bound.
    """
    whole, rows = _as_one(specs), rows and replace(rows, each=None)  # every trial takes the same rows: the longest
    plan = predict_training(whole, model, rows, value_bytes=value_bytes)
    taken = pass_of(whole, rows or RowSizes.at_most(whole.max_length), micro_batch(whole))
    changed = {} if whole.gpus else _on_cpu(whole, model, taken, plan, value_bytes)
    parts = tuple((name, changed.get(name, size)) for name, size in plan.parts)
    copies = ("adapters as multiplied", trained_params(model, whole.adapter) * value_bytes)
    return replace(plan, parts=(*parts, copies), assumptions=(f"{len(specs)} trials on one base", *plan.assumptions))


def _as_one(specs: Sequence[TrainSpec]) -> TrainSpec:
    """One trial that is as large as all. No spec that a person could write: ranks end at 256 there."""
    first, count = specs[0], len(specs)
    ranks = [spec.adapter.rank for spec in specs if isinstance(spec.adapter, LoraSpec)]
    assert len(ranks) == count, "trials that share a process train a LoRA each"
    sizes = {"rows_per_step": first.optim.rows_per_step * count, "micro_batch": micro_batch(first) * count}
    adapter = first.adapter.model_copy(update={"rank": sum(ranks)})
    return first.model_copy(update={"adapter": adapter, "optim": first.optim.model_copy(update=sizes)})


def _on_cpu(whole: TrainSpec, model: ModelShape, taken: Pass, plan: MemoryPlan, value_bytes: int) -> dict[str, int]:
    """The parts that are not those of PEFT's layers and TRL's loss."""
    logits = LOGIT_COPIES * taken.scored * model.vocab * value_bytes
    held = plan.part("activations")
    if not whole.optim.gradient_checkpointing:
        held = taken.tokens * (model.layers * _block(whole, model, taken, value_bytes) + 2 * model.hidden * value_bytes)
    return {"activations": held, "logits": logits, "allocator": round(ALLOCATOR_SHARE * (held + logits))}


def _block(whole: TrainSpec, model: ModelShape, taken: Pass, value_bytes: int) -> int:
    """Bytes that a token leaves in one block: of the frozen block, of the inputs of its targets, once for siblings, and
    the chances of short rows, in fp32 and in the compute dtype."""
    frozen = saved_bytes(model, PrefixSpec(), value_bytes=value_bytes)  # a prefix keeps nothing in a block
    read = model.read(whole.adapter.targets) if isinstance(whole.adapter, LoraSpec) else 0
    products = taken.row <= LONGEST and value_bytes < FP32
    return round(frozen) + read * value_bytes + products * model.heads * taken.row * (FP32 + value_bytes)
