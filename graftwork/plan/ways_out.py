"""Changes of a training spec that need less memory, the cheapest first."""

from collections.abc import Iterator
from typing import Any

from graftwork.errors import ConfigError
from graftwork.memory import RowSizes, micro_batch
from graftwork.model_shape import ModelShape
from graftwork.plan.hardware import Machine
from graftwork.plan.stage import charge_bytes, worker_memory
from graftwork.training.adapter_spec import FullSpec, PrefixSpec
from graftwork.training.spec import TrainSpec

MOST_WORKERS = 64
Change = dict[str, Any]


def suggest_training_changes(
    spec: TrainSpec, model: ModelShape, rows: RowSizes, machine: Machine
) -> Iterator[tuple[str, int]]:
    """(a setting, bytes to hold against the machine's memory with it). A change that the spec refuses is left out."""
    for change in _changes(spec, machine):
        try:
            changed = spec.with_(change)
            peak = worker_memory(changed, model, rows, machine.at(changed.quant)).peak_bytes
        except ConfigError:
            continue
        yield _set_options(change), charge_bytes(peak, changed.num_workers, machine)
    for share in (0.75, 0.5, 0.25):
        length, shorter = rows.without_longer(share)
        peak = worker_memory(spec, model, shorter, machine).peak_bytes
        yield f"max_length={length} (longer rows are dropped)", charge_bytes(peak, spec.num_workers, machine)


def _changes(spec: TrainSpec, machine: Machine) -> Iterator[Change]:
    """Smaller passes cost little time, computing twice a third, sharing its messages; then what is trained changes."""
    size = micro_batch(spec)
    while size > 1:
        size //= 2
        yield {"optim.micro_batch": size}
    least: Change = {"optim.micro_batch": 1} if micro_batch(spec) > 1 else {}
    if not spec.optim.gradient_checkpointing and not isinstance(spec.adapter, PrefixSpec):
        yield {"optim.gradient_checkpointing": True}
        least |= {"optim.gradient_checkpointing": True}
        yield least
    yield from ({**least, **change} for change in _shared(spec, machine))
    if isinstance(spec.adapter, FullSpec):
        yield {**least, "adapter": {"kind": "lora"}}
        yield {**least, "adapter": {"kind": "lora"}, "quant": {"kind": "nf4"}}
    elif spec.quant.kind != "nf4":
        yield {**least, "quant": {"kind": "nf4"}}
    yield from ({**least, **change} for change in _workers(spec, machine))


def _shared(spec: TrainSpec, machine: Machine) -> Iterator[Change]:
    """Other strategies for the workers that there are."""
    kinds = ("zero1", "zero2", "zero3")
    if spec.quant.kind != "none" or (spec.num_workers == 1 and machine.gpu is None):
        return
    now = spec.strategy.kind
    later = kinds[kinds.index(now) + 1 :] if now in kinds else kinds
    if spec.num_workers > 1:
        yield from ({"strategy": {"kind": kind}} for kind in later)
    if machine.gpu is not None:
        yield {"strategy": {"kind": "zero2", "offload_optimizer": "cpu"}}
        yield {"strategy": {"kind": "zero3", "offload_optimizer": "cpu", "offload_weights": "cpu"}}


def _workers(spec: TrainSpec, machine: Machine) -> Iterator[Change]:
    """Fewer workers where they share one memory; more, with a share of the weights each, where each has a GPU."""
    rows = spec.optim.rows_per_step
    if machine.gpu is None:
        yield from ({"num_workers": n} for n in range(spec.num_workers - 1, 0, -1) if rows % n == 0)
    elif spec.quant.kind == "none":
        more = (n for n in (2, 4, 8, 16, 32, MOST_WORKERS) if n > spec.num_workers and rows % n == 0)
        yield from ({"num_workers": n, "strategy": {"kind": "zero3"}} for n in more)


def _set_options(change: Change) -> str:
    """As `--set` takes them."""
    said = []
    for key, value in change.items():
        if isinstance(value, dict):
            said += [f"{key}.{name}={one}" for name, one in value.items()]
        else:
            said.append(f"{key}={str(value).lower() if isinstance(value, bool) else value}")
    return " ".join(said)
