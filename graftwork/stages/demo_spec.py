"""Spec of the demo, and the specs of its stages, loaded together so that a wrong one is rejected before the first."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import Field, model_validator

from graftwork import config
from graftwork.config import Spec
from graftwork.planning.hardware import Accelerators, with_gpus
from graftwork.serving.evaluation.spec import CompareSpec
from graftwork.serving.spec import ServeSpec
from graftwork.storage.store import DEFAULT_ROOT
from graftwork.training.spec import TrainSpec
from graftwork.tuning.spec import TuneSpec


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


SpecT = TypeVar("SpecT", bound=Spec)
Stage = Literal["tune", "train", "serve", "compare"]
ON_CPUS = Accelerators(0, owner="the demo")
"""Its stages share one machine, and an update is trained while the endpoint serves: `auto` is no GPU."""


@dataclass(frozen=True)
class DemoSpecs:
    """One typed spec a stage; `train` in the order they run."""

    demo: DemoSpec
    tune: TuneSpec
    train: tuple[TrainSpec, ...]
    serve: ServeSpec
    update: TrainSpec
    compare: CompareSpec

    def with_best(self, best: Mapping[str, Any]) -> "DemoSpecs":
        """The training runs of the tuned task take over the sweep's winner in the keys that `use_best` names."""
        taken = {key: value for key, value in best.items() if key in self.demo.use_best}
        tuned = self.tune.train.name
        train = tuple(spec.with_(taken) if spec.name.startswith(tuned) else spec for spec in self.train)
        return replace(self, train=train)


def load_specs(demo: DemoSpec, folder: Path) -> DemoSpecs:
    """Every stage's spec, with the job's root and overrides. Raises ConfigError naming the file and the key."""

    def one(cls: type[SpecT], stage: Stage, file: str) -> SpecT:
        spec = config.load(folder / file, expect=stage)
        assert isinstance(spec, cls)
        overrides = dict(demo.overrides.get("update" if file == demo.update else stage) or {}, root=demo.root)
        if isinstance(spec, TuneSpec):
            overrides["train.root"] = demo.root
        return with_gpus(spec.with_(overrides), ON_CPUS)[0]

    return DemoSpecs(
        demo,
        one(TuneSpec, "tune", demo.tune),
        tuple(one(TrainSpec, "train", file) for file in demo.train),
        one(ServeSpec, "serve", demo.serve),
        one(TrainSpec, "train", demo.update),
        one(CompareSpec, "compare", demo.compare),
    )
