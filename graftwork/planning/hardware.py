"""GPUs and machines: those found here, the number that `auto` in a spec stands for, and those that a plan is made for.

`gpus_per_worker` (train, and `train` of a sweep) and `num_gpus` (serve, compare, quantize) are a number or `auto`. The
process that starts a stage resolves `auto` once, before the stage is named: identities and digests hold the number.
A GPU that a plan is made for need not be present.
"""

import difflib
import itertools
import json
import operator
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import Field

from graftwork.config import Spec, SpecT, validate
from graftwork.environment import Speed, available_memory, cores, measure_speed
from graftwork.errors import BaseModelError, ConfigError
from graftwork.quantization import QuantSpec, cpu_value_bytes
from graftwork.storage.store import cache_root

MIB = 2**20
GIB = 2**30
FP32 = 4
BF16 = 2

AUTO: Final = "auto"
Gpus = Annotated[float, Field(ge=0)] | Literal["auto"]
"""GPUs of a worker or replica. `auto`: one where the target has GPUs, else none."""
NVIDIA_SMI_S = 10.0


@dataclass(frozen=True)
class Accelerators:
    """GPUs of a target."""

    count: float
    kinds: tuple[str, ...] = ()
    """Names of the GPU types, as the target calls them; empty where it names none."""
    owner: str = "this machine"
    """The machines that have the GPUs, or the target where none has: `cluster group h100`."""


def resolved_count(gpus: Gpus) -> float:
    """The number of a resolved key. `auto` that nothing has resolved counts as none."""
    return 0.0 if gpus == AUTO else float(gpus)


def gpu_key(spec: Spec) -> str | None:
    """Dotted key of the GPUs of a stage's workers; None for a stage without such a key."""
    if getattr(spec, "kind", "") == "tune":
        return "train.gpus_per_worker"
    return next((key for key in ("gpus_per_worker", "num_gpus") if key in type(spec).model_fields), None)


def gpus_of(spec: Spec) -> float:
    """GPUs of a worker of the stage; 0 for a stage without such a key."""
    return resolved_count(_requested_gpus(spec))


def is_auto(spec: Spec) -> bool:
    """Return whether the GPUs of the stage's workers are still to be resolved."""
    return _requested_gpus(spec) == AUTO


def _requested_gpus(spec: Spec) -> Gpus:
    key = gpu_key(spec)
    gpus: Gpus = 0.0 if key is None else operator.attrgetter(key)(spec)
    return gpus


def with_gpus(spec: SpecT, found: Accelerators) -> tuple[SpecT, str | None]:
    """The spec with a number in place of `auto`, and a line with the number and its reason; None for nothing to do."""
    if _requested_gpus(spec) != AUTO:
        return spec, None
    number, reason = (1.0, f"{found.owner} has GPUs") if found.count else (0.0, f"{found.owner} has no GPU")
    engine: Any = getattr(spec, "engine", None)
    if engine is not None and engine.kind == "vllm":
        number, reason = float(engine.tensor_parallel_size), "engine.kind=vllm: engine.tensor_parallel_size"
    key = gpu_key(spec)
    return spec.with_({str(key): number}), f"{key}={number:g} ({reason})"


def accelerators_here() -> Accelerators:
    """GPUs of the Ray that this process has joined, else of this machine."""
    ray: Any = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        total = ray.cluster_resources()
        kinds = tuple(sorted(key.partition(":")[2] for key in total if key.startswith("accelerator_type:")))
        return Accelerators(float(total.get("GPU", 0.0)), kinds, "this Ray")
    cards = gpus_here()
    return Accelerators(len(cards), tuple(sorted({name for name, _ in cards})))


