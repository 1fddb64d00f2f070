"""What a process that trains several trials takes: the base once, all else as often as there are trials."""

from collections.abc import Sequence
from dataclasses import replace

from graftwork.memory import FP32, MemoryPlan, RowSizes, micro_batch, predict_training, trained_params
from graftwork.memory.passes import pass_of
from graftwork.model_shape import ModelShape
from graftwork.training.adapter_spec import LoraSpec
from graftwork.training.spec import TrainSpec

LOGIT_COPIES = 3
"""In the compute dtype: the logits, the gradient that is kept in their place, and that times the loss's."""


def predict_together(
    specs: Sequence[TrainSpec], model: ModelShape, rows: RowSizes | None = None, *, value_bytes: int = FP32
) -> MemoryPlan:
    """Peak of one process for trials that can share it (`rule.can_share`), as `predict_training` tells it of one.

    It is that of one trial with all their ranks in one adapter and all their rows in one forward pass. An upper bound:
    the inputs of linears that `tuning.together` keeps in the compute dtype are counted in fp32, as PEFT keeps them.
    """
    first, count = specs[0], len(specs)
    ranks = [spec.adapter.rank for spec in specs if isinstance(spec.adapter, LoraSpec)]
    assert len(ranks) == count, "trials that share a process train a LoRA each"
    sizes = {"rows_per_step": first.optim.rows_per_step * count, "micro_batch": micro_batch(first) * count}
    wide = first.adapter.model_copy(update={"rank": sum(ranks)})
    whole = first.model_copy(update={"adapter": wide, "optim": first.optim.model_copy(update=sizes)})
    plan = predict_training(whole, model, rows, value_bytes=value_bytes)
    scored = pass_of(whole, rows or RowSizes.at_most(first.max_length), micro_batch(whole)).scored
    changed = {"logits": LOGIT_COPIES * scored * model.vocab * value_bytes}
    parts = tuple((name, changed.get(name, size)) for name, size in plan.parts)
    copies = ("adapters as multiplied", trained_params(model, wide) * value_bytes)
    return replace(plan, parts=(*parts, copies), assumptions=(f"{count} trials on one base", *plan.assumptions))
