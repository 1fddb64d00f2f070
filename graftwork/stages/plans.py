"""A spec -> a line per stage of what it will take. Rows are read and rendered: sizes are those of the real run.

What only some stages need is imported there: a plan is to answer at once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from graftwork.artifacts.registry import UnknownAdapter, resolve
from graftwork.base import load as base_model
from graftwork.base.model_shape import ModelShape
from graftwork.base.spec import BaseSpec
from graftwork.base.support import base_support, check_serving, check_training
from graftwork.config import Spec
from graftwork.errors import ConfigError
from graftwork.planning.hardware import Gpu, Machine, gpu_here
from graftwork.planning.memory import FP32, FRAGMENTS, MemoryPlan, TokenWork
from graftwork.planning.plan import StagePlan, charge_bytes, verdict_of
from graftwork.prompts.render import PromptSpec
from graftwork.quantization.quantizer import import_bitsandbytes
from graftwork.quantization.spec import PRECISIONS, QuantSpec
from graftwork.retrieval.dense import VectorKind
from graftwork.retrieval.embedder import EmbedderShape, EmbedderSpec, resolve_embedder
from graftwork.serving.evaluation.spec import CompareSpec
from graftwork.serving.planning import RequestLoad, answers_seconds, plan_serving, predict_embedding
from graftwork.serving.quantize.spec import QuantizeSpec
from graftwork.serving.spec import ArmSpec, ServeSpec
from graftwork.stages.demo_spec import DemoSpec, DemoSpecs, load_specs
from graftwork.storage.store import Store
from graftwork.training.autotune import machine_of, sizes_of
from graftwork.training.evaluation.spec import OutcomesSpec, work_of
from graftwork.training.objectives.rows import prepare
from graftwork.training.planning.memory import ALLOCATOR_SHARE, predict_training
from graftwork.training.planning.plan import plan_training, resolve_auto, suggest_training_changes
from graftwork.training.spec import TrainSpec
from graftwork.tuning.spec import TuneSpec

SERVED_RANK = 16
NO_PROMPTS: Mapping[str, PromptSpec] = {}


def plan_spec(
    spec: Spec, folder: Path, gpu: Gpu | None = None, gpus: int | None = None, *, replay: bool = False
) -> list[StagePlan]:
    """Return a prediction per stage; `folder` has a demo's spec files. Raises UserError as the stages themselves would.

    `gpu`: plan for machines with such GPUs, one a worker, `gpus` workers; None plans for what the spec asks for here.
    `replay`: of a training spec, the real step on tensors without memory as well.
    """
    machine = Machine.detect() if gpu is None else Machine.with_gpus(gpu)
    asked = spec if gpu is None else _on_gpus(spec, gpus)
    if not replay:
        missing = tuple(_missing_adapters(asked))
        lines = (_with_support(line, asked) for line in _lines(asked, folder, machine))
        return [replace(line, warnings=(*line.warnings, *missing)) for line in lines]
    if not isinstance(asked, TrainSpec):
        raise ConfigError(
            f"--replay with kind={getattr(spec, 'kind', '')!r}",
            "there is no training step in it",
            "the step of a train spec is replayed",
            "leave --replay out",
        )
    return [_with_support(replayed_line(asked, machine, _outcomes(asked)), asked)]


def _missing_adapters(spec: Spec) -> Iterator[str]:
    """Yield a line for each adapter of an endpoint or a comparison that is not published yet."""
    if not isinstance(spec, ServeSpec | CompareSpec):
        return
    named = [*getattr(spec, "adapters", ()), *(arm.adapter for arm in spec.arms if arm.adapter)]
    for ref in dict.fromkeys(named):
        try:
            resolve(Store(spec.root), ref)
        except UnknownAdapter as error:
            yield f"{error.subject}: {error.problem}"


def _with_support(line: StagePlan, spec: Spec) -> StagePlan:
    """With the stages that support the spec's base."""
    base = spec.train.base if isinstance(spec, TuneSpec) else getattr(spec, "base", None)
    if base is None:
        return line
    return replace(line, assumptions=(*line.assumptions, base_support(base_model.resolve(base).config).format_line()))


def plan_on(spec: Spec, folder: Path, machine: Machine) -> list[StagePlan]:
    """A line a stage on the machine of a job's target, for a spec whose `auto` GPUs are resolved. Raises UserError."""
    return list(_lines(spec, folder, machine))


def _on_gpus(spec: Spec, gpus: int | None) -> Spec:
    """A spec whose workers or replicas have a GPU each. Raises ConfigError for a stage that is not planned for GPUs."""
    if isinstance(spec, TrainSpec):
        return spec.with_({"gpus_per_worker": 1, **({"num_workers": gpus} if gpus else {})})
    if isinstance(spec, ServeSpec) and gpus is None:
        return spec
    raise ConfigError(
        f"--gpu{' --gpus' if gpus else ''} with kind={getattr(spec, 'kind', '')!r}",
        "it is planned for this machine alone",
        "--gpu plans a train spec (--gpus workers), or a serve spec with a GPU for each of its replicas",
        "plan the stages one by one, or leave --gpu out",
    )


