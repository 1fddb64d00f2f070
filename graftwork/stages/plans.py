"""Predictions of memory and time per stage of a spec. Rows are read and rendered: sizes are those of the real run.

Modules that only some stages need are imported in their functions, so that a plan answers at once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from graftwork.adapters.kind import AdapterKind
from graftwork.adapters.lora import LoraSpec
from graftwork.adapters.spec import AdapterSpec
from graftwork.artifacts.publish import require_base
from graftwork.artifacts.registry import UnknownAdapter, resolve
from graftwork.base import load as base_model
from graftwork.base.model_shape import ModelShape
from graftwork.base.source import BaseSpec, is_hub_id
from graftwork.base.support import base_support, check_serving, check_training
from graftwork.config import Spec
from graftwork.errors import ArtifactError, ConfigError
from graftwork.planning.hardware import Gpu, Machine, gpu_here
from graftwork.planning.memory import MemoryPlan, RowSizes, StagePlan, verdict_of
from graftwork.prompts.render import PromptSpec
from graftwork.quantization import PRECISIONS, QuantSpec
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
from graftwork.training.planning.plan import plan_training
from graftwork.training.spec import TrainSpec
from graftwork.tuning.spec import TuneSpec

UNKNOWN_ADAPTER = LoraSpec(rank=16)
"""An adapter that is not published yet, or was trained elsewhere: on all linear layers."""
PLANNED_STEPS = 100
"""Steps of a plan from a config alone, where the spec does not name the number of rows."""
NOT_IN_SPEC = ("objective", "stacked_on", "merge")
"""Keys of a manifest's `method` that are no part of the adapter's spec."""
ADAPTER_SPEC: TypeAdapter[AdapterSpec] = TypeAdapter(AdapterSpec)
NO_PROMPTS: Mapping[str, PromptSpec] = {}


def plan_spec(spec: Spec, folder: Path, gpu: Gpu | None = None, gpus: int | None = None) -> list[StagePlan]:
    """Return a prediction per stage; `folder` has a demo's spec files. Raises UserError as the stages themselves would.

    `gpu`: plan for machines with such GPUs, one a worker, `gpus` workers; None plans for the spec's own resources here.
    """
    machine = Machine.detect() if gpu is None else Machine.with_gpus(gpu)
    spec = spec if gpu is None else _on_gpus(spec, gpus)
    missing = tuple(_missing_adapters(spec))
    given = getattr(spec, "base", None)
    if given is not None and (file := base_model.config_next_to_spec(given, folder)):
        missing += (f"{given.uri} is not on this machine: its sizes are those of {file}",)
        spec = spec.with_({"base.uri": str(file)})
    lines = plan_on(spec, folder, machine)
    base = spec.train.base if isinstance(spec, TuneSpec) else getattr(spec, "base", None)
    support: tuple[str, ...] = ()
    if base is not None:
        config = base_model.read_config(base)
        experts = ModelShape.from_config(config).describe_experts()
        support = (base_support(config).format_line(), *((experts,) if experts else ()))
    return [
        replace(line, assumptions=(*line.assumptions, *support), warnings=(*line.warnings, *missing)) for line in lines
    ]


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


def plan_on(
    spec: Spec,
    folder: Path,
    machine: Machine,
    prompts: Mapping[str, PromptSpec] = NO_PROMPTS,
    *,
    on_cluster: bool = False,
) -> list[StagePlan]:
    """Return a prediction per stage on a machine, for a spec whose `auto` GPUs are resolved. Raises UserError.

    `prompts`: of the adapters that the same plan trains, by task.
    """
    if isinstance(spec, ServeSpec | CompareSpec) and spec.engine.kind == "vllm":
        raise ConfigError(
            f"plan of kind={spec.kind!r}",
            "engine.kind='vllm'",
            "memory and time are predicted for our own engine",
            "vLLM takes engine.gpu_memory_utilization of each GPU; engine.kind=graftwork can be planned",
        )
    if isinstance(spec, ServeSpec | CompareSpec | QuantizeSpec):
        check_serving(spec)
        machine = _with_gpu_here(spec, machine)
    match spec:
        case TrainSpec():
            return [_plan_run(spec, machine, on_cluster)]
        case TuneSpec():
            return _plan_sweep(spec, machine, on_cluster)
        case ServeSpec():
            return [_plan_endpoint(spec, machine)]
        case CompareSpec():
            return [_plan_comparison(spec, machine, prompts)]
        case QuantizeSpec():
            return _plan_precisions(spec, machine, prompts)
        case DemoSpec():
            return _plan_demo(load_specs(spec, folder), folder, machine)
    raise ConfigError(
        f"plan of kind={getattr(spec, 'kind', '')!r}",
        "nothing is predicted for it",
        "train, tune, serve, compare, quantize and demo are planned",
    )


def _plan_run(spec: TrainSpec, machine: Machine, on_cluster: bool = False) -> StagePlan:
    check_training(spec, base_model.read_config(spec.base))
    if base_model.config_file(spec.base) is not None:
        return _plan_config(spec, machine, on_cluster)
    data = prepare(spec)
    held_out = sizes_of(data.eval) if data.eval is not None else None
    work = None
    if spec.outcomes != OutcomesSpec():
        from graftwork.training.evaluation.questions import probes_of

        work = work_of([probe.part for probe in probes_of(spec)])
    machine = _machine_of_run(spec, machine)
    rows = sizes_of(data.train)
    line = plan_training(spec, _shape(spec.base), rows, held_out, machine, work, on_cluster=on_cluster)
    return replace(line, warnings=(*line.warnings, *data.warnings))


def _plan_config(spec: TrainSpec, machine: Machine, on_cluster: bool) -> StagePlan:
    """Of a base without tokenizer: the longest rows that the spec admits."""
    count = spec.data.train_rows or PLANNED_STEPS * spec.optim.rows_per_step
    rows, machine = RowSizes.at_most(spec.max_length, count), _machine_of_run(spec, machine)
    line = plan_training(spec, _shape(spec.base), rows, None, machine, on_cluster=on_cluster)
    note = f"the base has no tokenizer here: {count} rows of max_length={spec.max_length} tokens, half of them trained"
    return replace(line, assumptions=(note, *line.assumptions))


def _plan_sweep(spec: TuneSpec, machine: Machine, on_cluster: bool) -> list[StagePlan]:
    """Of its trials, and of the winner's training where the spec has one."""
    from graftwork.tuning.plan import plan_tuning
    from graftwork.tuning.winner import winner_spec

    data, machine = prepare(spec.train), _machine_of_run(spec.train, machine)
    assert data.eval is not None, "a sweep's spec demands data.eval"
    line = plan_tuning(spec, _shape(spec.train.base), sizes_of(data.train), sizes_of(data.eval), machine)
    trials = replace(line, warnings=(*line.warnings, *data.warnings))
    if spec.winner is None:
        return [trials]
    return [trials, replace(_plan_run(winner_spec(spec, spec.train), machine, on_cluster), stage="winner")]


