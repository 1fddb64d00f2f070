"""Training spec: its fields are the YAML, the keys of `--set` and the search space of a sweep."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from graftwork.adapters.lora import LoraSpec
from graftwork.adapters.spec import AdapterSpec
from graftwork.base.source import BaseSpec
from graftwork.config import Spec, with_kind
from graftwork.datasets.rows import DataSpec
from graftwork.planning.hardware import AUTO, Gpus, resolved_count
from graftwork.prompts.render import PromptSpec
from graftwork.quantization import QuantSpec
from graftwork.storage.store import ALIAS_PATTERN, DEFAULT_ROOT, NAME_PATTERN
from graftwork.training import lr_schedule, optimizers
from graftwork.training.evaluation.spec import OutcomesSpec
from graftwork.training.lr_schedule import Factors, Schedule
from graftwork.training.objectives.sft import SftSpec
from graftwork.training.objectives.spec import ObjectiveSpec
from graftwork.training.optimizers import OptimizerKind
from graftwork.training.strategies import StrategySpec


class CheckpointSpec(Spec):
    """What becomes of the checkpoints that `checkpoint_every` makes."""

    keep_last: int = Field(default=2, ge=1)
    """Newest complete checkpoints kept; the second in case the newest is corrupt."""
    keep_best: int = Field(default=0, ge=0)
    """Checkpoints kept besides, by `metric`."""
    metric: str = "eval_loss"
    """`loss`, `eval_loss` or a figure that the objective logs."""
    higher_is_better: bool = False
    outage_s: float = Field(default=900.0, ge=0)
    """Seconds that storage may be out of reach: shorter only delays, longer ends the run."""

    def check(self, run: "TrainSpec") -> None:
        """Raise ValueError for a metric that the run's evaluations cannot give."""
        if self.keep_best and self.metric.startswith("eval_"):
            if run.data.eval is None:
                raise ValueError(f"checkpoints.metric={self.metric} needs held-out rows, and data.eval is not given")
            if run.checkpoint_every % run.eval_every:
                raise ValueError(
                    f"checkpoint_every={run.checkpoint_every} must be a multiple of eval_every={run.eval_every}, "
                    f"so that each checkpoint has the {self.metric} that keep_best={self.keep_best} asks for"
                )
        if not self.keep_best and (self.metric != "eval_loss" or self.higher_is_better):
            raise ValueError("checkpoints.metric takes effect with checkpoints.keep_best alone")


class RecoverySpec(Spec):
    """Recovery from a lost machine."""

    min_workers: int | None = Field(default=None, ge=1)
    """Go on with as few as these; null always waits for `num_workers`."""
    wait_s: float = Field(default=30.0, gt=0)
    """Seconds that a lost machine has to come back before the run goes on with fewer workers."""
    deadline_s: float = Field(default=600.0, gt=0)
    """Seconds without enough machines after which the run ends."""