def gpus_here() -> list[tuple[str, int]]:
    """Name and memory of each GPU that a process of this machine may use, in bytes, 0 where the driver names none.

    Runs `nvidia-smi`: torch takes seconds to import. Raises ConfigError where it does not answer.
    """
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=NVIDIA_SMI_S)
    except subprocess.TimeoutExpired:
        raise ConfigError(
            "GPUs of this machine",
            f"nvidia-smi has not answered within {NVIDIA_SMI_S:g} s",
            "it lists the GPUs that a stage may use",
            "run nvidia-smi; to do without GPUs, take it off the PATH",
        ) from None
    if done.returncode:  # no driver: what it prints is no list
        return []
    parted = (line.rpartition(",") for line in done.stdout.splitlines() if "," in line)
    cards = [(name.strip(), int(size) << 20 if size.strip().isdigit() else 0) for name, _, size in parted]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return cards
    chosen = [name.strip() for name in visible.split(",") if name.strip()]
    chosen = list(itertools.takewhile(lambda name: not name.startswith("-"), chosen))  # as CUDA reads it
    if all(name.isdigit() for name in chosen):
        return [cards[int(name)] for name in chosen if int(name) < len(cards)]
    return cards[: len(chosen)]  # named by UUID


def visible_gpus() -> list[str]:
    """Names of this process' GPUs as CUDA_VISIBLE_DEVICES takes them: numbers, or UUIDs where it holds UUIDs."""
    count, visible = len(gpus_here()), os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in visible.split(",")] if visible is not None else [str(n) for n in range(count)]
    return names[:count]


PCIE_3, PCIE_4 = 15.8, 31.5
"""10^9 bytes a second and direction of 16 lanes (8 and 16 GT/s, 128b/130b)."""
ETHERNET_25 = 3.1
"""10^9 bytes a second of 25 Gb/s Ethernet: taken for GPUs whose vendor names no network."""


class Gpu(Spec):
    """One GPU. In a file of its own (`graftwork plan FILE --gpu my-card.yaml`) these are the keys."""

    name: str
    memory_gib: float = Field(gt=0)
    """Memory that CUDA can give out, a little less than what the vendor prints on the box."""
    sm: float = Field(gt=0)
    """Compute capability; bfloat16 needs 8.0 (Ampere)."""
    tflops: float = Field(gt=0)
    """10^12 operations a second in dense products of 16 bits with sums in fp32."""
    fp32_tflops: float = Field(gt=0)
    gbytes_per_s: float = Field(gt=0)
    """10^9 bytes a second from its memory."""
    link_gbytes_per_s: float = Field(default=PCIE_4, gt=0)
    """10^9 bytes a second and direction to the other GPUs of its machine: NVLink, or PCIe where there is none."""
    network_gbytes_per_s: float = Field(default=ETHERNET_25, gt=0)
    """10^9 bytes a second and direction to other machines, for each GPU."""
    per_machine: int = Field(default=8, ge=1)
    """GPUs of one machine: more workers exchange over the network."""
    source: str = "given"
    """Where the figures come from."""

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * 2**30)

    @property
    def has_bf16(self) -> bool:
        """As `quantization.default_dtype` decides."""
        return self.sm >= 8.0


