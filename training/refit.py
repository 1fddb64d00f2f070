"""The first real steps of a run correct the plan's constants for this machine."""

import resource
import sys

from graftwork import base_model
from graftwork.errors import BaseModelError
from graftwork.memory import predict_training
from graftwork.memory.measured import learn
from graftwork.memory.training import allocated
from graftwork.model_shape import ModelShape
from graftwork.plan import gpu_here
from graftwork.training.job import TrainJob
from graftwork.training.settled import sizes_of
from graftwork.training.steplog import StepReport

AFTER_STEPS = 2
"""The first makes the optimizer's state; the second has all at once."""


class FirstSteps:
    """Called with each step of a worker that does nothing else; after the second it compares peak and prediction."""

    def __init__(self, job: TrainJob) -> None:
        self.job, self.steps = job, 0

    def __call__(self, step: StepReport) -> bool:
        """Go on in any case."""
        self.steps += 1
        if self.steps == AFTER_STEPS:
            self._compare()
        return True

    def _compare(self) -> None:
        import torch

        spec, cuda = self.job.spec, torch.cuda.is_available() and self.job.spec.gpus > 0
        device = "cuda" if cuda else "cpu"
        try:
            shape = ModelShape.from_config(base_model.resolve(spec.base).config)
        except BaseModelError:
            return  # a shape that the plan does not cover
        value_bytes = base_model.compute_dtype(spec.quant, device)[0].itemsize
        plan = predict_training(spec, shape, sizes_of(self.job.data.train), value_bytes=value_bytes)
        if not cuda:
            learn("cpu", plan.peak_bytes, peak_rss_bytes())
        elif (gpu := gpu_here()) is not None:
            learn(gpu.name, allocated(plan), torch.cuda.max_memory_allocated())


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
