"""`auto` in a training spec: the fastest setting that is predicted to fit, found before any worker starts."""

from collections.abc import Iterator
from dataclasses import dataclass

from graftwork.errors import ConfigError
from graftwork.memory import GIB, RowSizes, micro_batch
from graftwork.model_shape import ModelShape
from graftwork.plan.hardware import Machine
from graftwork.plan.seconds import step_seconds
from graftwork.plan.stage import HEADROOM, charge_bytes, fits, of_room, worker_memory
from graftwork.plan.ways_out import suggest_training_changes
from graftwork.training.adapter_spec import PrefixSpec
from graftwork.training.spec import TrainSpec

EQUALLY_FAST = 1.01
"""Of settings within this ratio the one with the least memory is taken."""


@dataclass(frozen=True)
class AutoResult:
    """A spec without `auto`, and why it is as it is."""

    spec: TrainSpec
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Candidate:
    spec: TrainSpec
    bytes: int
    step_s: float


def has_auto(spec: TrainSpec) -> bool:
    """Whether the plan has something to decide."""
    return "auto" in (spec.optim.micro_batch, spec.optim.gradient_checkpointing) or _form_is_open(spec)


def _form_is_open(spec: TrainSpec) -> bool:
    """Whether nf4 may lie in memory as its plain values: on a CPU, where unpacking takes a third of a pass."""
    return spec.quant.kind == "nf4" and spec.quant.resident == "auto" and not spec.gpus


def resolve_auto(spec: TrainSpec, model: ModelShape, rows: RowSizes, machine: Machine) -> AutoResult:
    """Replace `auto` in `optim` and `quant.resident`.

    Raises ConfigError where nothing fits, with the cheapest change that would.
    """
    if not has_auto(spec):
        return AutoResult(spec)
    if model.unplanned and "auto" not in (spec.optim.micro_batch, spec.optim.gradient_checkpointing):
        return AutoResult(spec.with_({"quant.resident": "packed"}), (f"nf4 stays packed: {model.unplanned}",))
    found = [_predict_candidate(one, model, rows, machine) for one in _candidates(spec)]
    fitting = [one for one in found if fits(one.bytes, machine)]
    if not fitting and "auto" not in (spec.optim.micro_batch, spec.optim.gradient_checkpointing):
        return AutoResult(spec)  # it was asked for as it is; `plan` says that it may not fit
    if not fitting:
        raise _nothing_fits(spec, min(found, key=lambda one: one.bytes), model, rows, machine)
    fastest = min(one.step_s for one in fitting)
    best = min((one for one in fitting if one.step_s <= EQUALLY_FAST * fastest), key=lambda one: one.bytes)
    return AutoResult(best.spec, tuple(_reasons(spec, best, machine)))


def _candidates(spec: TrainSpec) -> Iterator[TrainSpec]:
    per_worker = spec.optim.rows_per_step // spec.num_workers
    sizes = [n for n in range(1, per_worker + 1) if per_worker % n == 0]
    if spec.optim.micro_batch != "auto":
        sizes = [spec.optim.micro_batch]
    twice: list[bool | str] = [spec.optim.gradient_checkpointing]
    if twice == ["auto"]:  # PEFT's prefix is cached keys and values, which checkpointing drops
        twice = [False] if isinstance(spec.adapter, PrefixSpec) else [False, True]
    for again in twice:
        for size in sizes:
            for form in ("packed", "dequantised") if _form_is_open(spec) else (spec.quant.resident,):
                keys = {"optim.micro_batch": size, "optim.gradient_checkpointing": again, "quant.resident": form}
                yield spec.with_(keys)


def _predict_candidate(spec: TrainSpec, model: ModelShape, rows: RowSizes, machine: Machine) -> _Candidate:
    peak = worker_memory(spec, model, rows, machine).peak_bytes
    step_s = step_seconds(spec, model, rows, machine, spec.num_workers)
    return _Candidate(spec, charge_bytes(peak, spec.num_workers, machine), step_s)


def _reasons(asked: TrainSpec, best: _Candidate, machine: Machine) -> Iterator[str]:
    predicted = f"predicted {of_room(best.bytes, machine)}"
    if asked.optim.micro_batch == "auto":
        size = micro_batch(best.spec)
        passes = best.spec.optim.rows_per_step // best.spec.num_workers // size
        yield f"micro_batch={size}, accumulation={passes} (the fastest that fits: {predicted})"
    if asked.optim.gradient_checkpointing == "auto":
        yield f"gradient_checkpointing={'on' if best.spec.optim.gradient_checkpointing else 'off'} ({predicted})"
    if _form_is_open(asked) and best.spec.quant.resident == "dequantised":
        yield f"nf4 lies in memory as its plain values (no unpacking in each pass: {predicted})"


def _nothing_fits(
    spec: TrainSpec, least: _Candidate, model: ModelShape, rows: RowSizes, machine: Machine
) -> ConfigError:
    ways = (way for way, size in suggest_training_changes(least.spec, model, rows, machine) if fits(size, machine))
    way = next(ways, None)
    return ConfigError(
        f"{spec.name}: optim.micro_batch={spec.optim.micro_batch}, "
        f"optim.gradient_checkpointing={spec.optim.gradient_checkpointing}",
        f"the least that it can take is {of_room(least.bytes, machine)} (base of {model.params / 1e9:.1f}B weights)",
        f"a run may take {HEADROOM:.0%} of the memory: {HEADROOM * machine.memory_bytes / GIB:.1f} GiB",
        " ".join(f"--set {one}" for one in way.split()) if way and "(" not in way else way or "take a smaller base",
    )
