"""What a plan is made for: this machine, or GPUs that need not be here."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from graftwork.base_model import QuantSpec
from graftwork.errors import BaseModelError
from graftwork.machine import Speed, available_memory, cores, measure_speed
from graftwork.memory import FP32, GIB
from graftwork.memory.measured import Correction, read_corrections
from graftwork.memory.sizes import BF16
from graftwork.plan.gpus import Gpu

BF16_GAIN = 2.0
"""More than this times its fp32 rate a CPU's bf16 units do not make a step faster: the rest of it takes the time."""
CROWDED = 0.35
"""How much slower each core is when all work: caches, memory and clock are shared (two processes 1.35, two threads 1.23
times on 2 vCPUs)."""

ANY_CORE = Speed(gflops=50.0, gbytes_per_s=10.0)


@dataclass(frozen=True)
class Machine:
    """What a plan is made for. `value_bytes`: 4 where the compute dtype is fp32, 2 for bf16."""

    cores: int
    memory_bytes: int
    """Of the machine, or of one GPU."""
    speed: Speed
    """Of one core."""
    value_bytes: int = FP32
    gpu: Gpu | None = None
    """Each worker has one of these; None plans for the CPU."""
    peaks: Mapping[str, Correction] = field(default_factory=dict)
    """What runs on it have shown of predicted peaks of training, by kind of run."""

    @classmethod
    def detect(cls, value_bytes: int = FP32) -> "Machine":
        """This machine as it is now. Probes its speed the first time."""
        return cls(cores(), available_memory(), measure_speed(), value_bytes, peaks=read_corrections("cpu"))

    @classmethod
    def with_gpus(cls, gpu: Gpu) -> "Machine":
        """One that has such GPUs. Nothing is probed; its cores are taken to be slow ones."""
        return cls(cores(), gpu.memory_bytes, ANY_CORE, BF16 if gpu.has_bf16 else FP32, gpu, read_corrections(gpu.name))

    def at(self, quant: QuantSpec) -> "Machine":
        """With the compute dtype that a stage gets here. Raises BaseModelError for one without units on the GPU."""
        if self.gpu is None:
            from graftwork import base_model

            return replace(self, value_bytes=base_model.cpu_value_bytes(quant))
        if quant.dtype == "bfloat16" and not self.gpu.has_bf16:
            raise BaseModelError(
                "quant.dtype=bfloat16", f"{self.gpu.name} is SM {self.gpu.sm}", "bfloat16 needs SM 8.0 or newer",
                "set quant.dtype=auto: float32 there",
            )  # fmt: skip
        wide = quant.dtype == "float32" or not self.gpu.has_bf16
        return replace(self, value_bytes=FP32 if wide else BF16)

    def describe(self) -> str:
        """Return the machine as text."""
        if self.gpu is not None:
            dtype = "bfloat16" if self.value_bytes == BF16 else "float32"
            return f"{self.gpu.name}: {self.gpu.memory_gib:g} GiB, SM {self.gpu.sm}, {dtype} ({self.gpu.source})"
        speed = f"{self.gflops:.0f} GFLOP/s a core, {self.speed.gbytes_per_s:.0f} GB/s"
        return f"{self.cores} cores, {speed}, {self.memory_bytes / GIB:.1f} GiB available"

    @property
    def gflops(self) -> float:
        """10^9 operations a second of one core in the compute dtype, as far as they count."""
        if self.value_bytes == FP32 or self.speed.bf16_gflops is None:
            return self.speed.gflops
        return min(self.speed.bf16_gflops, BF16_GAIN * self.speed.gflops)

    def core_s(self, flops: float, efficiency: float) -> float:
        """Seconds of one core."""
        return flops / (self.gflops * 1e9 * efficiency)

    def pace(self, processes: int, cpus: float) -> float:
        """Speed of one of `processes` processes of `cpus` CPUs each, all at work; 1 is one thread that runs alone."""
        threads = max(1, int(cpus))
        busy = min(processes * threads, self.cores)
        crowded = 1 + CROWDED * (busy - 1) / (self.cores - 1) if self.cores > 1 else 1.0
        return threads * min(1.0, self.cores / (processes * threads)) / crowded