def _machine_of_run(spec: TrainSpec, machine: Machine) -> Machine:
    """The machine in the dtype that the spec computes in there; with GPUs in the spec, those of this machine."""
    return machine.at(spec.quant) if machine.gpu or not spec.gpus else machine_of(spec)


def _plan_endpoint(spec: ServeSpec, machine: Machine) -> StagePlan:
    return plan_serving(
        "serve",
        _shape(spec.base),
        spec.quant,
        spec.engine,
        machine.at(spec.quant),
        num_cpus=spec.num_cpus,
        replicas=spec.most_replicas,
        embedder=_embedding(spec.embedder) if spec.embedder else None,
        query_embedders=_query_embedders(spec.arms),
        adapters=_adapter_values(spec, spec.adapters),
        dequantised=_is_dequantised(spec.quant, machine),
    )


def _plan_comparison(spec: CompareSpec, machine: Machine, prompts: Mapping[str, PromptSpec]) -> StagePlan:
    from graftwork.serving.request_sizes import compare_answers

    return plan_serving(
        "compare",
        _shape(spec.base),
        spec.quant,
        spec.engine,
        machine.at(spec.quant),
        num_cpus=spec.num_cpus,
        query_embedders=_query_embedders(spec.arms),
        adapters=_adapter_values(spec, _adapters_of(spec.arms)),
        dequantised=_is_dequantised(spec.quant, machine),
        answers=None if base_model.config_file(spec.base) else compare_answers(spec, prompts),
    )


