"""What follows the search: the finalists run again with other seeds, and what becomes of the winner."""

import re
from collections.abc import Container
from typing import Annotated

from pydantic import Field, JsonValue

from graftwork.artifact_manifest import VERSION_PATTERN
from graftwork.config import Spec
from graftwork.errors import ConfigError
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


def require_finals(finals: FinalsSpec | None, key: str, most: int, space: Container[str]) -> None:
    """Raise ConfigError where a sweep can't have these finals. `key` of the sweep says how many trials there are."""
    if finals is not None and "seed" in space:
        raise ConfigError(
            "finals with space.seed", "every finalist runs with the same seeds, train.seed and those that follow",
            "a seed is what finals average over, and no choice: the best seed is luck", "take `seed` out of the space",
        )  # fmt: skip
    if finals is not None and finals.finalists > most:
        raise ConfigError(
            f"finals.finalists={finals.finalists}", f"{key}={most}", "finalists are trials of the search",
            f"--set finals.finalists={most}" if most > 1 else f"--set {key}=2",
        )  # fmt: skip


def require_placeable(winner: WinnerSpec | None, train: TrainSpec) -> None:
    """Raise ConfigError where the winner of this training spec can't be treated so."""
    if winner is None:
        return
    if train.alias is not None and "alias" in train.model_fields_set:
        raise ConfigError(
            f"train.alias={train.alias!r} with `winner`", "it cannot take effect",
            "the winner's alias is winner.alias, and trials publish nothing", "take train.alias out",
        )  # fmt: skip
    if train.adapter.kind == "full" and (winner.alias or winner.shadow):
        raise ConfigError(
            "winner.alias or winner.shadow with train.adapter.kind=full", "all weights are trained",
            "an alias names an adapter, and a base has none", "leave both out: `winner: {}` publishes the base",
        )  # fmt: skip
    if winner.alias and re.fullmatch(VERSION_PATTERN, winner.alias):
        raise ConfigError(
            f"winner.alias={winner.alias!r}", "it looks like a version", "12 hex digits name a version", "rename it"
        )
