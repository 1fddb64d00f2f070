"""What a kind of finetuning can't be combined with: refused when the spec is read."""

from typing import TYPE_CHECKING

from graftwork.training.adapter_spec import Ia3Spec, LoraSpec
from graftwork.training.objective_spec import DistillSpec, DpoSpec, RewardSpec

if TYPE_CHECKING:
    from graftwork.training.spec import TrainSpec


def taken_effect(spec: "TrainSpec") -> None:
    """Raise ValueError where a key can't take effect, or can't be kept, beside `objective`."""
    objective, adapter = spec.objective, spec.adapter
    if not isinstance(objective, DpoSpec | RewardSpec | DistillSpec):
        return
    where = f"objective.kind={objective.kind}"
    written = isinstance(objective, DistillSpec) and objective.generate is not None
    if spec.strategy.kind == "zero3" and not written:
        raise ValueError(f"strategy.kind=zero3 can't go with {where}: a second model, a head or a reference is needed "
                         "while the weights are in pieces. Set strategy.kind=fsdp2 or zero2")  # fmt: skip
    if isinstance(objective, DistillSpec):
        _check_teacher(spec, objective)
        return
    if spec.data.context is not None:
        raise ValueError(f"data.context can't take effect with {where}: put the passages into the rows' prompts")
    if isinstance(adapter, LoraSpec) and adapter.dropout:
        raise ValueError(f"adapter.dropout={adapter.dropout:g} can't take effect with {where}: two answers are "
                         "compared by the same weights, so TRL switches dropout off")  # fmt: skip
    if isinstance(objective, RewardSpec) and not isinstance(adapter, LoraSpec | Ia3Spec):
        raise ValueError(f"adapter.kind={adapter.kind} with {where}: a reward model is a lora or ia3 adapter with a "
                         "score head")  # fmt: skip


def _check_teacher(spec: "TrainSpec", objective: DistillSpec) -> None:
    teacher = objective.teacher
    if objective.generate is not None and spec.data.context is not None:
        raise ValueError("data.context can't take effect with objective.generate: the teacher answers without it")
    alike = teacher is not None and teacher.adapter is None and teacher.quant in (None, spec.quant)
    if teacher is not None and alike and teacher.base == spec.base:
        raise ValueError("objective.teacher is the run's own base, from which nothing can be learned: name another "
                         "base, an adapter or another quant")  # fmt: skip
