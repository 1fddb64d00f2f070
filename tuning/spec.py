"""What a sweep is asked to do: a training spec, and for some of its keys the values to try."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, model_validator

from graftwork.config import Spec
from graftwork.errors import ConfigError
from graftwork.storage import DEFAULT_ROOT, NAME_PATTERN
from graftwork.training.adapter_spec import with_kind
from graftwork.training.spec import TrainSpec
from graftwork.training.strategy_rules import ZERO
from graftwork.tuning.default_space import default_space
from graftwork.tuning.final_spec import FinalsSpec, WinnerSpec, require_finals, require_placeable
from graftwork.tuning.goal_spec import Goal, Goals
from graftwork.tuning.scheduler_spec import (
    AshaSpec,
    HyperbandSpec,
    MedianSpec,
    SchedulerSpec,
    refusal,
    with_grace,
)
from graftwork.tuning.search_spec import PbtSpec, SearchSpec
from graftwork.tuning.space_spec import CategoricalSpace, Domain, IntRange, LogUniform, PowerOfTwo, Space, Uniform

__all__ = [
    "AshaSpec",
    "CategoricalSpace",
    "Domain",
    "HyperbandSpec",
    "IntRange",
    "LogUniform",
    "MedianSpec",
    "PowerOfTwo",
    "TuneSpec",
    "Uniform",
]

NOT_TUNABLE = {
    "kind": "it names the stage",
    "name": "a trial publishes nothing",
    "root": "a trial's records lie with the sweep's",
    "alias": "a trial publishes nothing",
    "num_workers": "it changes the time of a trial, not its result; optim.rows_per_step does",
    "cpus_per_worker": "it changes the time of a trial, not its result",
    "gpus_per_worker": "it changes the time of a trial, not its result",
    "strategy": "a trial that fits runs in one process, and the others all share alike",
    "checkpoint_every": "checkpoint_every of the sweep takes its place",
    "checkpoints": "they do not change a trial's result",
    "recovery": "it does not change a trial's result",
    "outcomes": "a trial measures the held-out loss alone",
    "eval_every": "report_every of the sweep takes its place",
    "optim.epochs": "steps of the sweep takes its place",
    "data.eval": "trials are compared on the same held-out rows",
    "data.eval_rows": "eval_rows of the sweep takes its place",
    "objective.kind": "losses of different kinds can't be compared",
    "objective.loss": "losses of different kinds can't be compared",
    "objective.loss_type": "losses of different kinds can't be compared",
}
"""Keys of `train` that a trial does not read, or that would make losses incomparable."""
NO_PART = {
    "root", "max_concurrent", "reserve_memory", "distributed", "prices", "share_base", "retries", "retry_smaller",
    "checkpoint_every", "finals", "winner", "train",
}  # fmt: skip
"""Keys that do not change a trial of the search; of `train` its recipe does. A finished sweep can be given finals."""
DECIDES_ROWS = ("base", "data", "prompt", "max_length", "on_overlong", "objective", "seed")
"""Keys of `train` that decide the rows of a trial and their order."""
SAME_ROWS = frozenset(
    f"objective.{key}" for key in ("beta", "label_smoothing", "centre", "temperature", "on_policy", "epsilon")
)
"""Numbers of an objective that weigh the loss and leave the rows as they are."""


def decides_rows(key: str) -> bool:
    """Whether two trials that differ in this key have rows of their own."""
    return key not in SAME_ROWS and any(key == other or key.startswith(f"{other}.") for other in DECIDES_ROWS)


class PriceSpec(Spec):
    """What the resources of trials cost, in any currency, so that a plan tells a sum."""

    cpu_hour: float = Field(default=0.0, ge=0)
    gpu_hour: float = Field(default=0.0, ge=0)
    """Of a whole GPU; a trial pays its share."""


class TuneSpec(Spec):
    """One sweep: trials of the same training loop, the best spec chosen by held-out loss."""

    kind: Literal["tune"] = "tune"
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    root: str = DEFAULT_ROOT
    """Where the sweep's records live. No part of its identity."""
    train: TrainSpec
    """The run that is tuned. Trials publish nothing."""
    space: Space = Field(default_factory=lambda given: default_space(given["train"].adapter))
    """Dotted keys of `train` and the values to try, e.g. `adapter.rank: {kind: choice, values: [4, 16]}`. Left out: the
    learning rate, and of a LoRA the rank (`tuning.default_space`)."""
    objectives: Goals = (Goal(),)
    """Metrics to optimize, held-out loss first. With several, the search looks for the Pareto front."""
    search: SearchSpec | None = None
    """null: the whole grid where the space is all choices and no larger than `num_trials`, else TPE from eight trials
    on, and points at random for fewer."""
    num_trials: int = Field(default=4, ge=1)
    """Trials that the search may draw."""
    max_concurrent: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Trials at a time, at most. auto: as many as have room by their predicted memory, CPUs and shares of a GPU."""
    reserve_memory: bool = True
    """Each trial asks the cluster for its predicted memory. false: where nodes declare less than they have."""
    distributed: Literal["auto", "never", "always"] = "auto"
    """Train each trial on `train.num_workers` Ray Train workers with `train.strategy`. auto: only a trial that does not
    fit one process, if the strategy shards (zero3, fsdp2) or offloads."""
    share_base: int = Field(default=1, ge=1)
    """Most LoRA trials that train in one process, on one copy of the base; they need the same rows and shape."""
    retries: int = Field(default=2, ge=0)
    """Times that a trial is run again whose process or machine was lost, or that ran out of memory."""
    retry_smaller: bool = True
    """A trial that ran out of memory is run again with half the rows a forward pass, then with gradient checkpointing:
    the same steps, losses equal up to rounding. false: it has failed."""
    steps: int = Field(default=12, ge=1)
    """Optimizer steps of a trial that is not stopped."""
    eval_rows: int = Field(default=16, ge=1)
    """Held-out rows scored at each report."""
    report_every: int = Field(default=4, ge=1)
    """Optimizer steps between reports, where the scheduler may stop a trial."""
    checkpoint_every: int | None = Field(default=None, ge=1)
    """Optimizer steps between checkpoints of a trial, from which it goes on when its process or the sweep was lost;
    null: it begins anew. They are removed when it has ended."""
    scheduler: SchedulerSpec | None = AshaSpec()
    """null runs every trial to its end."""
    finals: FinalsSpec | None = None
    """null takes the best trial as it is."""
    winner: WinnerSpec | None = None
    """null ends with the best spec, for `graftwork train`; {} trains and publishes it."""
    prices: PriceSpec | None = None
    """null: a plan counts hours of CPUs and GPUs alone."""
    seed: int = 0
    """Of the values drawn; a trial's own seed is `train.seed`."""

    @model_validator(mode="before")
    @classmethod
    def _asha_unless_said(cls, tree: Any) -> Any:
        fields = cls.model_fields
        if isinstance(tree, dict) and isinstance(tree.get("search"), dict) and tree["search"].get("kind") == "pbt":
            tree = {"scheduler": None, **tree}
        return with_grace(with_kind(tree, "scheduler", "asha"), fields["steps"].default, fields["report_every"].default)

    @model_validator(mode="after")
    def _space_fits(self) -> Self:
        if not self.space:
            raise ValueError("space is empty: name at least one key of `train` and its values")
        if self.train.data.eval is None:
            raise ValueError("train.data.eval is not given: trials are compared by loss on held-out rows")
        for key, domain in self.space.items():
            self._check_key(key)
            if decides_rows(key) and not isinstance(domain, CategoricalSpace | PowerOfTwo):
                raise ValueError(f"space.{key} decides the rows, which are prepared first: list its values")
            for value in domain.samples():
                self._check_value(key, value)
            if key == "objective":
                self._check_losses(domain.samples())
        return self

    @model_validator(mode="after")
    def _takes_effect(self) -> Self:
        if self.report_every > self.steps:
            raise ValueError(f"report_every={self.report_every} is more than steps={self.steps}: no report would come")
        if self.scheduler is not None and (reason := refusal(self.scheduler, self.steps, self.report_every)):
            raise ValueError(reason)
        if isinstance(self.search, PbtSpec):
            self._segments_fit(self.search)
        if self.checkpoint_every is not None and self.share_base > 1:
            raise ValueError("checkpoint_every can't take effect with share_base > 1: trials of one process make none")
        most = ("search.population", self.search.population) if isinstance(self.search, PbtSpec) else None
        require_finals(self.finals, *(most or ("num_trials", self.num_trials)), self.space)
        require_placeable(self.winner, self.train)
        return self

    def _segments_fit(self, search: PbtSpec) -> None:
        if reason := search.refusal(self.steps, self.report_every):
            raise ValueError(reason)
        if self.scheduler is not None:
            raise ValueError(
                f"scheduler.kind={self.scheduler.kind} can't go with search.kind=pbt, which ends no member"
            )
        if self.share_base > 1:
            raise ValueError(f"share_base={self.share_base} can't go with search.kind=pbt, whose members change places")
        if self.train.optim.factors or "optim.factors" in self.space:
            raise ValueError("optim.factors can't go with search.kind=pbt, which finds them: take them out")
        if self.train.strategy.kind in ZERO:
            raise ValueError(
                f"train.strategy.kind={self.train.strategy.kind} can't go with search.kind=pbt: DeepSpeed's optimizer "
                "keeps the rate to itself. Set train.strategy.kind=ddp or fsdp2"
            )

    def recipe(self) -> dict[str, Any]:
        """What decides the result, `train` left out, whose own recipe does."""
        return self.model_dump(mode="json", exclude=NO_PART)

    def _check_key(self, key: str) -> None:
        for other, reason in NOT_TUNABLE.items():
            if key == other or key.startswith(f"{other}."):
                raise ValueError(f"space.{key} cannot take effect: {reason}")
        for other in self.space:
            if key.startswith(f"{other}."):
                raise ValueError(f"space.{key} and space.{other} overlap: keep one of them")

    def _check_value(self, key: str, value: JsonValue) -> None:
        try:
            self.train.with_({key: value})
        except ConfigError as error:
            found = f"{error.subject.removeprefix('override: ')}: {error.problem}"
            raise ConfigError(f"space.{key}", found, error.rule, hint_for_key(key, error)) from None

    def _check_losses(self, values: Sequence[JsonValue]) -> None:
        kinds = {self.train.with_({"objective": value}).objective.kind for value in values}
        if len(kinds) > 1:
            raise ValueError(f"space.objective has kinds {', '.join(sorted(kinds))}: {NOT_TUNABLE['objective.kind']}")


def hint_for_key(key: str, error: ConfigError) -> str:
    """What to do where a value of a space is refused: parts that belong together are given together."""
    part = key.partition(".")[0]
    if f"--set '{part}=" in error.hint:
        return f"give whole parts: {part}: {{kind: choice, values: [{{kind: ..., ...}}, {{kind: ...}}]}}"
    return error.hint
