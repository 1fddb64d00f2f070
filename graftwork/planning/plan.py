"""Plan of a stage: memory and time of its processes, and the check that a machine has room for them."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from graftwork.planning.hardware import Machine
from graftwork.planning.memory import GIB

START_S = 10.0
"""CPU seconds of a process from its start to its first step: imports (8.5), the base, the trainer."""


HEADROOM = 0.95
"""Share of the available memory that a plan may take."""


@dataclass(frozen=True)
class StagePlan:
    """What a stage will take, before it starts."""

    stage: str
    processes: int
    peak_bytes_per_process: int
    """On a GPU what the process takes of the GPU."""
    total_bytes: int
    seconds: float
    verdict: str
    """`fits`, or `needs 9.1 of 8.0 GiB; fits with optim.micro_batch=2`."""
    parts: tuple[tuple[str, int], ...]
    """Bytes of one process, by name."""
    assumptions: tuple[str, ...]
    step_s: float | None = None
    """Seconds of one optimizer step, where the stage trains."""
    warnings: tuple[str, ...] = ()
    """What works, and is better done otherwise."""
    host_bytes_per_process: int = 0
    """Peak in the machine's own memory, where the peak per process is a GPU's."""

    @property
    def fits(self) -> bool:
        return self.verdict == "fits"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "parts": dict(self.parts)}


def charge_bytes(peak_bytes: int, processes: int, machine: Machine) -> int:
    """Bytes to hold against `machine.memory_bytes`: processes share a machine's memory, and have a GPU each."""
    return peak_bytes if machine.gpu is not None else peak_bytes * processes


def fits(charged_bytes: int, machine: Machine) -> bool:
    """Whether so much leaves the headroom free."""
    return charged_bytes <= HEADROOM * machine.memory_bytes


def of_room(charged_bytes: int, machine: Machine) -> str:
    """`9.1 of 8.0 GiB`, of one GPU where there are GPUs."""
    each = " a GPU" if machine.gpu is not None else ""
    return f"{charged_bytes / GIB:.1f} of {machine.memory_bytes / GIB:.1f} GiB{each}"


def verdict_of(charged_bytes: int, machine: Machine, ways_out: Iterable[tuple[str, int]]) -> str:
    """Return `fits`, or what it needs and the nearest change that fits. Bytes are those of `charge_bytes`."""
    if fits(charged_bytes, machine):
        return "fits"
    needs = f"needs {of_room(charged_bytes, machine)}"
    way_out = next((setting for setting, size in ways_out if fits(size, machine)), None)
    return f"{needs}; fits with {way_out}" if way_out else f"{needs}; no change of the spec fits: take a smaller base"