def _gpu(
    name: str,
    memory: float,
    sm: float,
    tflops: float,
    fp32: float,
    gbytes: float,
    source: str,
    link: float = PCIE_4,
    network: float = ETHERNET_25,
) -> Gpu:
    return Gpu(
        name=name,
        memory_gib=memory,
        sm=sm,
        tflops=tflops,
        fp32_tflops=fp32,
        gbytes_per_s=gbytes,
        link_gbytes_per_s=link,
        network_gbytes_per_s=network,
        source=source,
    )


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("b200", 178.4, 10.0, 2250, 75, 7700, "NVIDIA HGX B200 datasheet", 900, 50),
        _gpu("h200", 139.8, 9.0, 989, 67, 4800, "NVIDIA H200 datasheet, SXM", 450, 50),
        _gpu("h100", 79.2, 9.0, 989, 67, 3350, "NVIDIA H100 datasheet, SXM", 450, 50),
        _gpu("a100-80", 79.2, 8.0, 312, 19.5, 2039, "NVIDIA A100 datasheet, SXM 80 GB", 300, 25),
        _gpu("a100-40", 39.4, 8.0, 312, 19.5, 1555, "NVIDIA A100 datasheet, 40 GB", 300, 25),
        _gpu("l40s", 44.4, 8.9, 362, 91.6, 864, "NVIDIA L40S datasheet"),
        _gpu("a10", 22.0, 8.6, 125, 31.2, 600, "NVIDIA A10 datasheet"),
        _gpu("l4", 22.0, 8.9, 121, 30.3, 300, "NVIDIA L4 datasheet"),
        _gpu("rtx4090", 23.5, 8.9, 165, 82.6, 1008, "NVIDIA Ada whitepaper, RTX 4090"),
        _gpu("rtx3090", 23.6, 8.6, 71, 35.6, 936, "NVIDIA GA102 whitepaper, RTX 3090"),
        _gpu("v100", 31.7, 7.0, 125, 15.7, 900, "NVIDIA V100 datasheet, SXM2 32 GB", 150, 6.25),
        _gpu("t4", 14.6, 7.5, 65, 8.1, 320, "NVIDIA T4 datasheet", PCIE_3),
    )
}
"""GPUs that `--gpu` knows by name.

Links: NVLink 5, 4, 3 and 2 carry 1800, 900, 600 and 300 GB/s in both directions together (datasheets). Networks: DGX
B200 and H100 have 400 Gb/s a GPU, DGX A100 200 Gb/s, DGX-1 four ports of 100 Gb/s for eight GPUs (their user guides).
"""


def named_gpu(asked: str) -> Gpu:
    """A GPU of the table or of a YAML file, with the figures that follow it (`h100,network_gbytes_per_s=12.5`).

    Raises ConfigError naming the nearest known GPU, or the figure that is not one.
    """
    name, *changes = asked.split(",")
    gpu = GPUS.get(name.lower())
    if name.endswith((".yaml", ".yml")):
        try:
            tree = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            rule = "a YAML file describes one GPU"
            raise ConfigError(f"--gpu {name}", f"it cannot be read ({error})", rule) from error
        gpu = validate(Gpu, {"name": Path(name).stem, **tree} if isinstance(tree, dict) else tree, where=name)
    if gpu is None:
        near = difflib.get_close_matches(name.lower(), GPUS, n=1)
        raise ConfigError(
            f"--gpu {name}",
            "no such GPU in the table",
            f"known: {', '.join(GPUS)}; or a YAML file with its figures",
            f"--gpu {near[0]}" if near else "write a file with memory_gib, sm, tflops, fp32_tflops, gbytes_per_s",
        )
    if not changes:
        return gpu
    if odd := next((change for change in changes if "=" not in change), None):
        raise ConfigError(
            f"--gpu {asked}",
            f"{odd!r} is not KEY=VALUE",
            "NAME[,KEY=VALUE]... names a GPU and its figures",
            f"--gpu {name},network_gbytes_per_s=12.5",
        )
    figures = {key: yaml.safe_load(value) for key, _, value in (change.partition("=") for change in changes)}
    source = f"{gpu.source}; {', '.join(changes)}"
    return validate(Gpu, {**gpu.model_dump(), "source": source, **figures}, where="--gpu")


