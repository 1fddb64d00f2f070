"""How a sweep chooses the points of its space."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from graftwork.config import Spec


class GridSpec(Spec):
    """Every combination of the listed values, in order."""

    kind: Literal["grid"] = "grid"


class RandomSpec(Spec):
    """Points drawn at random, without repeats."""

    kind: Literal["random"] = "random"


class TpeSpec(Spec):
    """Tree-structured Parzen estimator (Bergstra 2011; arXiv 2304.11127) by Optuna."""

    kind: Literal["tpe"] = "tpe"
    n_startup: int = Field(default=4, ge=1)
    """First points, drawn at random by the seed: those of `kind: random`."""
    multivariate: bool = False
    """false: each key by itself, so that what any trial tells of the learning rate holds for all ranks: LoRA's best
    rate hardly moves with the rank. true: all keys together, for keys whose best values depend on each other."""


class GpSpec(Spec):
    """Bayesian optimisation with a Gaussian process by Optuna, log expected improvement (arXiv 2310.20708)."""

    kind: Literal["gp"] = "gp"
    n_startup: int = Field(default=4, ge=1)
    """First points, drawn at random by the seed: those of `kind: random`."""


class BohbSpec(Spec):
    """BOHB's search (Falkner et al. 2018, arXiv 1807.01774): all keys together, on the losses at the furthest step that
    enough trials reached. Goes with `scheduler: {kind: hyperband}`."""

    kind: Literal["bohb"] = "bohb"
    random_share: float = Field(default=1 / 3, ge=0, lt=1)
    """Points that are drawn at random all the same, so that a misleading early step can't lock the search."""


class PbtSpec(Spec):
    """Population based training of the learning rate's schedule (Jaderberg et al. 2017, arXiv 1711.09846)."""

    kind: Literal["pbt"] = "pbt"
    population: int = Field(default=4, ge=2)
    """Members, each at its own point of the space; `num_trials` is not read."""
    every: int = Field(ge=1)
    """Optimizer steps of a segment, after which the worst members go on from the best."""
    quantile: float = Field(default=0.25, gt=0, le=0.5)
    """Share of the members that is replaced, at least one."""
    factors: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (0.8, 1.25)
    """A replaced member's learning rate is multiplied by one of these."""

    @model_validator(mode="after")
    def _factors_change(self) -> Self:
        if 1.0 in self.factors or len(set(self.factors)) < len(self.factors):
            raise ValueError(f"factors must differ, from 1 too, found {list(self.factors)}")
        return self

    def refusal(self, steps: int, report_every: int) -> str | None:
        """Why it can't run in trials of so many steps."""
        if self.every >= steps or steps % self.every:
            return f"search.every={self.every} must divide steps={steps} into at least two segments"
        if self.every % report_every:
            return (
                f"search.every={self.every} must be a multiple of report_every={report_every}, so that members compare"
            )
        return None


SearchSpec = Annotated[GridSpec | RandomSpec | TpeSpec | GpSpec | BohbSpec | PbtSpec, Field(discriminator="kind")]
