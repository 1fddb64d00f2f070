"""GPUs of a machine or a cluster, and the number that `auto` in a spec stands for there.

`gpus_per_worker` (train, and `train` of a sweep) and `num_gpus` (serve, compare, quantize) are a number or `auto`. The
process that starts a stage resolves `auto` once, before the stage is named: identities and digests hold the number.
"""

import itertools
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from graftwork.config import Spec, SpecT
from graftwork.errors import ConfigError

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

    @property
    def reason(self) -> str:
        """Why `auto` is what it is."""
        return f"{self.owner} has {'GPUs' if self.count else 'no GPU'}"


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
    key = gpu_key(spec)
    return 0.0 if key is None else resolved_count(_value(spec, key))


def is_auto(spec: Spec) -> bool:
    """Return whether the GPUs of the stage's workers are still to be resolved."""
    key = gpu_key(spec)
    return key is not None and _value(spec, key) == AUTO


def with_gpus(spec: SpecT, found: Accelerators) -> tuple[SpecT, str | None]:
    """The spec with a number in place of `auto`, and a line with the number and its reason; None for nothing to do."""
    key = gpu_key(spec)
    if key is None or not is_auto(spec):
        return spec, None
    number, reason = (1.0 if found.count else 0.0), found.reason
    engine: Any = getattr(spec, "engine", None)
    if engine is not None and engine.kind == "vllm":
        number, reason = float(engine.tensor_parallel_size), "engine.kind=vllm: engine.tensor_parallel_size"
    return spec.with_({key: number}), f"{key}={number:g} ({reason})"


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

    Asks `nvidia-smi`: torch takes seconds to import. Raises ConfigError where it does not answer.
    """
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, check=False, timeout=NVIDIA_SMI_S)
    except subprocess.TimeoutExpired:
        raise ConfigError(
            "GPUs of this machine",
            f"nvidia-smi has not answered within {NVIDIA_SMI_S:g} s",
            "it lists the GPUs that a stage may use",
            "run nvidia-smi; to do without GPUs, take it off the PATH",
        ) from None
    if told.returncode:  # no driver: what it prints is no list
        return []
    parted = (line.rpartition(",") for line in told.stdout.splitlines() if "," in line)
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


def _value(spec: Spec, key: str) -> Any:
    found: Any = spec
    for part in key.split("."):
        found = getattr(found, part)
    return found