def _plan_precisions(spec: QuantizeSpec, machine: Machine, prompts: Mapping[str, PromptSpec]) -> list[StagePlan]:
    """One process after the other."""
    from graftwork.serving.request_sizes import quantize_answers

    adapters = _adapter_values(spec, _adapters_of(spec.arms))
    answers = quantize_answers(spec, prompts)
    return [
        plan_serving(
            f"quantize {precision}",
            _shape(spec.base),
            quant,
            spec.engine,
            machine.at(quant),
            num_cpus=spec.num_cpus,
            adapters=adapters,
            dequantised=_is_dequantised(quant, machine),
            answers=answers,
        )
        for precision in spec.precisions
        for quant in [PRECISIONS[precision]]
    ]


def _plan_demo(specs: DemoSpecs, folder: Path, machine: Machine) -> list[StagePlan]:
    prompts = {stage.name: stage.prompt for stage in specs.train}
    return [
        *plan_on(specs.tune, folder, machine),
        *(_plan_run(stage, machine) for stage in specs.train),
        _serve_and_update(specs, folder, machine),
        *plan_on(specs.compare, folder, machine, prompts),
    ]


def _serve_and_update(specs: DemoSpecs, folder: Path, machine: Machine) -> StagePlan:
    """Return the prediction of the demo's endpoint with the update that trains meanwhile and the burst of requests."""
    from graftwork.serving.request_sizes import compare_answers

    [served], update = plan_on(specs.serve, folder, machine), _plan_run(specs.update, machine)
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


def _with_gpu_here(spec: ServeSpec | CompareSpec | QuantizeSpec, machine: Machine) -> Machine:
    """The machine with the GPU of this one, where the spec has GPUs and the plan names none."""
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


def _shape(base: BaseSpec) -> ModelShape:
    return ModelShape.from_config(base_model.read_config(base))


def _adapters_of(arms: Sequence[ArmSpec]) -> list[str]:
    return list(dict.fromkeys(arm.adapter for arm in arms if arm.adapter))


def _adapter_values(spec: ServeSpec | CompareSpec | QuantizeSpec, refs: Sequence[str]) -> list[int]:
    """Values of each adapter: of its targets and experts as its manifest names them.

    Raises ArtifactError for an adapter of another base, as serving does; of a base given by its config or by an id of
    the hub, whose weights are not read, only where it lacks the adapter's targets.
    """
    shape, store = _shape(spec.base), Store(spec.root)
    here = base_model.config_file(spec.base) is None and not is_hub_id(spec.base.uri)
    digest = base_model.resolve(spec.base).digest if refs and here else None
    return [_published_values(store, ref, shape, digest) for ref in refs]


def _published_values(store: Store, ref: str, shape: ModelShape, base_digest: str | None) -> int:
    try:
        manifest = resolve(store, ref)
    except UnknownAdapter:
        return UNKNOWN_ADAPTER.trained_params(shape)
    if base_digest is not None:
        require_base(manifest, base_digest)
    try:
        return _published_spec(manifest.method).trained_params(shape)
    except ConfigError as error:
        raise ArtifactError(
            f"adapter {ref}",
            f"it was trained on another base: {error.subject}: {error.problem}",
            "an adapter works only on the weights and tokenizer that it was trained on",
            f"set base: to the model of run {manifest.run}, or leave the adapter out",
        ) from error


def _published_spec(method: Mapping[str, object]) -> AdapterKind:
    """The adapter that a manifest describes; of one that no spec can ask for, a LoRA of its rank on all linears."""
    try:
        return ADAPTER_SPEC.validate_python({key: value for key, value in method.items() if key not in NOT_IN_SPEC})
    except ValidationError:
        rank = method.get("rank")  # of merges and imported adapters over the 256 that a spec may have
        return UNKNOWN_ADAPTER.model_copy(update={"rank": rank}) if isinstance(rank, int) else UNKNOWN_ADAPTER


def _embedding(spec: EmbedderSpec) -> MemoryPlan:
    return predict_embedding(EmbedderShape.read(resolve_embedder(spec)))


def _query_embedders(arms: Sequence[ArmSpec]) -> list[MemoryPlan]:
    """Of the arms with vectors, each once; vectors are mapped from their file and not counted."""
    used = {arm.retriever.embedder for arm in arms if isinstance(arm.retriever, VectorKind)}
    return [_embedding(embedder) for embedder in sorted(used, key=lambda embedder: embedder.uri)]


def _is_dequantised(quant: QuantSpec, machine: Machine) -> bool:
    """As `base.load` decides for serving: on a CPU."""
    return machine.gpu is None and quant.is_4bit and quant.resident != "packed"
