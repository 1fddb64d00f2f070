"""Spec of a sweep: a training spec, the values to try for some of its keys, a search and a scheduler."""

import re
from collections.abc import Container, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, model_validator

from graftwork.artifacts.manifest import VERSION_PATTERN
from graftwork.config import Spec, with_kind
from graftwork.errors import ConfigError
from graftwork.storage.store import DEFAULT_ROOT, NAME_PATTERN
from graftwork.training.spec import TrainSpec
from graftwork.tuning.early_stopping import AshaSpec, SchedulerSpec, refusal, with_grace
from graftwork.tuning.search_grid_random import GridSpec, RandomSpec
from graftwork.tuning.search_optuna import BohbSpec, GpSpec, TpeSpec
from graftwork.tuning.search_pbt import PbtSpec
from graftwork.tuning.search_space import (
    CategoricalSpace,
    Goal,
    Goals,
    PowerOfTwo,
    Space,
    decides_rows,
    default_space,
    hint_for_key,
)

SearchSpec = Annotated[GridSpec | RandomSpec | TpeSpec | GpSpec | BohbSpec | PbtSpec, Field(discriminator="kind")]
"""All search algorithms. `start` of each gives its search."""

# After the search: finals with other seeds, and the winner.


class FinalsSpec(Spec):
    """Runs the best trials again, each with the same other seeds, to test whether the best is better."""

    finalists: int = Field(default=2, ge=2)
    """Best trials of the search that take part: those that ran to their end."""
    repeats: int = Field(default=3, ge=2)
    """Runs of each finalist in all, seeds `train.seed`, +1, ...; the search's own run is the first."""
    alpha: float = Field(default=0.05, gt=0, lt=1)
    """Intervals are at 1 - alpha; one finalist beats another at alpha over all pairs of them together (Holm)."""


class ShadowSpec(Spec):
    """An experiment in which the winner answers copies of live requests; users see the current version's answers."""

    against: Annotated[str, Field(pattern=NAME_PATTERN)] = "latest"
    """Alias of the same task: the version that it points at before the winner is published is the control."""
    experiment: str | dict[str, JsonValue]
    """Path of an experiment spec, or its keys (`endpoint`, `primary`, ...). Its mode, arms and control are replaced."""
    start: bool = False
    """Start it on its endpoint; else the command that does is printed."""


class WinnerSpec(Spec):
    """The winner, trained on the full budget of `train` and published."""

    alias: Annotated[str, Field(pattern=NAME_PATTERN)] | None = None
    """Moved to the winner, e.g. champion, unless the version that it points at has a lower loss on the same rows.
    null publishes the version alone; `train.alias` has no say."""
    retention: bool = True
    """Measured for what it forgot (`outcomes.retention` of a training run)."""
    shadow: ShadowSpec | None = None
    """null starts no experiment."""


def require_finals(finals: FinalsSpec | None, key: str, most: int, space: Container[str]) -> None:
    """Raise ConfigError where a sweep can't have these finals. `key` of the sweep sets the number of trials."""
    if finals is not None and "seed" in space:
        raise ConfigError(
            "finals with space.seed",
            "every finalist runs with the same seeds, train.seed and those that follow",
            "a seed is what finals average over, and no choice: the best seed is luck",
            "take `seed` out of the space",
        )
    if finals is not None and finals.finalists > most:
        raise ConfigError(
            f"finals.finalists={finals.finalists}",
            f"{key}={most}",
            "finalists are trials of the search",
            f"--set finals.finalists={most}" if most > 1 else f"--set {key}=2",
        )


def require_placeable(winner: WinnerSpec | None, train: TrainSpec) -> None:
    """Raise ConfigError where the winner of this training spec can't be published so."""
    if winner is None:
        return
    if train.alias is not None and "alias" in train.model_fields_set:
        raise ConfigError(
            f"train.alias={train.alias!r} with `winner`",
            "it cannot take effect",
            "the winner's alias is winner.alias, and trials publish nothing",
            "take train.alias out",
        )
    if train.adapter.trains_base and (winner.alias or winner.shadow):
        raise ConfigError(
            f"winner.alias or winner.shadow with train.adapter.kind={train.adapter.kind}",
            "all weights are trained",
            "an alias names an adapter, and a base has none",
            "leave both out: `winner: {}` publishes the base",
        )
    if winner.alias and re.fullmatch(VERSION_PATTERN, winner.alias):
        raise ConfigError(
            f"winner.alias={winner.alias!r}", "it looks like a version", "12 hex digits name a version", "rename it"
        )


NOT_TUNABLE = {
    "kind": "it names the stage",
    "name": "a trial publishes nothing",
    "root": "a trial's records are in the sweep's folder",
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
    "objective.loss_type": "losses of different kinds can't be compared",
    "objective.cpo_alpha": "it scales a part of the loss that trials are compared by",
    "objective.desirable_weight": "it scales a part of the loss that trials are compared by",
    "objective.undesirable_weight": "it scales a part of the loss that trials are compared by",
}
"""Keys of `train` that a trial does not read, or that would make losses incomparable."""
NO_PART = {
    "root",
    "max_concurrent",
    "reserve_memory",
    "distributed",
    "prices",
    "share_base",
    "retries",
    "retry_smaller",
    "checkpoint_every",
    "finals",
    "winner",
    "train",
}
"""Keys that do not change a trial of the search; of `train` its recipe does. A finished sweep can be given finals."""


class PriceSpec(Spec):
    """Prices of the resources of trials, in any currency, for the cost of a plan."""

    cpu_hour: float = Field(default=0.0, ge=0)
    gpu_hour: float = Field(default=0.0, ge=0)
    """Of a whole GPU; a trial pays its share."""


class TuneSpec(Spec):
    """One sweep: trials of the same training loop, the best spec chosen by held-out loss."""

    kind: Literal["tune"] = "tune"
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    root: str = DEFAULT_ROOT
    """Store of the sweep's records. No part of its identity."""
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
    """Each trial requests its predicted memory. false: for clusters whose nodes declare less than they have."""
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
    """Optimizer steps between checkpoints of a trial, from which it resumes when its process or the sweep was lost;
    null: it starts again. They are removed when it has ended."""
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
    def _default_scheduler(cls, tree: Any) -> Any:
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
            self.search.check(self)
        if self.checkpoint_every is not None and self.share_base > 1:
            raise ValueError("checkpoint_every can't take effect with share_base > 1: trials of one process make none")
        most = ("search.population", self.search.population) if isinstance(self.search, PbtSpec) else None
        require_finals(self.finals, *(most or ("num_trials", self.num_trials)), self.space)
        require_placeable(self.winner, self.train)
        return self

    def recipe(self) -> dict[str, Any]:
        """Return the keys that decide the result, without `train`, which has its own recipe."""
        return self.model_dump(mode="json", exclude=NO_PART)

    def _check_key(self, key: str) -> None:
        for other, reason in NOT_TUNABLE.items():
            if key == other or key.startswith(f"{other}."):
                raise ValueError(f"space.{key} cannot take effect: {reason}")
        if key == "data.train" and isinstance(self.train.data.eval, float):
            raise ValueError(
                f"space.data.train cannot take effect with train.data.eval={self.train.data.eval:g}, a share of it: "
                f"{NOT_TUNABLE['data.eval']}. Name held-out rows in train.data.eval"
            )
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