def _lines(
    spec: Spec, folder: Path, machine: Machine, prompts: Mapping[str, PromptSpec] = NO_PROMPTS
) -> Iterator[StagePlan]:
    """`prompts`: of the adapters that the same plan trains, by task."""
    if isinstance(spec, ServeSpec | CompareSpec) and spec.engine.kind == "vllm":
        raise ConfigError(
            f"plan of kind={spec.kind!r}",
            "engine.kind='vllm'",
            "memory and time are predicted for our own engine",
            "vLLM takes engine.gpu_memory_utilization of each GPU; engine.kind=graftwork can be planned",
        )
    if isinstance(spec, ServeSpec | CompareSpec | QuantizeSpec):
        check_serving(spec)
    if isinstance(spec, TrainSpec):
        check_training(spec, base_model.resolve(spec.base).config)
        data = prepare(spec)
        held_out = sizes_of(data.eval) if data.eval is not None else None
        line = plan_training(
            spec, _shape(spec.base), sizes_of(data.train), held_out, placed(spec, machine), _outcomes(spec)
        )
        yield replace(line, warnings=(*line.warnings, *data.warnings))
    elif isinstance(spec, TuneSpec):
        from graftwork.tuning.plan import plan_tuning
        from graftwork.tuning.winner import winner_spec

        data = prepare(spec.train)
        machine = placed(spec.train, machine)
        assert data.eval is not None, "a sweep's spec demands data.eval"
        line = plan_tuning(spec, _shape(spec.train.base), sizes_of(data.train), sizes_of(data.eval), machine)
        yield replace(line, warnings=(*line.warnings, *data.warnings))
        if spec.winner is not None:
            [winner] = _lines(winner_spec(spec, spec.train), folder, machine)
            yield replace(winner, stage="winner")
    elif isinstance(spec, ServeSpec):
        machine = _with_gpu_here(spec, machine)
        yield plan_serving(
            "serve",
            _shape(spec.base),
            spec.quant,
            spec.engine,
            machine.at(spec.quant),
            num_cpus=spec.num_cpus,
            replicas=spec.most_replicas,
            embedder=_embedding(spec.embedder) if spec.embedder else None,
            query_embedders=_query_embedders(spec.arms),
            adapters=[SERVED_RANK] * len(spec.adapters),
            dequantised=machine.gpu is None and _unpacked(spec.quant),
        )
    elif isinstance(spec, CompareSpec):
        from graftwork.serving.request_sizes import compare_answers

        adapters = {arm.adapter for arm in spec.arms if arm.adapter}
        machine = _with_gpu_here(spec, machine)
        yield plan_serving(
            "compare",
            _shape(spec.base),
            spec.quant,
            spec.engine,
            machine.at(spec.quant),
            num_cpus=spec.num_cpus,
            query_embedders=_query_embedders(spec.arms),
            adapters=[SERVED_RANK] * len(adapters),
            dequantised=machine.gpu is None and _unpacked(spec.quant),
            answers=compare_answers(spec, prompts),
        )
    elif isinstance(spec, QuantizeSpec):
        yield from _precisions(spec, _with_gpu_here(spec, machine), prompts)
    elif isinstance(spec, DemoSpec):
        specs = load_specs(spec, folder)
        for stage in (specs.tune, *specs.train):
            yield from _lines(stage, folder, machine)
        prompts = {stage.name: stage.prompt for stage in specs.train}
        yield _serve_and_update(specs, folder, machine)
        yield from _lines(specs.compare, folder, machine, prompts)
    else:
        raise ConfigError(
            f"plan of kind={getattr(spec, 'kind', '')!r}",
            "nothing is predicted for it",
            "train, tune, serve, compare, quantize and demo are planned",
        )


def _with_gpu_here(spec: ServeSpec | CompareSpec | QuantizeSpec, machine: Machine) -> Machine:
    """The machine with the GPU of this one, where the spec asks for GPUs and the plan names none."""
    if machine.gpu is not None or not spec.gpus:
        return machine
    gpu = gpu_here()
    if gpu is None:
        raise ConfigError(
            f"num_gpus={spec.gpus:g}",
            "this machine has no GPU of the plan's table",
            "a plan needs a GPU with known figures",
            "graftwork plan FILE --gpu NAME",
        )
    return Machine.with_gpus(gpu)


def _serve_and_update(specs: DemoSpecs, folder: Path, machine: Machine) -> StagePlan:
    """Return the prediction of the demo's endpoint with the update that trains meanwhile and the burst of requests."""
    from graftwork.serving.request_sizes import compare_answers

    [served], [update] = _lines(specs.serve, folder, machine), _lines(specs.update, folder, machine)
    burst, at = specs.demo.burst, machine.at(specs.serve.quant)
    asked = compare_answers(specs.compare.with_({"limit": burst.requests}), {})
    answers = RequestLoad(burst.requests, asked.prompt_tokens, burst.max_new_tokens)
    together = specs.serve.engine.with_({"max_batch": burst.concurrency})
    answer_s = answers_seconds(answers, _shape(specs.serve.base), together, at, specs.serve.num_cpus)
    total = served.total_bytes + update.total_bytes
    return replace(
        served,
        total_bytes=total,
        seconds=served.seconds + update.seconds + answer_s,
        verdict=verdict_of(total, machine, ()),
        assumptions=(answers.describe(), "an update trains next to the endpoint", *served.assumptions),
    )


