"""What a sweep is asked to do: a training spec, and for some of its keys the values to try."""

from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from graftwork.config import Spec
from graftwork.errors import ConfigError
from graftwork.storage import DEFAULT_ROOT, NAME_PATTERN
from graftwork.training.spec import TrainSpec

NOT_TUNABLE = {
    "kind": "it names the stage",
    "name": "a trial publishes nothing",
    "root": "a trial writes nothing",
    "alias": "a trial publishes nothing",
    "num_workers": "a trial runs in one process; optim.rows_per_step is what changes the result",
    "cpus_per_worker": "it changes the time of a trial, not its result",
    "gpus_per_worker": "it changes the time of a trial, not its result",
    "checkpoint_every": "a trial writes no checkpoint",
    "eval_every": "report_every of the sweep takes its place",
    "optim.epochs": "steps of the sweep takes its place",
    "data.eval": "trials are compared on the same held-out rows",
    "data.eval_rows": "eval_rows of the sweep takes its place",
}
"""Keys of `train` that a trial does not read, or that would make losses incomparable."""


class Choice(Spec):
    """One of the listed values."""

    kind: Literal["choice"] = "choice"
    values: Annotated[tuple[JsonValue, ...], Field(min_length=1)]

    def samples(self) -> tuple[JsonValue, ...]:
        """Values that all must be allowed."""
        return self.values

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if any(value in self.values[:index] for index, value in enumerate(self.values)):
            raise ValueError(f"values must differ, found {list(self.values)}")
        return self


class _Range(Spec):
    low: float = Field(allow_inf_nan=False)
    high: float = Field(allow_inf_nan=False)

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low={self.low:g} must be less than high={self.high:g}")
        return self

    def samples(self) -> tuple[float, ...]:
        """Both ends and a fraction between them, which an integer key refuses."""
        return self.low, self.high, self.low + 0.381966 * (self.high - self.low)


class Uniform(_Range):
    """A float between `low` and `high`, evenly."""

    kind: Literal["uniform"] = "uniform"


class LogUniform(_Range):
    """A float between `low` and `high`, evenly on the log scale."""

    kind: Literal["loguniform"] = "loguniform"
    low: float = Field(gt=0, allow_inf_nan=False)


Domain = Annotated[Choice | Uniform | LogUniform, Field(discriminator="kind")]


class AshaSpec(Spec):
    """Asynchronous successive halving (Li et al. 2018, arXiv 1810.05934) by Ray Tune."""

    kind: Literal["asha"] = "asha"
    grace_steps: int = Field(default=4, ge=1)
    """No trial is stopped before this many optimizer steps."""
    reduction: int = Field(default=3, ge=2)
    """One of this many trials goes on at each rung."""

    def rungs(self, steps: int) -> tuple[int, ...]:
        """Steps at which a trial may be stopped: grace, grace·reduction, ... below `steps`."""
        found = []
        rung = self.grace_steps
        while rung < steps:
            found.append(rung)
            rung *= self.reduction
        return tuple(found)


class TuneSpec(Spec):
    """One sweep: trials of the same training loop, the best spec chosen by held-out loss."""

    kind: Literal["tune"] = "tune"
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    root: str = DEFAULT_ROOT
    """Where the sweep's records live. No part of its identity."""
    train: TrainSpec
    """The run that is tuned. Trials publish nothing."""
    space: dict[str, Domain]
    """Dotted keys of `train` and the values to try, e.g. `adapter.rank: {kind: choice, values: [4, 16]}`."""
    num_trials: int = Field(default=4, ge=1)
    """Trials drawn at random; the whole grid where the space is all choices and the grid is no larger than this."""
    max_concurrent: int = Field(default=2, ge=1)
    """Trials at a time, each in its own process with `train.cpus_per_worker` CPUs."""
    steps: int = Field(default=12, ge=1)
    """Optimizer steps of a trial that is not stopped."""
    eval_rows: int = Field(default=16, ge=1)
    """Held-out rows scored at each report."""
    report_every: int = Field(default=4, ge=1)
    """Optimizer steps between reports, where the scheduler may stop a trial."""
    scheduler: AshaSpec | None = AshaSpec()
    """null runs every trial to its end."""
    seed: int = 0
    """Of the values drawn; a trial's own seed is `train.seed`."""

    @model_validator(mode="after")
    def _space_fits(self) -> Self:
        if not self.space:
            raise ValueError("space is empty: name at least one key of `train` and its values")
        if self.train.data.eval is None:
            raise ValueError("train.data.eval is not given: trials are compared by loss on held-out rows")
        for key, domain in self.space.items():
            self._check_key(key)
            for value in domain.samples():
                self._check_value(key, value)
        return self

    @model_validator(mode="after")
    def _takes_effect(self) -> Self:
        if self.report_every > self.steps:
            raise ValueError(f"report_every={self.report_every} is more than steps={self.steps}: no report would come")
        if self.scheduler is not None and self.scheduler.grace_steps >= self.steps:
            raise ValueError(
                f"scheduler.grace_steps={self.scheduler.grace_steps} must be less than steps={self.steps}, "
                "or no trial could be stopped; `scheduler: null` runs every trial to its end"
            )
        return self

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
            found = f"{error.asked.removeprefix('override: ')}: {error.found}"
            raise ConfigError(f"space.{key}", found, error.rule, error.next_move) from None
