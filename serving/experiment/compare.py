"""Answers of all arms -> `CompareReport`: scores with intervals, paired tests, verdicts, advice, samples."""

import random
from collections.abc import Iterable, Sequence

import numpy as np

from graftwork import metrics, stats
from graftwork.data import Row, fingerprint
from graftwork.errors import DataError
from graftwork.metrics import Distribution, Metric, distribution, signature
from graftwork.report.records import (
    ArmKind,
    ArmReport,
    CompareReport,
    Difference,
    MetricInfo,
    Sample,
    SampleAnswer,
    Score,
)
from graftwork.serving.experiment.advice import advise
from graftwork.serving.experiment.answers import Answer, Answers, question
from graftwork.serving.experiment.offline import check_ids
from graftwork.serving.experiment.scorers.fields import Key, Scores, score
from graftwork.serving.experiment.scorers.schema import AnswerSchema
from graftwork.serving.experiment.spec import CompareSpec
from graftwork.serving.experiment.verdict import Rules, ScoredArms, family
from graftwork.serving.spec import ArmSpec

_SAMPLE_CHARS = 2000


def compare(
    spec: CompareSpec, rows: Sequence[Row], answers: Answers, schema: AnswerSchema, *, template_digest: str = ""
) -> CompareReport:
    """The comparison's result, the same bytes for the same answers and seed.

    template_digest: the chat template that rendered the prompts; goes into the signatures. Raises DataError: row ids
    missing or twice, a row without gold, an answer missing, an arm answered by two adapter versions or two bases.
    """
    check_ids(rows)
    table = _Table(spec, rows, answers, schema)
    recipe = {"base": (table.base or "unknown")[:8], "quant": spec.quant.kind, "tmpl": template_digest[:8] or "unknown"}
    scored = ScoredArms({arm.name: table.values(arm) for arm in spec.arms}, recipe)
    rules = Rules(spec.alpha, spec.equivalence_margin, spec.seed)
    arms = tuple(_arm_report(arm, table, scored, rules) for arm in spec.arms)
    return CompareReport(
        name=spec.name, baseline=spec.baseline, n=len(rows), alpha=spec.alpha, seed=spec.seed,
        equivalence_margin=spec.equivalence_margin, base_digest=table.base, data_fingerprint=fingerprint(rows),
        metrics=tuple(_info(metric) for metric in metrics.SCORES), arms=arms,
        differences=_against_baseline(spec, scored, rules),
        contrasts=family(scored, [(c.a, c.b, c.metric) for c in spec.contrasts], rules),
        advice=advise(scored, {arm.name: arm.kind for arm in arms}, rules),
        samples=_samples(spec, table), notes=_notes(arms),
    )  # fmt: skip


def arm_kind(arm: ArmSpec) -> ArmKind:
    """What the arm adds to the base."""
    if arm.adapter is None:
        return "prompt" if arm.retriever is None else "rag"
    return "finetune" if arm.retriever is None else "both"


class _Table:
    """Answers and scores by arm, in the order of the rows."""

    def __init__(self, spec: CompareSpec, rows: Sequence[Row], answers: Answers, schema: AnswerSchema) -> None:
        keys = [Key.of(row) for row in rows]
        self.rows = rows
        self.answers = {arm.name: [answers.of(arm.name, row.id) for row in rows] for arm in spec.arms}
        self.scores = {name: [_score(answer, key, schema) for answer, key in zip(said, keys, strict=True)]
                       for name, said in self.answers.items()}  # fmt: skip
        good = {name: [answer for answer in said if answer.error is None] for name, said in self.answers.items()}
        self.versions = {name: _single(f"arm {name!r}: adapter_version", (answer.adapter_version for answer in said))
                         for name, said in good.items()}  # fmt: skip
        self.base = _single("base_digest", (answer.base_digest for said in good.values() for answer in said))

    def values(self, arm: ArmSpec) -> dict[str, stats.Floats]:
        return {metric.name: np.array([getattr(one, metric.name) for one in self.scores[arm.name]], dtype=np.float64)
                for metric in metrics.SCORES}  # fmt: skip


def _score(answer: Answer, key: Key, schema: AnswerSchema) -> Scores:
    if answer.error is not None:
        return Scores(0.0, 0.0, 0.0, 0.0, is_json=False)
    return score(answer.text, key, schema)


def _single(what: str, values: Iterable[str | None]) -> str | None:
    found = sorted({str(value) for value in values if value is not None})
    if len(found) > 1:
        rule = "compared answers share one base, and the answers of an arm one adapter version"
        raise DataError(what, f"found {', '.join(found)}", rule, "remove this run's answers.jsonl and run it again")
    return found[0] if found else None


