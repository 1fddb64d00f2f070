"""What the main job is asked to do: one file that names a spec per stage."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from graftwork.config import Spec
from graftwork.storage import DEFAULT_ROOT


class BurstSpec(Spec):
    """Live traffic while a new adapter version is published and swapped in."""

    requests: int = Field(default=120, ge=2)
    """Requests in all, spread over the adapters and the base."""
    concurrency: int = Field(default=8, ge=1)
    max_new_tokens: int = Field(default=24, ge=1)


class DemoSpec(Spec):
    """plan, tune, train, serve with a swap under load, compare, report: from specs to a verdict."""

    kind: Literal["demo"] = "demo"
    name: str = "demo"
    root: str = DEFAULT_ROOT
    """Replaces the root of every stage."""
    tune: str
    """Spec file of the sweep, relative to this file."""
    use_best: tuple[str, ...] = ("adapter.rank", "optim.lr")
    """Keys of the sweep's winner that the training runs take over."""
    train: tuple[str, ...] = Field(min_length=1)
    """Spec files of the training runs, in order."""
    serve: str
    update: str
    """Spec file of the training run that ends in the version swapped in under load."""
    burst: BurstSpec = BurstSpec()
    compare: str
    overrides: dict[Literal["tune", "train", "serve", "update", "compare"], dict[str, Any]] = {}
    """Dotted keys replaced in every spec of a stage: how the quick job differs from the whole one."""

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        if len(set(self.train)) != len(self.train):
            raise ValueError(f"train: a spec file is named twice in {list(self.train)}")
        return self
