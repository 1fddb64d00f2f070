"""What follows the search: the finalists run again with other seeds, and what becomes of the winner."""

from collections.abc import Container
from typing import Annotated

from pydantic import Field

from graftwork.config import Spec
from graftwork.storage import NAME_PATTERN


class FinalsSpec(Spec):
    """The best trials run again, each with the same other seeds, until it is known whether the best is better."""

    finalists: int = Field(default=2, ge=2)
    """Best trials of the search that take part: those that ran to their end."""
    repeats: int = Field(default=3, ge=2)
    """Runs of each finalist in all, seeds `train.seed`, +1, ...; the search's own run is the first."""
    alpha: float = Field(default=0.05, gt=0, lt=1)
    """Intervals are at 1 - alpha; one finalist beats another at alpha over all pairs of them together (Holm)."""


class WinnerSpec(Spec):
    """The winner, trained on the full budget of `train` and published."""

    alias: Annotated[str, Field(pattern=NAME_PATTERN)] | None = None
    """Published under this alias too, e.g. champion; without it the version alone."""
    retention: bool = True
    """Measured for what it forgot (`outcomes.retention` of a training run)."""


def finals_refusal(finals: FinalsSpec | None, num_trials: int, keys: Container[str]) -> str | None:
    """Why a sweep can't have these finals."""
    if finals is None:
        return None
    if "seed" in keys:
        return "finals give every finalist the same other seeds, so a seed in the space cannot take effect: take it out"
    if finals.finalists > num_trials:
        return f"finals.finalists={finals.finalists} is more than num_trials={num_trials}"
    return None