def gpu_here() -> Gpu | None:
    """The first GPU of this machine: its memory as it is, its rates from the table. None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    found = gpu_called(properties.name, properties.total_memory / 2**30)
    return found and found.model_copy(update={"memory_gib": properties.total_memory / 2**30})


def gpu_called(name: str, memory_gib: float | None = None) -> Gpu | None:
    """The GPU of the table that a driver or Ray calls so (`NVIDIA H100 80GB HBM3`, `A100-40G`); None for others.

    Where two differ in memory alone, the one nearest to `memory_gib`, or the smaller one.
    """
    plain = name.lower().replace(" ", "").replace("-", "")
    if "mig" in plain:
        return None  # a slice has a share of the GPU's memory, which its name gives in several forms
    likely = [gpu for gpu in GPUS.values() if gpu.name.partition("-")[0] in plain]
    exact = [gpu for gpu in likely if "-" in gpu.name and gpu.name.replace("-", "") in plain]
    longest = max((len(gpu.name.partition("-")[0]) for gpu in likely), default=0)
    likely = exact or [gpu for gpu in likely if len(gpu.name.partition("-")[0]) == longest]  # l40s is no l4
    return min(likely, key=lambda gpu: abs(gpu.memory_gib - (memory_gib or 0.0)), default=None)


MOST = 1.5
"""A larger ratio says that something else is wrong than a constant, and is not followed further."""
RUNS = 5
"""The newest runs of a kind that count."""


@dataclass(frozen=True)
class Correction:
    """The largest of the measured over predicted peaks of a kind's newest runs. A plan is never lowered.

    A kind is objective, adapter and quantisation on one device. Runs of one kind differ by their rows alone, which the
    formulas count, and by what an allocator keeps of rows of changing lengths, which varies from run to run.
    """

    ratio: float = 1.0
    runs: int = 0

    def part_name(self) -> str:
        """Name of the part that it adds to a plan."""
        return f"correction from {self.runs} earlier {'run' if self.runs == 1 else 'runs'} on this machine"


def read_corrections(on: str) -> Mapping[str, Correction]:
    """The correction of each kind of run seen so far on `cpu` or on GPUs of a name."""
    return {kind: Correction(max(1.0, *ratios), len(ratios)) for kind, ratios in _read_ratios(on)[1].items()}


def learn(on: str, kind: str, predicted_bytes: int, measured_bytes: int) -> Correction:
    """Take the final peak of one more run into account. Writes `<cache>/machine/memory-<on>.json`.

    `predicted_bytes`: by the formulas alone.
    """
    path, ratios = _read_ratios(on)
    ratios[kind] = [*ratios.get(kind, []), round(min(measured_bytes / predicted_bytes, MOST), 4)][-RUNS:]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(ratios), encoding="utf-8")
    temporary.replace(path)
    return Correction(max(1.0, *ratios[kind]), len(ratios[kind]))


def _read_ratios(on: str) -> tuple[Path, dict[str, list[float]]]:
    """Return the file of the ratios, and the newest ones by kind."""
    path = cache_root() / "machine" / f"memory-{on}.json"
    return path, json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


BF16_GAIN = 2.0
"""More than this times its fp32 rate a CPU's bf16 units do not make a step faster: the rest of it takes the time."""
CROWDED = 0.35
"""Share by which each core is slower when all work: caches, memory and clock are shared. Measured on 2 vCPUs: two
processes 1.35, two threads 1.23 times."""

ANY_CORE = Speed(gflops=50.0, gbytes_per_s=10.0)


@dataclass(frozen=True)
class Machine:
    """Machine that a plan is made for. `value_bytes`: 4 where the compute dtype is fp32, 2 for bf16."""

    cores: int
    memory_bytes: int
    """Of the machine, or of one GPU."""
    speed: Speed
    """Of one core."""
    value_bytes: int = FP32
    gpu: Gpu | None = None
    """Each worker has one of these; None plans for the CPU."""
    peaks: Mapping[str, Correction] = field(default_factory=dict)
    """Corrections of predicted peaks of training that runs on it have shown, by kind of run."""

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
            return replace(self, value_bytes=cpu_value_bytes(quant))
        if quant.dtype == "bfloat16" and not self.gpu.has_bf16:
            raise BaseModelError(
                "quant.dtype=bfloat16",
                f"{self.gpu.name} is SM {self.gpu.sm}",
                "bfloat16 needs SM 8.0 or newer",
                "set quant.dtype=auto: float32 there",
            )
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
