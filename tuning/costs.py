"""What a trial costs beside its loss, for `TrialRecord.metrics`: counted in the trial's process."""

from graftwork import base_model
from graftwork.errors import BaseModelError
from graftwork.memory.sizes import FP32
from graftwork.memory.weights import trained_params
from graftwork.model_shape import ModelShape
from graftwork.training.spec import TrainSpec
from graftwork.training.steplog import StepReport


class Costs:
    """One trial's figures so far. Every step's report goes in, so that the seconds are a mean over all steps."""

    def __init__(self, trial: TrainSpec) -> None:
        try:
            self._known = size_of(trial)
        except BaseModelError:  # trained all the same; a sweep that has a size for its goal was refused (tuning.run)
            self._known = {}
        self._steps, self._step_s, self._tokens = 0, 0.0, 0

    def add(self, report: StepReport) -> None:
        """Count an optimizer step."""
        self._steps += 1
        self._step_s += report.step_s
        self._tokens = report.tokens

    def metrics(self) -> dict[str, float]:
        """By the names of `goal_spec.METRICS`."""
        return {**self._known, "tokens": float(self._tokens), "step_s": self._step_s / max(1, self._steps)}


def size_of(trial: TrainSpec) -> dict[str, float]:
    """What the adapter of a trial has, as published: in fp32. Reads the base's config.json.

    Raises BaseModelError for an architecture whose layers are not known (`model_shape`).
    """
    count = trained_params(ModelShape.from_config(base_model.resolve(trial.base).config), trial.adapter)
    return {"trained_parameters": float(count), "adapter_bytes": float(count * FP32)}
