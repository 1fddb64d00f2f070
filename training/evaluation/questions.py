"""Probes of a run's outcomes: the questions of each part and the scores of their answers. Built in the driver."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from graftwork import metrics, retrieval
from graftwork.base.load import resolve
from graftwork.base.load import template as base_template
from graftwork.datasets.rows import (
    DatasetRow,
    key_check,
    read_fields,
    read_rows,
    render_question,
    render_row,
    resolve_prompt,
)
from graftwork.errors import ConfigError, DataError
from graftwork.metrics import Metric
from graftwork.prompts.render import Message, Passage, Prompt, fit_passages, render
from graftwork.prompts.template import Template
from graftwork.scoring import AnswerSchema, Choices, GoldAnswer
from graftwork.scoring import score as score_fields
from graftwork.stats import Floats
from graftwork.training.evaluation.items import INSTRUCTIONS, pairs
from graftwork.training.evaluation.spec import FairnessSpec, Item, ItemGroup, ItemOutput, RetentionSpec, TaskSpec
from graftwork.training.spec import TrainSpec

TEXT_TOKENS = 256
"""Tokens of a document that are read; the rest is left out and counted."""

Score = Callable[[Sequence[ItemOutput]], dict[str, list[float]]]


@dataclass(frozen=True)
class Probe:
    """A part and what its answers are worth: a value a question, for each metric."""

    part: ItemGroup
    metrics: tuple[Metric, ...]
    """The first is the part's own."""
    score: Score
    units: tuple[str, ...]
    """Of each question: what is independent."""
    groups: tuple[str, ...]
    """Of each question: the group that is looked at alone; empty where there are none."""
    about: str
    """The questions in a few words, for a figure's signature."""
    main: int = 1
    """So many of the first metrics are tested; the others are shown beside them."""
    prompts: tuple[str, ...] = ()
    """The questions as text; of parts that write."""
    warnings: tuple[str, ...] = ()
    """Keys of the part's own rows that are ignored."""

    def scores(self, said: Sequence[ItemOutput]) -> Mapping[str, Floats]:
        """Metric -> a value a question."""
        return {name: np.array(values, dtype=np.float64) for name, values in self.score(said).items()}


def probes_of(spec: TrainSpec) -> list[Probe]:
    """Every part that the spec asks for. Raises ConfigError (it can't be measured of this kind), DataError."""
    asked = spec.outcomes
    if not (asked.task or asked.retention or asked.fairness):
        return []
    if spec.objective.traits.reward_head:
        raise ConfigError(
            f"outcomes with objective.kind={spec.objective.kind}",
            "a reward model gives a score and no text",
            "outcomes are measured of language models",
            "leave out `outcomes`",
        )
    template = base_template(resolve(spec.base))
    found = [_task(spec, asked.task, template)] if asked.task else []
    found += _retention(asked.retention, template) if asked.retention else []
    return found + (_fairness(asked.fairness, template) if asked.fairness else [])


def _task(spec: TrainSpec, asked: TaskSpec, template: Template) -> Probe:
    if spec.data.eval is None or not spec.objective.traits.conversations:
        missing, kind = "eval is not given", f"objective.kind={spec.objective.kind}"
        raise ConfigError(
            "outcomes.task",
            missing if spec.data.eval is None else kind,
            "held-out conversations are answered: those of sft, distill, grpo and rloo",
            "give eval" if spec.data.eval is None else "leave out outcomes.task",
        )
    source = spec.data.source("eval", spec.seed)
    rows = read_rows(source, limit=min(asked.rows, spec.data.eval_rows or asked.rows), need="train")
    schema = AnswerSchema.load(asked.answer_schema) if asked.answer_schema else None
    keys = [GoldAnswer.from_row(row) for row in rows] if all(row.gold for row in rows) else []
    if asked.metric not in ("auto", "exact") and not keys:
        raise DataError(
            f"outcomes.task.metric={asked.metric}",
            f"{source} has rows without a gold object",
            "fields are held against gold",
            "set outcomes.task.metric=exact",
        )
    answers = [row.answer or "" for row in rows]

    def score(said: Sequence[ItemOutput]) -> dict[str, list[float]]:
        texts = [one.text for one in said]
        exact = [float(text.strip() == answer.strip()) for text, answer in zip(texts, answers, strict=True)]
        graded = [score_fields(text, key, schema) for text, key in zip(texts, keys, strict=False)]
        fields = {metric.name: [getattr(one, metric.name) for one in graded] for metric in metrics.SCORES if keys}
        nats = [-one.logprobs[0] / tokens for one, tokens in zip(said, lengths, strict=True)]
        return {**fields, metrics.EXACT.name: exact, metrics.NATS.name: nats}

    # the passages that held-out rows are trained with, as `SftSpec.read` draws them
    context = retrieval.training_context(spec.data.context, spec.seed + 1) if spec.data.context else None
    items = [_task_item(row, context(row) if context else (), spec, template, asked.max_new_tokens) for row in rows]
    lengths = [len(item.continuations[0]) for item in items]
    known = (metrics.BOTH, metrics.FACTS, metrics.FORM, metrics.FIELD_ACCURACY) if keys else ()
    by_name = {one.name: one for one in (*metrics.SCORES, metrics.EXACT)}
    own = (metrics.BOTH if keys else metrics.EXACT) if asked.metric == "auto" else by_name[asked.metric]
    others = [one for one in (*known, metrics.EXACT, metrics.NATS) if one != own]
    about = f"{source}, greedy, at most {asked.max_new_tokens} tokens"
    found = _probe("task", items, (own, *others), score, template, about, units=[row.id for row in rows])
    return replace(found, prompts=tuple(row.question[-1].content for row in rows))


