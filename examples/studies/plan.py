"""Plan of a study: memory and time of each adapter's training and of each measure."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from examples.studies.run import adapter_spec
from examples.studies.spec import MeasureSpec, StudySpec
from graftwork.base import load as base_model
from graftwork.base.model_shape import ModelShape
from graftwork.base.support import base_support, check_serving
from graftwork.datasets.rows import read_rows
from graftwork.planning.hardware import Machine
from graftwork.planning.memory import StagePlan
from graftwork.prompts.render import PromptSpec
from graftwork.serving.planning import RequestLoad, plan_serving
from graftwork.serving.request_sizes import LETTER_TOKENS, Sizes, compare_answers, mean, summed
from graftwork.serving.spec import EngineSpec
from graftwork.stages.plans import UNKNOWN_ADAPTER, plan_spec

Prompts = Mapping[str, PromptSpec]
"""Task -> the prompt that its adapter is trained with."""


def plan_study(spec: StudySpec, folder: Path) -> list[StagePlan]:
    """Return a line for each adapter and each measure; `folder` is that of the study's file. Raises UserError."""
    check_serving(spec)
    machine = Machine.detect()
    trained = [adapter_spec(spec, number, folder) for number in range(len(spec.adapters))]
    prompts = {one.name: one.prompt for one in trained}
    return [
        *(line for one in trained for line in plan_spec(one, folder)),
        *(_measured(spec, measure, machine.at(spec.quant), prompts) for measure in spec.measures),
    ]


def likelihood_answers(study: StudySpec, measure: MeasureSpec, prompts: Prompts) -> RequestLoad:
    """Return the requests of a measure of likelihoods: a prompt with its answer for each choice of each row."""
    template = base_model.template(base_model.resolve(study.base))
    sizes = Sizes(study.root, template, read_rows(measure.eval, limit=measure.limit, need="eval"), prompts, 0)
    choices = [[str(one) for one in (row.gold or {}).get("choices", ())] for row in sizes.rows]
    most = max(1, round(sum(map(len, choices)) / len(choices)))
    length = mean([len(sizes.template.encode(text)) for texts in choices for text in texts[:most]])
    count = sum(map(len, choices))
    asked = [RequestLoad(count, sizes.prompt_tokens(arm) + length, LETTER_TOKENS, (arm.name,)) for arm in measure.arms]
    return summed(asked)


def _measured(study: StudySpec, measure: MeasureSpec, machine: Machine, prompts: Prompts) -> StagePlan:
    if measure.kind == "answers":
        answers = compare_answers(study.comparison(measure), prompts)
    else:
        answers = likelihood_answers(study, measure, prompts)
    adapters = {arm.adapter for arm in measure.arms if arm.adapter}
    config = base_model.resolve(study.base).config
    shape = ModelShape.from_config(config)
    line = plan_serving(
        f"measure {measure.name}",
        shape,
        study.quant,
        EngineSpec(),
        machine,
        num_cpus=study.num_cpus,
        adapters=[UNKNOWN_ADAPTER.trained_params(shape)] * len(adapters),
        dequantised=study.quant.kind == "nf4" and study.quant.resident != "packed",
        answers=answers,
    )
    return replace(line, assumptions=(*line.assumptions, base_support(config).format_line()))
