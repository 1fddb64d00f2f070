"""How a sweep chooses the points of its space."""

from typing import Annotated, Literal

from pydantic import Field

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


SearchSpec = Annotated[GridSpec | RandomSpec | TpeSpec | GpSpec | BohbSpec, Field(discriminator="kind")]
