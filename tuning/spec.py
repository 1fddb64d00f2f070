"""What a sweep is asked to do: a training spec, and for some of its keys the values to try."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from graftwork.config import Spec
from graftwork.storage import DEFAULT_ROOT, NAME_PATTERN
from graftwork.training.spec import TrainSpec


class Choice(Spec):
    """One of the listed values."""

    kind: Literal["choice"] = "choice"
    values: Annotated[list[Any], Field(min_length=1)]


class Uniform(Spec):
    """A float between `low` and `high`, evenly."""

    kind: Literal["uniform"] = "uniform"
    low: float
    high: float


class LogUniform(Spec):
    """A float between `low` and `high`, evenly on the log scale."""

    kind: Literal["loguniform"] = "loguniform"
    low: float = Field(gt=0)
    high: float = Field(gt=0)


Domain = Annotated[Choice | Uniform | LogUniform, Field(discriminator="kind")]


class AshaSpec(Spec):
    """Asynchronous successive halving (Li et al. 2018, arXiv 1810.05934) by Ray Tune."""

    kind: Literal["asha"] = "asha"
    grace_steps: int = Field(4, ge=1)
    """No trial is stopped before this many optimizer steps."""
    reduction: int = Field(3, ge=2)
    """One of this many trials goes on at each rung."""


class TuneSpec(Spec):
    """One sweep: trials of the same training loop, the best spec chosen by held-out loss."""

    kind: Literal["tune"] = "tune"
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    root: str = DEFAULT_ROOT
    train: TrainSpec
    """The run that is tuned. Trials publish nothing."""
    space: dict[str, Domain]
    """Dotted keys of `train` and the values to try, e.g. `adapter.rank: {kind: choice, values: [4, 16]}`."""
    num_trials: int = Field(4, ge=1)
    max_concurrent: int = Field(2, ge=1)
    steps: int = Field(12, ge=1)
    """Optimizer steps of a trial that is not stopped."""
    eval_rows: int = Field(16, ge=1)
    """Held-out rows scored at each report."""
    report_every: int = Field(4, ge=1)
    """Optimizer steps between reports, where the scheduler may stop a trial."""
    scheduler: AshaSpec | None = AshaSpec()
    """null runs every trial to its end."""
    seed: int = 0

    @model_validator(mode="after")
    def _space_fits(self) -> Self:
        if not self.space:
            raise ValueError("space is empty: name at least one key of `train` and its values")
        if self.train.data.eval is None:
            raise ValueError("train.data.eval is not given: trials are compared by loss on held-out rows")
        for key, domain in self.space.items():
            samples = domain.values if isinstance(domain, Choice) else [domain.low, domain.high]
            for value in samples:
                self.train.with_({key: value})
        return self
