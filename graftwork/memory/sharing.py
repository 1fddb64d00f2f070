"""What each worker keeps of weights, gradients and optimizer under DDP, ZeRO 1 to 3 and FSDP2.

ZeRO (arXiv 1910.02054) keeps 1/N of the optimizer (1), of the gradients too (2), of the weights too (3). The figures
are of DeepSpeed 0.19's settings in `training/strategies`.
"""

from dataclasses import dataclass

from graftwork.memory.sizes import BF16, FP32
from graftwork.model_shape import ModelShape
from graftwork.training.spec import TrainSpec

BUCKET_VALUES = 50_000_000
"""Values of one reduction or gathering of DeepSpeed: a copy of so many is alive beside gradients and weights."""
LIVE_BLOCKS = 2
"""Blocks whose weights are whole on a worker at once: the one at work and the one that is fetched."""


@dataclass(frozen=True)
class Shared:
    """Bytes of one worker. `host` lies in the machine's memory, which on a CPU is the same one."""

    weights: int
    trained: int
    gradients: int
    optimizer: int
    buffers: int
    """Buckets of reductions, gathered blocks."""
    host: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.trained + self.gradients + self.optimizer + self.buffers


def shared(spec: TrainSpec, model: ModelShape, frozen_bytes: int, trained: int) -> Shared:
    """`frozen_bytes`: of the weights that are not trained. `trained`: how many values are, kept in fp32.

    Under DeepSpeed on a GPU weights that are trained are in bf16, and their fp32 form is part of the optimizer's state.
    """
    kind, workers, cuda = spec.strategy.kind, spec.num_workers, spec.gpus > 0
    if kind == "ddp":
        buckets = trained * FP32 if workers > 1 else 0
        return Shared(frozen_bytes, trained * FP32, trained * FP32, 2 * trained * FP32, buckets)
    if kind == "fsdp2":
        gathered = LIVE_BLOCKS * -(-(frozen_bytes + trained * FP32) // (model.layers + 1))
        part = trained * FP32 // workers
        return _offloaded(spec, Shared(frozen_bytes // workers, part, part, 2 * part, gathered))
    stage, value = int(kind[-1]), BF16 if cuda else FP32
    bucket = min(trained, BUCKET_VALUES) * value
    optimizer = trained * 3 * FP32 // workers  # two moments and the fp32 weights that are stepped
    gradients = trained * value // (workers if stage >= 2 else 1)
    if stage < 3:
        return _offloaded(spec, Shared(frozen_bytes, trained * value, gradients, optimizer, 2 * bucket))
    live = LIVE_BLOCKS * -(-(frozen_bytes + trained * value) // (model.layers + 1))
    whole = Shared(frozen_bytes // workers, trained * value // workers, gradients, optimizer, bucket + live)
    return _offloaded(spec, whole)


def _offloaded(spec: TrainSpec, shared: Shared) -> Shared:
    """What a strategy moves off a GPU: to the host's memory, or to its disk. On a CPU nothing moves but to the disk."""
    cuda, strategy = spec.gpus > 0, spec.strategy
    optimizer, weights, trained, host = shared.optimizer, shared.weights, shared.trained, 0
    if strategy.offload_optimizer == "nvme" or (strategy.offload_optimizer == "cpu" and cuda):
        host += optimizer * (strategy.offload_optimizer == "cpu")
        optimizer = 0
    if strategy.offload_weights == "nvme" or (strategy.offload_weights == "cpu" and cuda):
        host += (weights + trained) * (strategy.offload_weights == "cpu")
        weights = trained = 0
    return Shared(weights, trained, shared.gradients, optimizer, shared.buffers, host)
