"""A spec -> a line per stage of what it will take. Rows are read and rendered: sizes are those of the real run.

What only some stages need is imported there: a plan is to answer at once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from graftwork import base_model
from graftwork.base_model import BaseSpec, QuantSpec
from graftwork.cli.replaying import placed, replayed_line
from graftwork.config import Spec
from graftwork.data import read_rows
from graftwork.demo.specs import DemoSpecs, load_specs
from graftwork.demo_spec import DemoSpec
from graftwork.embedding import EmbedderShape, EmbedderSpec, resolve_embedder
from graftwork.errors import ConfigError
from graftwork.memory import MemoryPlan, predict_embedding
from graftwork.model_shape import ModelShape
from graftwork.plan import (
    Answers,
    Gpu,
    Machine,
    StagePlan,
    answers_seconds,
    gpu_here,
    plan_serving,
    plan_training,
    verdict_of,
)
from graftwork.serving.experiment.spec import CompareSpec
from graftwork.serving.quantize.spec import QUANT, QuantizeSpec
from graftwork.serving.spec import ArmSpec, EngineSpec, ServeSpec
from graftwork.study.spec import MeasureSpec, StudySpec
from graftwork.training.settled import sizes_of
from graftwork.training.spec import TrainSpec
from graftwork.tuning.spec import TuneSpec

QUESTION_TOKENS, PASSAGE_TOKENS, ANSWER_TOKENS = 40, 30, 45
"""A comparison's prompts and answers are not rendered for the plan: short questions, one-line passages, small JSON."""
SERVED_RANK = 16


def plan_spec(
    spec: Spec, folder: Path, gpu: Gpu | None = None, gpus: int | None = None, *, replay: bool = False
) -> list[StagePlan]:
    """A line a stage; `folder` is where a demo's spec files lie. Raises UserError as the stages themselves would.

    `gpu`: plan for machines with such GPUs, one a worker, `gpus` workers; None plans for what the spec asks for here.
    `replay`: of a training spec, the real step on tensors without memory as well.
    """
    machine = Machine.here() if gpu is None else Machine.with_gpus(gpu)
    asked = spec if gpu is None else _on_gpus(spec, gpus)
    if not replay:
        return list(_lines(asked, folder, machine))
    if not isinstance(asked, TrainSpec):
        raise ConfigError(f"--replay with kind={getattr(spec, 'kind', '')!r}", "there is no training step in it",
                          "the step of a train spec is replayed", "leave --replay out")  # fmt: skip
    return [replayed_line(asked, machine)]


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


def _lines(spec: Spec, folder: Path, machine: Machine) -> Iterator[StagePlan]:
    if isinstance(spec, ServeSpec | CompareSpec) and spec.engine.kind == "vllm":
        raise ConfigError(
            f"plan of kind={spec.kind!r}", "engine.kind='vllm'", "memory and time are predicted for our own engine",
            "vLLM takes engine.gpu_memory_utilization of each GPU; engine.kind=graftwork can be planned",
        )  # fmt: skip
    if isinstance(spec, TrainSpec):
        from graftwork.training.data import prepare

        data = prepare(spec)
        held_out = sizes_of(data.eval) if data.eval is not None else None
        yield plan_training(spec, _shape(spec.base), sizes_of(data.train), held_out, placed(spec, machine))
    elif isinstance(spec, TuneSpec):
        from graftwork.training.data import prepare
        from graftwork.tuning.plan import plan_tuning
        from graftwork.tuning.winner import winner_spec

        data = prepare(spec.train)
        machine = placed(spec.train, machine)
        assert data.eval is not None, "a sweep's spec demands data.eval"
        yield plan_tuning(spec, _shape(spec.train.base), sizes_of(data.train), sizes_of(data.eval), machine)
        if spec.winner is not None:
            [winner] = _lines(winner_spec(spec, spec.train), folder, machine)
            yield replace(winner, stage="winner")
    elif isinstance(spec, ServeSpec):
        machine = _with_gpu_here(spec, machine)
        yield plan_serving("serve", _shape(spec.base), spec.quant, spec.engine, machine.at(spec.quant),
                           num_cpus=spec.num_cpus, replicas=spec.most_replicas,
                           embedder=_embedding(spec.embedder) if spec.embedder else None,
                           query_embedders=_query_embedders(spec.arms),
                           adapters=[SERVED_RANK] * len(spec.adapters),
                           dequantised=machine.gpu is None and _unpacked(spec.quant))  # fmt: skip
    elif isinstance(spec, CompareSpec):
        adapters = {arm.adapter for arm in spec.arms if arm.adapter}
        machine = _with_gpu_here(spec, machine)
        yield plan_serving("compare", _shape(spec.base), spec.quant, spec.engine, machine.at(spec.quant),
                           num_cpus=spec.num_cpus, query_embedders=_query_embedders(spec.arms),
                           adapters=[SERVED_RANK] * len(adapters),
                           dequantised=machine.gpu is None and _unpacked(spec.quant),
                           answers=_answers(spec))  # fmt: skip
    elif isinstance(spec, QuantizeSpec):
        yield from _precisions(spec, _with_gpu_here(spec, machine))
    elif isinstance(spec, DemoSpec):
        specs = load_specs(spec, folder)
        for stage in (specs.tune, *specs.train):
            yield from _lines(stage, folder, machine)
        yield _serve_and_update(specs, folder, machine)
        yield from _lines(specs.compare, folder, machine)
    elif isinstance(spec, StudySpec):
        from graftwork.study.run import adapter_spec

        for number in range(len(spec.adapters)):
            yield from _lines(adapter_spec(spec, number, folder), folder, machine)
        yield from (_measured(spec, measure, machine.at(spec.quant)) for measure in spec.measures)
    else:
        raise ConfigError(f"plan of kind={getattr(spec, 'kind', '')!r}", "nothing is predicted for it",
                          "train, tune, serve, compare, quantize, study and demo are planned")  # fmt: skip