def _task_item(row: DatasetRow, context: Sequence[Passage], spec: TrainSpec, template: Template, write: int) -> Item:
    """The row's question as the run's prompt puts it, and its right answer with the token that ends it."""
    prompt = resolve_prompt(spec.prompt)
    kept, _ = fit_passages(context, template, prompt, spec.data.context.context_tokens if spec.data.context else None)
    asked = render_question(row, template, prompt, kept, spec.data.thinking).ids
    whole = render_row(row, template, prompt, kept, spec.data.thinking)[-1]
    if not any(whole.loss_mask[len(asked) :]):
        raise DataError(
            f"{row.where}: messages",
            "its last turn has weight 0",
            "outcomes measure the last turn of each held-out row",
            "leave the row out of data.eval",
        )
    last = len(whole.ids) - next(n for n, trained in enumerate(reversed(whole.loss_mask)) if trained)
    return Item(row.id, tuple(asked), (tuple(whole.ids[len(asked) : last]),), write)


def _retention(asked: RetentionSpec, template: Template) -> list[Probe]:
    found = [_text(asked.text, asked.text_rows, template)] if asked.text else []
    if asked.choices:
        keys = key_check("eval")
        rows = read_rows(asked.choices, limit=asked.choice_rows, need="eval", keys=keys)
        about = f"{asked.choices}, likeliest choice"
        chosen = [(row, _read_choices(asked.choices, row)) for row in rows]
        made = _choices("choices", chosen, [""] * len(rows), None, template, about, fair=False)
        found.append(replace(made, warnings=keys.note("outcomes.retention.choices")))
    return [*found, _instructions(asked.max_new_tokens, template)] if asked.instructions else found


def _text(uri: str, limit: int, template: Template) -> Probe:
    keys = key_check("eval")
    rows = read_rows(uri, limit=limit, need="eval", keys=keys)
    texts = [(row.id, template.encode(_read_choices(uri, row).texts[0])) for row in rows]
    items = [Item(name, (ids[0],), (tuple(ids[1:TEXT_TOKENS]),)) for name, ids in texts if len(ids) > 1]
    cut = sum(len(ids) > TEXT_TOKENS for _, ids in texts)

    def score(said: Sequence[ItemOutput]) -> dict[str, list[float]]:
        pairs = zip(said, items, strict=True)
        return {"nats": [-one.logprobs[0] / len(item.continuations[0]) for one, item in pairs]}

    about = f"{uri}, mean over texts" + (f", {cut} texts cut to {TEXT_TOKENS} tokens" if cut else "")
    units = [row.doc_id or row.id for row, (_, ids) in zip(rows, texts, strict=True) if len(ids) > 1]
    found = _probe("text", items, (metrics.NATS,), score, template, about, units=units)
    return replace(found, warnings=keys.note("outcomes.retention.text"))


