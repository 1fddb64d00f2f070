"""What a training run is asked to do. The YAML, the `--set` keys and the sweep's search space are these fields."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from graftwork.adapters.lora import LoraSpec
from graftwork.adapters.spec import AdapterSpec, with_kind
from graftwork.base.spec import BaseSpec
from graftwork.config import Spec
from graftwork.datasets.rows import DataSpec
from graftwork.planning.accelerators import AUTO, Gpus, resolved_count
from graftwork.prompts.render import PromptSpec
from graftwork.quantization.spec import QuantSpec
from graftwork.storage.store import ALIAS_PATTERN, DEFAULT_ROOT, NAME_PATTERN
from graftwork.training.evaluation.spec import OutcomesSpec
from graftwork.training.lr_schedule import Factors
from graftwork.training.lr_schedule import refusal as refusal_of_factors
from graftwork.training.objectives.spec import ObjectiveSpec, SftSpec, check_rl
from graftwork.training.objectives.text_spec import check_text
from graftwork.training.spec_rules import check_adapter, check_strategy, taken_effect

# Which checkpoints are kept, and what a run puts up with before it ends. No part of a run's identity.


class CheckpointSpec(Spec):
    """What becomes of the checkpoints that `checkpoint_every` makes."""

    keep_last: int = Field(default=2, ge=1)
    """Newest whole checkpoints kept; one would do, the second is for the disk that lies."""
    keep_best: int = Field(default=0, ge=0)
    """Checkpoints kept besides, by `metric`."""
    metric: str = "eval_loss"
    """`loss`, `eval_loss` or a figure that the objective logs."""
    higher_is_better: bool = False
    outage_s: float = Field(default=900.0, ge=0)
    """Seconds that storage may be out of reach: shorter only delays, longer ends the run."""


class RecoverySpec(Spec):
    """What happens when a machine is lost."""

    min_workers: int | None = Field(default=None, ge=1)
    """Go on with as few as these; null always waits for `num_workers`."""
    wait_s: float = Field(default=30.0, gt=0)
    """Seconds that a lost machine has to come back before the run goes on with fewer workers."""
    deadline_s: float = Field(default=600.0, gt=0)
    """Seconds without enough machines after which the run ends."""


def refusal(spec: "TrainSpec") -> str | None:
    """Why these fields cannot take effect together."""
    kept, least = spec.checkpoints, spec.recovery.min_workers
    if kept.keep_best and kept.metric.startswith("eval_"):
        if spec.data.eval is None:
            return f"checkpoints.metric={kept.metric} needs held-out rows, and data.eval is not given"
        if spec.checkpoint_every % spec.eval_every:
            return (
                f"checkpoint_every={spec.checkpoint_every} must be a multiple of eval_every={spec.eval_every}, "
                f"so that each checkpoint has the {kept.metric} that keep_best={kept.keep_best} asks for"
            )
    if not kept.keep_best and (kept.metric != "eval_loss" or kept.higher_is_better):
        return "checkpoints.metric takes effect with checkpoints.keep_best alone"
    if least is not None and least > spec.num_workers:
        return f"recovery.min_workers={least} is more than num_workers={spec.num_workers}"
    return None


def world_sizes(spec: "TrainSpec") -> list[int]:
    """Numbers of workers that a run may go on with, largest first: each gets the same number of rows a step."""
    least = spec.recovery.min_workers or spec.num_workers
    return [n for n in range(spec.num_workers, least - 1, -1) if spec.optim.rows_per_step % n == 0]


# How the workers of a run share model and optimizer.


class StrategySpec(Spec):
    """No part of a run's identity: every strategy computes the same step."""

    kind: Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"] = "ddp"
    """ddp: a copy a worker. zero1/2/3: DeepSpeed shards optimizer / + gradients / + weights (arXiv 1910.02054). fsdp2:
    torch shards all three, an nf4 base included."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where a GPU's part of the optimizer's state lies; zero1, zero2, zero3; nvme zero3 alone."""
    offload_weights: Literal["none", "cpu", "nvme"] = "none"
    """Where a GPU's part of the weights lies; zero3, and fsdp2 on GPUs (with the optimizer's state, cpu alone)."""
    nvme_path: str | None = None
    """Folder on a fast disk of each machine, where something is offloaded to nvme."""


class OptimSpec(Spec):
    """AdamW on the adapter's parameters."""

    lr: float = Field(default=2e-3, gt=0)
    """Peak learning rate, reached after the warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Decay from the peak to 0 over the run, after the warm-up."""
    factors: Factors = ()
    """Further factors of the learning rate, e.g. [[0.5, 0.8]]: after half of the steps it is 0.8 of the schedule's.
    What population based training finds (`kind: tune`, `search: {kind: pbt}`)."""
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps that the learning rate rises linearly from 0."""
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the training rows."""
    rows_per_step: int = Field(default=8, ge=1)
    """Rows per optimizer step over all workers: constant when the number of workers changes."""
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = 4
    """Most rows per forward pass on one worker: the largest divisor of its rows a step; the rest accumulates.
    auto: as many as the plan says will fit."""
    gradient_checkpointing: bool | Literal["auto"] = False
    """Keep only each block's input and compute the block again in the backward pass: less memory, a third more time.
    auto: where the plan says that it would not fit without."""

    @model_validator(mode="after")
    def _factors_rise(self) -> Self:
        if reason := refusal_of_factors(self.factors):
            raise ValueError(reason)
        return self

    @property
    def rows_per_pass(self) -> int:
        """`micro_batch` of a spec whose `auto` was settled (training/planning/plan.py), as every worker's is."""
        assert self.micro_batch != "auto", "the driver settles optim.micro_batch before any worker starts"
        return self.micro_batch