def _with_gpu_here(spec: ServeSpec | CompareSpec | QuantizeSpec, machine: Machine) -> Machine:
    """The machine with the GPU of this one, where the spec asks for GPUs and the plan names none."""
    if machine.gpu is not None or not spec.gpus:
        return machine
    gpu = gpu_here()
    if gpu is None:
        raise ConfigError(f"num_gpus={spec.gpus:g}", "no GPU is seen from here that the table of the plan has",
                          "a plan is made for a GPU that is known", "graftwork plan FILE --gpu NAME")  # fmt: skip
    return Machine.with_gpus(gpu)


def _serve_and_update(specs: DemoSpecs, folder: Path, machine: Machine) -> StagePlan:
    """The main job's endpoint, the update that is trained beside it, and the burst of requests."""
    [served], [update] = _lines(specs.serve, folder, machine), _lines(specs.update, folder, machine)
    burst, at = specs.demo.burst, machine.at(specs.serve.quant)
    answers = Answers(burst.requests, QUESTION_TOKENS + PASSAGE_TOKENS, burst.max_new_tokens)
    together = specs.serve.engine.with_({"max_batch": burst.concurrency})
    answer_s = answers_seconds(answers, _shape(specs.serve.base), together, at, specs.serve.num_cpus)
    total = served.total_bytes + update.total_bytes
    return replace(
        served,
        total_bytes=total,
        seconds=served.seconds + update.seconds + answer_s,
        verdict=verdict_of(total, machine, ()),
        assumptions=(answers.said(), "an update trains beside the endpoint", *served.assumptions),
    )


def _measured(study: StudySpec, measure: MeasureSpec, machine: Machine) -> StagePlan:
    """A likelihood is a prompt that holds the answer, one for each choice."""
    if measure.kind == "answers":
        answers = _answers(study.comparison(measure))
    else:
        rows = read_rows(measure.eval, limit=measure.limit, need="eval")
        choices = sum(len((row.gold or {}).get("choices", ())) for row in rows)
        answers = Answers(choices * len(measure.arms), QUESTION_TOKENS + ANSWER_TOKENS, 1)
    adapters = {arm.adapter for arm in measure.arms if arm.adapter}
    return plan_serving(f"measure {measure.name}", _shape(study.base), study.quant, EngineSpec(), machine,
                        num_cpus=study.num_cpus, adapters=[SERVED_RANK] * len(adapters),
                        dequantised=_unpacked(study.quant), answers=answers)  # fmt: skip


def _precisions(spec: QuantizeSpec, machine: Machine) -> Iterator[StagePlan]:
    """One process after the other; the time of its answers alone is predicted."""
    adapters = {arm.adapter for arm in spec.arms if arm.adapter}
    for precision in spec.precisions:
        quant = QUANT[precision]
        yield plan_serving(f"quantize {precision}", _shape(spec.base), quant, spec.engine, machine.at(quant),
                           num_cpus=spec.num_cpus, adapters=[SERVED_RANK] * len(adapters),
                           dequantised=machine.gpu is None and _unpacked(quant), answers=_answers(spec))  # fmt: skip


def _answers(spec: CompareSpec | QuantizeSpec) -> Answers:
    rows = len(read_rows(spec.eval, limit=spec.limit, need="eval"))
    passages = sum(arm.retriever.k for arm in spec.arms if arm.retriever) / len(spec.arms)
    return Answers(rows * len(spec.arms), QUESTION_TOKENS + PASSAGE_TOKENS * passages, ANSWER_TOKENS)


def _shape(base: BaseSpec) -> ModelShape:
    return ModelShape.from_config(base_model.resolve(base).config)


def _embedding(spec: EmbedderSpec) -> MemoryPlan:
    return predict_embedding(EmbedderShape.read(resolve_embedder(spec)))


def _query_embedders(arms: Sequence[ArmSpec]) -> list[MemoryPlan]:
    """Of the arms with vectors, each once; vectors are mapped from their file and not counted."""
    used = {arm.retriever.embedder for arm in arms if arm.retriever and arm.retriever.kind != "lexical"}
    return [_embedding(embedder) for embedder in sorted(used, key=lambda embedder: embedder.uri)]


def _unpacked(quant: QuantSpec) -> bool:
    """As `base_model.load` decides on a CPU for serving."""
    return quant.kind == "nf4" and quant.resident != "packed"
