"""A run's final peak raises later plans of its kind on this machine."""

from graftwork import base_model
from graftwork.memory import predict_training
from graftwork.memory.measured import kind_of, learn
from graftwork.memory.training import allocated
from graftwork.model_shape import ModelShape
from graftwork.plan import gpu_here
from graftwork.training.job import LoopResult, TrainJob
from graftwork.training.settled import sizes_of
from graftwork.training.steplog import StepReport

LEAST_STEPS = 2
"""The first makes the optimizer's state; the second has all at once."""


class FinalPeak:
    """Counts the steps of a worker that reports to nobody, and compares the run's peak with the prediction at its end.

    The peak grows over a run where rows differ in length: what was freed for one shape is not always reused for others.
    """

    def __init__(self, job: TrainJob) -> None:
        self.job, self.steps = job, 0

    def __call__(self, step: StepReport) -> bool:
        """Go on in any case."""
        self.steps += 1
        return True

    def learn(self, result: LoopResult) -> None:
        """Take the largest peak of all workers into account; nothing where too few steps were taken here."""
        import torch

        spec = self.job.spec
        if self.steps < LEAST_STEPS:
            return
        cuda = torch.cuda.is_available() and spec.gpus > 0
        shape = ModelShape.from_config(base_model.resolve(spec.base).config)
        if shape.unplanned:
            return
        value_bytes = base_model.compute_dtype(spec.quant, "cuda" if cuda else "cpu")[0].itemsize
        plan = predict_training(spec, shape, sizes_of(self.job.data.train), value_bytes=value_bytes)
        if not cuda:
            learn("cpu", kind_of(spec), plan.peak_bytes, max(result.peak_rss_bytes_per_worker))
        elif (gpu := gpu_here()) is not None:
            learn(gpu.name, kind_of(spec), allocated(plan), max(result.peak_cuda_bytes_per_worker))
