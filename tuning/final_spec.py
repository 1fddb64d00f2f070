"""What follows the search: the finalists run again with other seeds, and what becomes of the winner."""

from collections.abc import Container
from typing import Annotated

from pydantic import Field, JsonValue

from graftwork.config import Spec
from graftwork.storage import NAME_PATTERN
from graftwork.training.spec import TrainSpec


class FinalsSpec(Spec):
    """The best trials run again, each with the same other seeds, until it is known whether the best is better."""

    finalists: int = Field(default=2, ge=2)
    """Best trials of the search that take part: those that ran to their end."""
    repeats: int = Field(default=3, ge=2)
    """Runs of each finalist in all, seeds `train.seed`, +1, ...; the search's own run is the first."""
    alpha: float = Field(default=0.05, gt=0, lt=1)
    """Intervals are at 1 - alpha; one finalist beats another at alpha over all pairs of them together (Holm)."""


class ShadowSpec(Spec):
    """An experiment in which the winner answers copies of live requests, unseen, beside the version that answers."""

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


def finals_refusal(finals: FinalsSpec | None, num_trials: int, keys: Container[str]) -> str | None:
    """Why a sweep can't have these finals."""
    if finals is None:
        return None
    if "seed" in keys:
        return "finals give every finalist the same other seeds, so a seed in the space cannot take effect: take it out"
    if finals.finalists > num_trials:
        return f"finals.finalists={finals.finalists} is more than num_trials={num_trials}"
    return None


def winner_refusal(winner: WinnerSpec | None, train: TrainSpec) -> str | None:
    """Why the winner of this training spec can't be treated so."""
    if winner is None:
        return None
    if train.alias is not None and "alias" in train.model_fields_set:
        return f"train.alias={train.alias!r} cannot take effect: the winner's alias is winner.alias"
    if train.adapter.kind == "full" and (winner.alias or winner.shadow):
        return "winner.alias and winner.shadow name an adapter, and adapter.kind=full trains a base"
    return None
