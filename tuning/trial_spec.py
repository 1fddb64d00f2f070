"""A trial of a sweep as a job of its own: what its driver runs, where the sweep's driver is on another machine."""

from typing import Annotated, Literal

from pydantic import Field

from graftwork.config import Spec
from graftwork.storage import DEFAULT_ROOT, NAME_PATTERN, RunPaths, Store
from graftwork.training.spec import TrainSpec
from graftwork.tuning.places import TRIALS


class TrialSpec(Spec):
    """Written by `graftwork tune --trial-target`, run by `graftwork trial`. It publishes nothing."""

    kind: Literal["trial"] = "trial"
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    """`<sweep>-<trial>`."""
    root: str = DEFAULT_ROOT
    sweep: str
    """Name of the sweep."""
    sweep_digest: str
    """With the name, where the sweep's records lie."""
    trial_id: str
    train: TrainSpec
    steps: int = Field(ge=1)
    report_every: int = Field(ge=1)

    def paths(self) -> RunPaths:
        """Where its steps and checkpoints are kept: in the sweep's run."""
        return RunPaths(Store(self.root), self.sweep, self.sweep_digest).part(TRIALS, self.trial_id)