def _precisions(spec: QuantizeSpec, machine: Machine, prompts: Mapping[str, PromptSpec]) -> Iterator[StagePlan]:
    """One process after the other."""
    from graftwork.serving.request_sizes import quantize_answers

    adapters = {arm.adapter for arm in spec.arms if arm.adapter}
    answers = quantize_answers(spec, prompts)
    for precision in spec.precisions:
        quant = PRECISIONS[precision]
        yield plan_serving(
            f"quantize {precision}",
            _shape(spec.base),
            quant,
            spec.engine,
            machine.at(quant),
            num_cpus=spec.num_cpus,
            adapters=[SERVED_RANK] * len(adapters),
            dequantised=machine.gpu is None and _unpacked(quant),
            answers=answers,
        )


def _outcomes(spec: TrainSpec) -> TokenWork | None:
    """What is measured before and after, rendered."""
    if spec.outcomes == OutcomesSpec():
        return None
    from graftwork.training.evaluation.questions import probes_of

    return work_of([probe.part for probe in probes_of(spec)])


def _shape(base: BaseSpec) -> ModelShape:
    return ModelShape.from_config(base_model.resolve(base).config)


def _embedding(spec: EmbedderSpec) -> MemoryPlan:
    return predict_embedding(EmbedderShape.read(resolve_embedder(spec)))


def _query_embedders(arms: Sequence[ArmSpec]) -> list[MemoryPlan]:
    """Of the arms with vectors, each once; vectors are mapped from their file and not counted."""
    used = {arm.retriever.embedder for arm in arms if isinstance(arm.retriever, VectorKind)}
    return [_embedding(embedder) for embedder in sorted(used, key=lambda embedder: embedder.uri)]


def _unpacked(quant: QuantSpec) -> bool:
    """As `base_model.load` decides on a CPU for serving."""
    return quant.is_4bit and quant.resident != "packed"


STEP = "step, replayed"
SHOWN = ("process", "base weights", "trained weights", "optimizer", "buffers", "CUDA")
"""Parts of the closed form that a replay does not replace: what workers share and what is no tensor."""


def placed(spec: TrainSpec, machine: Machine) -> Machine:
    """The machine in the dtype that the spec computes in there; where it asks for GPUs, the ones that there are."""
    return machine.at(spec.quant) if machine.gpu or not spec.gpus else machine_of(spec)


def replayed_line(spec: TrainSpec, machine: Machine, outcomes: TokenWork | None = None) -> StagePlan:
    """`outcomes`: measured before and after. Raises ConfigError for what cannot be replayed."""
    import_bitsandbytes()
    from graftwork.training.planning.fake_step import Replayed, replay

    base, data = base_model.resolve(spec.base), prepare(spec)
    shape, rows, machine = ModelShape.from_config(base.config), sizes_of(data.train), placed(spec, machine)
    held_out = sizes_of(data.eval) if data.eval is not None else None
    line = plan_training(spec, shape, rows, held_out, machine, outcomes)
    spec = resolve_auto(spec, shape, rows, machine).spec
    whole = spec.adapter.trains_base and machine.gpu is None
    found: Replayed = replay(spec, base.config, rows, value_bytes=FP32 if whole else machine.value_bytes)
    closed = predict_training(spec, shape, rows, value_bytes=machine.value_bytes)
    parts = _parts(closed, found.step_bytes, on_gpu=machine.gpu is not None)
    peak = sum(size for _, size in parts)
    workers = spec.num_workers
    return replace(
        line,
        peak_bytes_per_process=peak,
        total_bytes=peak * workers,
        parts=parts,
        verdict=verdict_of(
            charge_bytes(peak, workers, machine), machine, suggest_training_changes(spec, shape, rows, machine)
        ),
        assumptions=(
            *line.assumptions,
            f"the step was replayed on tensors without memory in {found.seconds:.1f} s; the closed form says "
            f"{closed.peak_bytes / 2**30:.2f} GiB ({closed.peak_bytes / peak - 1:+.1%})",
        ),
    )


def _parts(closed: MemoryPlan, step: int, *, on_gpu: bool) -> tuple[tuple[str, int], ...]:
    parts = {name: size for name, size in closed.parts if name in SHOWN}
    parts[STEP] = step
    if on_gpu:
        parts["fragments"] = round(FRAGMENTS * (sum(parts.values()) - parts.get("CUDA", 0)))
    else:
        parts["allocator"] = round(ALLOCATOR_SHARE * step)
    return tuple(parts.items())