class TrainSpec(Spec):
    """One training run: it ends in one published adapter version."""

    kind: Literal["train"] = "train"
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    """The task: the adapter is published as `name`, and run folders begin with it."""
    root: str = DEFAULT_ROOT
    """Where runs, adapters and caches live: a folder, `file://` or `s3://`. No part of the run's identity."""
    base: BaseSpec
    quant: QuantSpec = QuantSpec()
    data: DataSpec
    prompt: PromptSpec = PromptSpec()
    max_length: int = Field(default=512, ge=8)
    """Longest row in tokens."""
    on_overlong: Literal["drop", "refuse"] = "drop"
    """A longer row is dropped and counted, or refused before anything starts. Never cut."""
    objective: ObjectiveSpec = SftSpec()
    adapter: AdapterSpec = LoraSpec()
    optim: OptimSpec = OptimSpec()
    strategy: StrategySpec = StrategySpec()
    num_workers: int = Field(default=2, ge=1)
    """Data-parallel workers of Ray Train. A single one on this machine is a child process, without Ray."""
    cpus_per_worker: float = Field(default=1.0, gt=0)
    """CPUs reserved for, and threads used by, one worker."""
    gpus_per_worker: Gpus = AUTO
    """GPUs reserved for one worker, which computes on one; 0 trains on the CPU. auto: 1 where the target has GPUs, else
    0, resolved before the run is named: run and job identities hold the number."""
    checkpoint_every: int = Field(default=20, ge=1)
    """Optimizer steps between checkpoints; a rerun continues from the last."""
    checkpoints: CheckpointSpec = CheckpointSpec()
    recovery: RecoverySpec = RecoverySpec()
    eval_every: int = Field(default=20, ge=1)
    """Optimizer steps between evaluations, where `data.eval` is given."""
    outcomes: OutcomesSpec = OutcomesSpec()
    """What is measured before and after. No part of the run's identity: a finished run is measured when it is asked."""
    seed: int = 0
    init_from: Annotated[str, Field(pattern=ALIAS_PATTERN)] | None = None
    """Start from this published adapter (`task@alias`) instead of fresh weights; rank and targets must be equal."""
    base_adapter: Annotated[str, Field(pattern=ALIAS_PATTERN)] | None = None
    """Train on top of this published LoRA, which stays as it is, e.g. a language below a task. Both are published as
    one: their exact sum, of both ranks together, on the same base."""
    alias: Annotated[str, Field(pattern=NAME_PATTERN)] | None = "latest"
    """Alias that points at the new version once it is published; null publishes without moving any."""

    @property
    def gpus(self) -> float:
        """GPUs of a worker."""
        return resolved_count(self.gpus_per_worker)

    def recipe(self) -> dict[str, Any]:
        """The fields that decide the run's result, besides the contents of base and data: not where it lies or runs.

        The number of workers is left out: a step sees the same rows on any number, so a run can go on with fewer.
        """
        kept = {"name", "quant", "prompt", "objective", "adapter", "optim", "eval_every", "seed"}
        fields = self.model_dump(mode="json", include=kept)
        del fields["optim"]["micro_batch"], fields["optim"]["gradient_checkpointing"], fields["quant"]["resident"]
        if not self.optim.factors:
            del fields["optim"]["factors"]
        fields["objective"].pop("teacher", None)  # pinned with the rows, wherever it lies
        return {**fields, "device": "cuda" if self.gpus else "cpu"}

    @model_validator(mode="before")
    @classmethod
    def _usual_kinds(cls, tree: Any) -> Any:
        return with_kind(with_kind(tree, "adapter", "lora"), "objective", "sft")

    @model_validator(mode="after")
    def _takes_effect(self) -> Self:
        per_step = self.num_workers
        if self.optim.rows_per_step % per_step:
            raise ValueError(
                f"optim.rows_per_step={self.optim.rows_per_step} must be a multiple of num_workers={per_step}, "
                "so that each worker gets the same number of rows a step"
            )
        if self.data.eval is None and "eval_every" in self.model_fields_set:
            raise ValueError("eval_every is set but data.eval is not given, so it cannot take effect")
        taken_effect(self)
        check_adapter(self)
        check_text(self)
        if reason := refusal(self):
            raise ValueError(reason)
        check_strategy(self)
        check_rl(self)
        return self
