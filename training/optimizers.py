"""Optimizers of a run: their names in transformers, the bytes of their state, and Muon with AdamW for other weights."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from graftwork.base.model_shape import ModelShape
    from graftwork.training.spec import OptimSpec, TrainSpec

OptimizerKind = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "muon"]
BETAS, EPS = (0.9, 0.999), 1e-8
FP32 = 4
BLOCK = 256
"""Values of a block of bitsandbytes' 8-bit states, which share one fp32 scale; smaller weights than 4,096 values keep
fp32 states."""


STEP_BYTES: Mapping[OptimizerKind, int] = {
    "adamw": 28,
    "adamw_8bit": 16,
    "paged_adamw_8bit": 16,
    "adafactor": 64,
    "muon": 40,
}
"""Read and written of one trained value in a step: weight, gradient, states in fp32 or 8 bits, and the updates that
Adafactor and Muon make in passing."""
CPU_STEP_S: Mapping[OptimizerKind, float] = {"adamw_8bit": 25e-9, "adafactor": 6e-9, "muon": 5e-9}
"""Of one trained value in one core's second, where it is not the memory's: 20 to 30, 2 to 9 and, without Muon's
products, 5 ns (matrices of 1,024 x 4,096 and 16 x 65,536, torch 2.13, bitsandbytes 0.50)."""
MUON_ITERATIONS = 5
"""Newton-Schulz iterations of a step of torch.optim.Muon, in bfloat16."""


def optimizer_arguments(optim: "OptimSpec") -> dict[str, Any]:
    """Return TrainingArguments of the optimizer. Muon has no name in transformers 5.24: `set_optimizer` adds it."""
    named = {} if optim.kind in ("adamw", "muon") else {"optim": optim.kind}  # its own AdamW is torch's fused one
    return {**named, "adam_beta1": optim.betas[0], "adam_beta2": optim.betas[1], "adam_epsilon": optim.eps}


def set_optimizer(trainer: Any, optim: "OptimSpec") -> None:
    """Make a transformers Trainer build Muon where the spec asks for it. Before training."""
    if optim.kind == "muon":
        from graftwork.training.muon import Muon

        arguments = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
        trainer.optimizer_cls_and_kwargs = (lambda: Muon.of_model, arguments)


def check(optim: "OptimSpec", run: "TrainSpec") -> None:
    """Raise ValueError for an optimizer that the run's device, strategy or adapter cannot have, or idle keys of it."""
    kind = optim.kind
    if kind == "paged_adamw_8bit" and run.gpus_per_worker == 0:
        raise ValueError(
            "optim.kind=paged_adamw_8bit can't take effect with gpus_per_worker=0: its state is paged between GPU and "
            "host memory (bitsandbytes). Set optim.kind=adamw_8bit"
        )
    if kind != "adamw" and run.strategy.kind != "ddp":
        raise ValueError(
            f"optim.kind={kind} can't go with strategy.kind={run.strategy.kind}: workers would step parts of a weight, "
            "and its state is that of whole weights. Set optim.kind=adamw or strategy.kind=ddp"
        )
    if kind == "adafactor" and (optim.betas != BETAS or optim.eps != EPS):
        raise ValueError(
            "optim.betas and optim.eps can't take effect with optim.kind=adafactor: it has no first moment, and its "
            "decay depends on the step (arXiv 1804.04235). Leave them out"
        )
    if kind == "muon" and getattr(run.adapter, "rank", 2) == 1:
        raise ValueError(
            "optim.kind=muon can't be combined with adapter.rank=1: its factors are vectors, and Muon steps matrices. "
            "Set adapter.rank=2 or optim.kind=adamw"
        )
    if kind == "muon" and not run.adapter.trains_matrices:
        raise ValueError(
            f"optim.kind=muon can't go with adapter.kind={run.adapter.kind}: Muon steps matrices, and the adapter has "
            "none. Set optim.kind=adamw"
        )


def state_bytes(spec: "TrainSpec", model: "ModelShape") -> int:
    """Return the bytes of the optimizer's state, where one worker steps whole weights in fp32."""
    trained, kind = spec.adapter.trained_params(model), spec.optim.kind
    plain = 0  # embeddings, norms and the head, whose state is AdamW's in fp32
    if spec.adapter.trains_base:
        packed_head = model.head_params if kind.endswith("8bit") and not model.tied else 0
        plain = model.plain_params - packed_head
    if kind == "adamw":
        return 2 * trained * FP32
    if kind == "muon":
        return (trained + plain) * FP32
    if kind == "adafactor":  # one value for each row and column of a matrix
        narrow = model.hidden if spec.adapter.trains_base else getattr(spec.adapter, "rank", 1)
        return round(trained * FP32 * min(1.0, 1 / narrow + 1 / model.hidden))
    return round(2 * plain * FP32 + 2 * (trained - plain) * (1 + FP32 / BLOCK))


def muon_flops(spec: "TrainSpec", model: "ModelShape") -> float:
    """Return the operations of Muon's products in a step: of a matrix of m rows and n >= m columns 4 m2 n + 2 m3."""
    if spec.optim.kind != "muon":
        return 0.0
    if spec.adapter.trains_base:
        sizes = [(x.inputs, x.outputs, x.count) for x in model.linears if x.part != "outside"]
    else:  # A and B of each target; other adapters have few values
        rank, which = getattr(spec.adapter, "rank", 0), getattr(spec.adapter, "which", "all-linear")
        sizes = [(rank, side, x.count) for x in model.adapted_linears(which) for side in (x.inputs, x.outputs)]
    sides = ((min(one, other), max(one, other), count) for one, other, count in sizes)
    return float(sum(MUON_ITERATIONS * count * (4 * m * m * n + 2 * m**3) for m, n, count in sides))


def split_weights(model: "torch.nn.Module") -> Iterator[tuple[str, "torch.nn.Parameter", bool]]:
    """Yield (name, weight, True where Muon steps it): trained matrices, embeddings and the output head left out."""
    import torch

    owners = (module for module in model.modules() if isinstance(module, torch.nn.Embedding))
    others = {id(weight) for module in owners for weight in module.parameters()}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    others |= {id(weight) for weight in head.parameters()} if head is not None else set()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            matrix = weight.ndim == 2 and min(weight.shape) > 1 and "trainable_tokens" not in name
            yield name, weight, matrix and id(weight) not in others