def _arm_report(arm: ArmSpec, table: _Table, scored: ScoredArms, rules: Rules) -> ArmReport:
    said = table.answers[arm.name]
    scores = {metric.name: arm_score(arm.name, metric, scored, rules) for metric in metrics.SCORES}
    return ArmReport(
        name=arm.name, kind=arm_kind(arm), adapter=arm.adapter, adapter_version=table.versions[arm.name],
        retriever=f"{arm.retriever.kind}, k={arm.retriever.k}" if arm.retriever else None,
        shots=arm.prompt.shots if arm.prompt else 0, n=len(said), errors=sum(a.error is not None for a in said),
        not_json=sum(not one.is_json for one in table.scores[arm.name]),
        truncated=sum(a.finish_reason == "length" for a in said), scores=scores,
        prompt_tokens=_measured(said, metrics.PROMPT_TOKENS), ttft_ms=_measured(said, metrics.TTFT_MS),
        completion_tokens=_measured(said, metrics.COMPLETION_TOKENS), latency_ms=_measured(said, metrics.LATENCY_MS),
    )  # fmt: skip


def arm_score(arm: str, metric: Metric, scored: ScoredArms, rules: Rules) -> Score:
    """Mean of an arm on one metric, with its interval: Wilson for shares of answers, else BCa."""
    values = scored.values[arm][metric.name]
    n = len(values)
    if metric.kind == "binary":
        method, interval = "wilson", stats.wilson(int(values.sum()), n, rules.alpha)
    else:
        method, interval = "bca", stats.bca_mean(values, rules.alpha, lowest=0.0, seed=rules.seed)
    recipe = {"arm": arm, **scored.recipe, "ci": method, "seed": rules.seed}
    return Score(
        metric=metric.name, value=float(values.mean()), low=interval.low, high=interval.high, level=1 - rules.alpha,
        method=method, n=n, signature=signature(metric.name, n, recipe),
    )  # fmt: skip


def _measured(said: Sequence[Answer], metric: Metric) -> Distribution | None:
    values = (getattr(answer, metric.name) for answer in said if answer.error is None)
    return distribution((value for value in values if value is not None), metric.unit)


def _against_baseline(spec: CompareSpec, scored: ScoredArms, rules: Rules) -> tuple[Difference, ...]:
    others = [name for name in scored.names if name != spec.baseline]
    families = (
        family(scored, [(name, spec.baseline, metric.name) for name in others], rules) for metric in metrics.SCORES
    )
    return tuple(difference for one in families for difference in one)


def _samples(spec: CompareSpec, table: _Table) -> tuple[Sample, ...]:
    """Questions drawn by the seed alone, so that nobody picked them."""
    count = min(spec.samples, len(table.rows))
    drawn = sorted(random.Random(spec.seed).sample(range(len(table.rows)), count))
    return tuple(_sample(index, table) for index in drawn)


def _sample(index: int, table: _Table) -> Sample:
    row = table.rows[index]
    asked = [turn["content"] for turn in question(row) if turn["role"] == "user"]
    answers = tuple(
        _sample_answer(name, said[index], table.scores[name][index]) for name, said in table.answers.items()
    )
    return Sample(row_id=row.id, question=asked[-1] if asked else "", gold=dict(row.gold or {}), answers=answers)


def _sample_answer(arm: str, answer: Answer, scores: Scores) -> SampleAnswer:
    cut = len(answer.text) - _SAMPLE_CHARS
    text = answer.text if cut <= 0 else f"{answer.text[:_SAMPLE_CHARS]} … ({cut} more characters)"
    return SampleAnswer(arm=arm, text=text, error=answer.error, form=scores.form, facts=scores.facts, both=scores.both,
                        retrieved_ids=answer.retrieved_ids)  # fmt: skip


def _info(metric: Metric) -> MetricInfo:
    return MetricInfo(name=metric.name, unit=metric.unit, better=metric.better, meaning=metric.meaning)


def _notes(arms: Sequence[ArmReport]) -> tuple[str, ...]:
    """What a reader must know before believing the numbers."""
    prose = [arm.name for arm in arms if arm.not_json - arm.errors > arm.n / 2]
    notes = []
    if prose:
        notes.append(f"{', '.join(prose)} answer mostly in prose. Their facts are looked for anywhere in the text, "
                     "which flatters them against arms whose values must stand at their key.")  # fmt: skip
    notes += [
        f"{arm.name}: {arm.errors} of {arm.n} requests failed; they count as wrong." for arm in arms if arm.errors
    ]
    notes += [f"{arm.name}: {arm.truncated} of {arm.n} answers were cut at the token limit."
              for arm in arms if arm.truncated > arm.n / 20]  # fmt: skip
    return tuple(notes)
