"""The specs of every stage of the main job, loaded together so that a wrong one is refused before the first starts."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from graftwork import config
from graftwork.accelerators import Accelerators, with_gpus
from graftwork.config import Spec
from graftwork.demo_spec import DemoSpec
from graftwork.serving.experiment.spec import CompareSpec
from graftwork.serving.spec import ServeSpec
from graftwork.training.spec import TrainSpec
from graftwork.tuning.spec import TuneSpec

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
