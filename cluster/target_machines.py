"""Machines of a target: what `auto` GPUs and a stage's plan are resolved against before a job is submitted."""

from dataclasses import dataclass, replace

from graftwork.accelerators import Accelerators
from graftwork.plan.gpus import Gpu, gpu_called
from graftwork.plan.hardware import Machine


@dataclass(frozen=True)
class TargetMachines:
    """CPUs, memory and GPUs that workers of a job may get in a place, summed over its machines."""

    owner: str
    """Subject of `... has GPUs`: this machine, an address, `cluster group h100`."""
    cpus: float
    memory_bytes: int
    gpus: float = 0.0
    gpu_types: tuple[str, ...] = ()
    """GPU types as the place names them; empty for one without a name there."""
    gpu_memory_bytes: int = 0
    """Memory of the smallest GPU, where the driver reports it; else the table's figure of its type counts."""

    @property
    def accelerators(self) -> Accelerators:
        """Their GPUs."""
        return Accelerators(self.gpus, self.gpu_types, self.owner)

    @property
    def smallest_gpu(self) -> Gpu | None:
        """The GPU with the least memory, since a worker may be placed on any; None where one type is not known."""
        known = [gpu_called(name) for name in self.gpu_types]
        found = [gpu for gpu in known if gpu is not None]
        if not found or len(found) < len(known):
            return None
        least = min(found, key=lambda gpu: gpu.memory_gib)
        if not self.gpu_memory_bytes:
            return least
        return least.model_copy(update={"memory_gib": self.gpu_memory_bytes / 2**30})

    def planned_for(self, gpus_per_worker: float) -> Machine | None:
        """The machine that a stage's plan is made for; None where a GPU is wanted whose figures are not known."""
        if gpus_per_worker:
            gpu = self.smallest_gpu
            return None if gpu is None else Machine.with_gpus(gpu)
        return replace(Machine.detect(), cores=max(int(self.cpus), 1), memory_bytes=self.memory_bytes)
