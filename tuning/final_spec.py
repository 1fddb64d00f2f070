"""What follows the search: the finalists run again with other seeds, and what becomes of the winner."""

from typing import Annotated

from pydantic import Field

from graftwork.config import Spec
from graftwork.storage import NAME_PATTERN


class FinalsSpec(Spec):
    """The best trials run again, each with the same other seeds, until it is known whether the best is better."""

    finalists: int = Field(default=2, ge=2)
    """Best trials that take part."""
    repeats: int = Field(default=3, ge=2)
    """Runs of each finalist in all, seeds `train.seed`, +1, ...; the search's own run is the first."""
    alpha: float = Field(default=0.05, gt=0, lt=1)
    """Level of the intervals: the winner beats the runner-up where that of their paired difference excludes 0."""


class WinnerSpec(Spec):
    """The winner, trained on the full budget of `train` and published."""

    alias: Annotated[str, Field(pattern=NAME_PATTERN)] | None = None
    """Published under this alias too, e.g. champion; without it the version alone."""
    retention: bool = True
    """Measured for what it forgot (`outcomes.retention` of a training run)."""
