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


SearchSpec = Annotated[GridSpec | RandomSpec, Field(discriminator="kind")]
