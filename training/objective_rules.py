"""What a kind of finetuning can't be combined with: refused when the spec is read."""

from graftwork.base_model import BaseSpec, QuantSpec
from graftwork.data import DataSpec
from graftwork.training.adapter_spec import AdapterSpec, Ia3Spec, LoraSpec
from graftwork.training.objective_spec import DistillSpec, DpoSpec, ObjectiveSpec, RewardSpec


def taken_effect(
    objective: ObjectiveSpec, adapter: AdapterSpec, data: DataSpec, base: BaseSpec, quant: QuantSpec
) -> None:
    """Raise ValueError where a key of one can't take effect, or can't be kept, beside the others."""
    if isinstance(objective, DistillSpec) and objective.teacher.adapter is None:
        teacher = objective.teacher
        if teacher.base == base and teacher.quant in (None, quant):
            raise ValueError("objective.teacher is the run's own base, from which nothing can be learned: name another "
                             "base, an adapter or another quant")  # fmt: skip
    if not isinstance(objective, DpoSpec | RewardSpec):
        return
    if data.context is not None:
        raise ValueError(f"data.context can't take effect with objective.kind={objective.kind}: put the passages into "
                         "the rows' prompts")  # fmt: skip
    if isinstance(adapter, LoraSpec) and adapter.dropout:
        raise ValueError(f"adapter.dropout={adapter.dropout:g} can't take effect with objective.kind={objective.kind}: "
                         "two answers are compared by the same weights, so TRL switches dropout off")  # fmt: skip
    if isinstance(objective, RewardSpec) and not isinstance(adapter, LoraSpec | Ia3Spec):
        raise ValueError(f"adapter.kind={adapter.kind} with objective.kind=reward: a reward model is a lora or ia3 "
                         "adapter with a score head")  # fmt: skip