def world_sizes(spec: "TrainSpec") -> list[int]:
    """Numbers of workers that a run may go on with, largest first: each gets the same number of rows a step."""
    least = spec.recovery.min_workers or spec.num_workers
    share = spec.strategy.context_parallel
    sizes = range(spec.num_workers, least - 1, -1)
    return [n for n in sizes if n % share == 0 and spec.optim.rows_per_step % (n // share) == 0]


class OptimSpec(Spec):
    """Optimizer of the trained weights, its learning rate and the rows of its steps."""

    kind: OptimizerKind = "adamw"
    """adamw_8bit, paged_adamw_8bit: bitsandbytes' AdamW with 8-bit states, paged ones on GPUs alone. adafactor: arXiv
    1804.04235 at a given rate. muon: torch's Muon on matrices, AdamW on all other weights."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = optimizers.BETAS
    """Beta coefficients of AdamW."""
    eps: float = Field(default=optimizers.EPS, gt=0)
    """Added to the root of AdamW's second moment."""
    lr: float = Field(default=2e-3, gt=0)
    """Peak learning rate, reached after the warm-up."""
    schedule: Schedule = "linear"
    """Decay from the peak over the run, after the warm-up: to 0, or to `min_lr_ratio`. wsd: the peak holds until the
    decay (warmup-stable-decay, arXiv 2404.06395)."""
    min_lr_ratio: float | None = Field(default=None, ge=0, lt=1)
    """Least learning rate as a share of `lr`, of cosine_with_min_lr (null: 0.1) and wsd (null: 0)."""
    decay_ratio: float | None = Field(default=None, gt=0, le=1)
    """Share of the steps that the decay of wsd takes (null: 0.1), along a cosine."""
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
    def _check_factors(self) -> Self:
        shares = [share for share, _ in self.factors]
        if any(not 0 <= share < 1 for share in shares) or shares != sorted(set(shares)):
            raise ValueError(f"optim.factors: shares must rise, from 0 to less than 1, found {shares}")
        if bad := [factor for _, factor in self.factors if factor <= 0]:
            raise ValueError(f"optim.factors: a factor must be greater than 0, found {bad[0]:g}")
        lr_schedule.check(self)
        return self

    def check(self, run: "TrainSpec") -> None:
        """Raise ValueError for keys of the run that the optimizer or gradient checkpointing cannot be combined with."""
        optimizers.check(self, run)
        if run.adapter.virtual_tokens and self.gradient_checkpointing:
            raise ValueError(
                f"optim.gradient_checkpointing={self.gradient_checkpointing} can't go with adapter.kind="
                f"{run.adapter.kind}: it is KV, which no block computed again would find. Set "
                "optim.gradient_checkpointing=false and a smaller optim.micro_batch, or adapter.kind=lora"
            )

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

    @property
    def replicas(self) -> int:
        """Groups of workers of which each computes whole rows; the workers themselves without context parallelism."""
        return self.num_workers // self.strategy.context_parallel

    def recipe(self) -> dict[str, Any]:
        """The fields that decide the run's result, besides the contents of base and data: not its place.

        The number of workers is left out: a step sees the same rows on any number, so a run can go on with fewer.
        """
        kept = {"name", "quant", "prompt", "objective", "adapter", "optim", "eval_every", "seed"}
        fields = self.model_dump(mode="json", include=kept)
        del fields["optim"]["micro_batch"], fields["optim"]["gradient_checkpointing"], fields["quant"]["resident"]
        for key in ("factors", "kind", "betas", "eps", "min_lr_ratio", "decay_ratio"):  # at their default: as before
            if getattr(self.optim, key) == OptimSpec.model_fields[key].default:
                del fields["optim"][key]
        if self.objective.kind == "dpo":
            fields["objective"]["loss"] = fields["objective"].pop("loss_type")  # its name in identities of older runs
        for key in ("experts", "router", "target_modules", "modules_to_save"):
            if not fields["adapter"].get(key, True):
                del fields["adapter"][key]
        fields["objective"].pop("teacher", None)  # pinned with the rows, by content
        return {**fields, "device": "cuda" if self.gpus else "cpu"}

    @model_validator(mode="before")
    @classmethod
    def _fill_kinds(cls, tree: Any) -> Any:
        return with_kind(with_kind(tree, "adapter", "lora"), "objective", "sft")

    @model_validator(mode="after")
    def _takes_effect(self) -> Self:
        if self.optim.rows_per_step % max(1, self.replicas):
            shared = self.strategy.context_parallel
            raise ValueError(
                f"optim.rows_per_step={self.optim.rows_per_step} must be a multiple of num_workers={self.num_workers}"
                f"{f' / strategy.context_parallel={shared}' if shared > 1 else ''}, "
                "so that each worker gets the same number of rows a step"
            )
        if self.data.eval is None and "eval_every" in self.model_fields_set:
            raise ValueError("eval_every is set but data.eval is not given, so it cannot take effect")
        self.objective.check(self)
        self.adapter.check_run(self)
        self._check_base_adapter()
        self._check_saved_modules()
        self.optim.check(self)
        self.checkpoints.check(self)
        if self.recovery.min_workers is not None and self.recovery.min_workers > self.num_workers:
            raise ValueError(
                f"recovery.min_workers={self.recovery.min_workers} is more than num_workers={self.num_workers}"
            )
        self.strategy.check(self)
        return self

    def _check_saved_modules(self) -> None:
        """Raise ValueError for modules that are trained whole where a loss or a strategy does not reach them."""
        saved, traits = list(getattr(self.adapter, "modules_to_save", ())), self.objective.traits
        if not saved:
            return
        if traits.head != "logits" or traits.samples_answers or not traits.adds_up:
            raise ValueError(
                f"adapter.modules_to_save={saved} can't go with objective.kind={self.objective.kind}: its loss "
                "multiplies by the weights of the base's own head, or trains rows of the embedding. Set "
                "objective.kind=sft or cpt"
            )
        if self.strategy.kind != "ddp":
            raise ValueError(
                f"adapter.modules_to_save={saved} can't go with strategy.kind={self.strategy.kind}: whole modules are "
                "trained next to sharded ones there. Set strategy.kind=ddp"
            )

    def _check_base_adapter(self) -> None:
        """Raise ValueError for an alias that nothing is published under, and for what cannot be added to an adapter."""
        if self.adapter.trains_base and self.alias not in (None, type(self).model_fields["alias"].default):
            raise ValueError(
                f"alias={self.alias} can't take effect with adapter.kind={self.adapter.kind}: the new base is named by "
                "its place, <root>/bases/<name>/<version>. Leave alias out"
            )
        below = self.base_adapter
        if below is None:
            return
        if not self.adapter.adds_up:
            raise ValueError(
                f"base_adapter={below} can't go with adapter={self.adapter.describe()}: the sum of both is published, "
                "and only a LoRA without DoRA adds to one. Set adapter.kind=lora"
            )
        if self.init_from is not None:
            raise ValueError(
                f"base_adapter={below} can't go with init_from={self.init_from}: init_from is trained on, base_adapter "
                "stays frozen. Give one of them"
            )
        if not self.objective.traits.adds_up:
            raise ValueError(
                f"base_adapter={below} can't go with objective.kind={self.objective.kind}: a score head or trained "
                "tokens are no part of a sum. Leave base_adapter out"
            )
        if below.partition("@")[0] == self.name:
            raise ValueError(
                f"base_adapter={below} can't name the task itself: each run would build on the one before. Set "
                "init_from to continue it, or set name to another task"
            )