def _choices(
    name: str,
    asked: Sequence[tuple[DatasetRow, Choices]],
    groups: Sequence[str],
    system: str | None,
    template: Template,
    about: str,
    *,
    fair: bool,
) -> Probe:
    rows, choices = [row for row, _ in asked], [choice for _, choice in asked]
    items = [
        Item(
            row.id,
            _prompt_ids(row.question, system, template),
            tuple(tuple(template.continuation_ids(text)) for text in choice.texts),
        )
        for row, choice in zip(rows, choices, strict=True)
    ]

    def score(said: Sequence[ItemOutput]) -> dict[str, list[float]]:
        lengths = [np.array([len(one) for one in item.continuations]) for item in items]
        sums = [np.array(one.logprobs) for one in said]
        by_token = [int(np.argmax(sum_ / length)) for sum_, length in zip(sums, lengths, strict=True)]
        by_sum = [int(np.argmax(sum_)) for sum_ in sums]
        right = [choice.right for choice in choices]
        return {
            "bias": [float(choice.signs[at]) for choice, at in zip(choices, by_token, strict=True)],
            "choice": [float(at == one) for at, one in zip(by_token, right, strict=True)],
            "choice_sum": [float(at == one) for at, one in zip(by_sum, right, strict=True)],
        }

    shown = (metrics.BIAS, metrics.CHOICE) if fair else (metrics.CHOICE, metrics.CHOICE_SUM)
    units = [row.doc_id or row.id for row in rows] if fair else [row.id for row in rows]
    return _probe(
        name, items, shown, score, template, about, units=units, groups=groups, main=len(shown) if fair else 1
    )


def _instructions(write: int, template: Template) -> Probe:
    items = [
        Item(one.id, _prompt_ids((Message("user", one.prompt),), None, template), (), write) for one in INSTRUCTIONS
    ]

    def score(said: Sequence[ItemOutput]) -> dict[str, list[float]]:
        return {"follows": [float(rule.follows(one.text)) for rule, one in zip(INSTRUCTIONS, said, strict=True)]}

    about = f"{len(items)} prompts of graftwork, greedy, at most {write} tokens"
    found = _probe("instructions", items, (metrics.FOLLOWS,), score, template, about, units=[one.id for one in items])
    return replace(found, prompts=tuple(one.prompt for one in INSTRUCTIONS))


def _fairness(asked: FairnessSpec, template: Template) -> list[Probe]:
    keys = key_check("eval", [asked.by] if asked.by else ())
    rows = read_rows(asked.eval, need="eval", keys=keys)
    groups = read_fields(asked.eval, [asked.by])[asked.by] if asked.by else ("",) * len(rows)
    kept = [at for at in range(len(rows)) if groups[:at].count(groups[at]) < asked.rows]
    about = f"{asked.eval}, likeliest choice by mean log-probability a token, clustered by doc_id"
    chosen = [(rows[at], _read_choices(asked.eval, rows[at])) for at in kept]
    found = _choices("fairness", chosen, [groups[at] for at in kept], asked.system, template, about, fair=True)
    found = replace(found, warnings=keys.note("outcomes.fairness.eval"))
    return [found, _pairs(template)] if asked.pairs else [found]


def _pairs(template: Template) -> Probe:
    made = pairs()
    items = [
        Item(
            f"{pair.id}-{side}",
            tuple(template.encode(pair.prompts[side])),
            tuple(tuple(template.continuation_ids(ending)) for ending in pair.endings),
        )
        for pair in made
        for side in (0, 1)
    ]

    def score(said: Sequence[ItemOutput]) -> dict[str, list[float]]:
        lean = [
            one.logprobs[0] / len(item.continuations[0]) - one.logprobs[1] / len(item.continuations[1])
            for one, item in zip(said, items, strict=True)
        ]
        sides = list(zip(lean[0::2], lean[1::2], strict=True))
        return {
            "pair_gap": [other - first for first, other in sides],
            "pair_bias": [float(other > 0) - float(first > 0) for first, other in sides],
        }

    about = "sentences of graftwork that differ in a name, plain text, clustered by sentence"
    units = [pair.id.rsplit("-", 2)[0] for pair in made]
    return _probe(
        "pairs",
        items,
        (metrics.PAIR_GAP, metrics.PAIR_BIAS),
        score,
        template,
        about,
        units=units,
        groups=[pair.axis for pair in made],
    )


def _read_choices(uri: str, row: DatasetRow) -> Choices:
    """The row's choices; its file is named where it has none."""
    try:
        return Choices.from_row(row)
    except DataError as error:
        raise DataError(f"outcomes, {uri}, {error.subject}", error.problem, error.rule, error.hint) from None


def _prompt_ids(question: Sequence[Message], system: str | None, template: Template) -> tuple[int, ...]:
    return tuple(render(question, template, prompt=Prompt(system), generate=True).ids)


def _probe(
    name: str,
    items: Sequence[Item],
    shown: tuple[Metric, ...],
    score: Score,
    template: Template,
    about: str,
    *,
    units: Sequence[str],
    groups: Sequence[str] = (),
    main: int = 1,
) -> Probe:
    part = ItemGroup(name, tuple(items), tuple(sorted(template.stop_ids)), template.pad_id)
    return Probe(part, shown, score, tuple(units), tuple(groups) or ("",) * len(units), about, main)
