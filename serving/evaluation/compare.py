"""Builder of the `CompareReport` from the answers: scores with intervals, paired tests, verdicts, advice, samples."""

import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

import numpy as np

from graftwork import metrics, stats
from graftwork.datasets.rows import DatasetRow, fingerprint
from graftwork.errors import ConfigError, DataError
from graftwork.metrics import LATENCY_MS, TTFT_MS, Distribution, Metric, distribution
from graftwork.report import format as words
from graftwork.report.schema import (
    Advice,
    ArmKind,
    ArmReport,
    CompareReport,
    DecisionCard,
    Difference,
    JudgeReport,
    MetricInfo,
    Sample,
    SampleAnswer,
    Score,
    Slice,
)
from graftwork.scoring import EMPTY, AnswerSchema, parse_object
from graftwork.serving.evaluation.answers import AnswerSet, EvalAnswer, check_ids, question, timed
from graftwork.serving.evaluation.differences import Rules, ScoredArms, UnadjustedDifference, arm_score, family, judge
from graftwork.serving.evaluation.scorers.load import Scorers, load_scorers
from graftwork.serving.evaluation.scorers.protocol import ModelReply
from graftwork.serving.evaluation.spec import CompareSpec
from graftwork.serving.evaluation.verdict import METRICS, TEXT, advise
from graftwork.serving.spec import ArmSpec

_SAMPLE_CHARS = 2000
_CUT_NAMED = 0.05
"""Share of an arm's answers cut at max_new_tokens from which on the verdict says so."""


def compare(
    spec: CompareSpec,
    rows: Sequence[DatasetRow],
    answers: AnswerSet,
    schema: AnswerSchema | None,
    *,
    template_digest: str = "",
    fields: Mapping[str, Sequence[str]] | None = None,
    options: AnswerSet | None = None,
    alone: AnswerSet | None = None,
    card: DecisionCard | None = None,
    judged: JudgeReport | None = None,
    notes: Sequence[str] = (),
) -> CompareReport:
    """The comparison's result, the same bytes for the same answers and seed.

    template_digest: the chat template that rendered the prompts; goes into the signatures. fields: the values of
    `spec.slices` and `spec.cluster` by row (`data.read_fields`). options: likelihoods of choices. alone: answers that
    were asked for one at a time (`offline.alone_jobs`), the only source of times. card: what the probes found. judged:
    what an LLM judge preferred. notes: on the questions, shown with those on the answers. Raises DataError: row ids
    missing or twice, a row without gold, an answer missing, an arm answered by two adapter versions or two bases.
    """
    table = Table(spec, rows, answers, load_scorers(spec.scorers, schema), options, alone)
    scored = table.score_arrays(spec, template_digest, (fields or {}).get(spec.cluster) if spec.cluster else None)
    rules, primary = Rules(spec.alpha, spec.equivalence_margin, spec.seed), primary_metric(spec, table.scorers.tested)
    arms = tuple(_arm_report(arm, table, scored, rules) for arm in spec.arms)
    parts = {name: (fields or {})[name] for name in spec.slices}
    kinds = {arm.name: arm.kind for arm in arms}
    advice = advise(scored, kinds, rules, _advised_metrics(scored.metrics, primary), spec.baseline)
    return CompareReport(
        name=spec.name,
        baseline=spec.baseline,
        n=len(rows),
        alpha=spec.alpha,
        seed=spec.seed,
        equivalence_margin=spec.equivalence_margin,
        base_digest=table.base,
        data_fingerprint=fingerprint(rows),
        primary=primary,
        cluster=spec.cluster,
        clusters=len(set(scored.clusters)) if scored.clusters else None,
        metrics=tuple(MetricInfo(**asdict(metric)) for metric in scored.metrics),
        arms=arms,
        differences=_against_baseline(spec, scored, rules),
        contrasts=family(scored, [(c.a, c.b, c.metric) for c in spec.contrasts], rules),
        slices=slices(scored, parts, primary, spec.baseline, rules, spec.slice_min),
        card=card,
        judge=judged,
        advice=_with_cuts(advice, arms),
        samples=_samples(spec, table),
        notes=(*notes, *_notes(arms, table)),
    )


def score_arms(
    spec: CompareSpec,
    rows: Sequence[DatasetRow],
    answers: AnswerSet,
    schema: AnswerSchema | None,
    options: AnswerSet | None = None,
    alone: AnswerSet | None = None,
) -> ScoredArms:
    """Return the scores of each answer, in the order of the rows. Raises DataError, as `compare` does."""
    return Table(spec, rows, answers, load_scorers(spec.scorers, schema), options, alone).score_arrays(spec)


def primary_metric(spec: CompareSpec, measured: Sequence[Metric]) -> str:
    """The metric that the verdict is about. Raises ConfigError where it, or a contrast's, is none of the scorers'."""
    names = [metric.name for metric in measured]
    try:
        spec.require_metrics(names)
    except ValueError as error:
        raise ConfigError("metrics of the comparison", str(error)) from None
    scores = [metric.name for metric in measured if metric.kind != "measure" and metric.better == "higher"]
    chosen = spec.primary or ("both" if "both" in scores else next(iter(scores), None))
    if chosen not in scores:
        raise ConfigError(
            f"primary={spec.primary}",
            "a verdict is about a score of which more is better",
            f"scores here: {', '.join(scores) or 'none'}",
            "name one of them, or add a scorer",
        )
    return chosen


def _advised_metrics(measured: Sequence[Metric], primary: str) -> tuple[str, ...]:
    """The metrics that the advice speaks of, the primary one last."""
    names = {metric.name for metric in measured}
    return (*(name for name in (*METRICS, *TEXT) if name in names and name != primary), primary)


def arm_kind(arm: ArmSpec) -> ArmKind:
    """Return the kind of an arm by its additions to the base."""
    if arm.adapter is None:
        return "prompt" if arm.retriever is None else "rag"
    return "finetune" if arm.retriever is None else "both"


class Table:
    """Answers and scores by arm, in the order of the rows."""

    def __init__(
        self,
        spec: CompareSpec,
        rows: Sequence[DatasetRow],
        answers: AnswerSet,
        scorers: Scorers,
        options: AnswerSet | None = None,
        alone: AnswerSet | None = None,
    ) -> None:
        """options: likelihoods of choices, filed under `ARM~SCORER`; alone: timed answers, under `ARM~alone`."""
        check_ids(rows)
        scorers.check(rows)
        self.rows, self.scorers, self.options = rows, scorers, options or AnswerSet()
        self.alone = {arm.name: timed(alone or AnswerSet(), arm.name) for arm in spec.arms}
        self._times = {(name, one.row_id): one.latency_ms for name, some in self.alone.items() for one in some}
        self.answers = {arm.name: [answers.get(arm.name, row.id) for row in rows] for arm in spec.arms}
        self.scores = {
            name: [self._score(answer, row) for answer, row in zip(said, rows, strict=True)]
            for name, said in self.answers.items()
        }
        good = {name: [answer for answer in said if answer.error is None] for name, said in self.answers.items()}
        self.versions = {
            name: _single(f"arm {name!r}: adapter_version", (answer.adapter_version for answer in said))
            for name, said in good.items()
        }
        self.base = _single("base_digest", (answer.base_digest for said in good.values() for answer in said))

    def score_arrays(
        self, spec: CompareSpec, template_digest: str = "", clusters: Sequence[str] | None = None
    ) -> ScoredArms:
        """All scores as arrays, with what goes into their signatures."""
        recipe: dict[str, object] = {
            "base": (self.base or "unknown")[:8],
            "quant": spec.quant.kind,
            "tmpl": template_digest[:8] or "unknown",
        }
        if clusters is not None:
            recipe["cluster"] = spec.cluster
        return ScoredArms({arm.name: self._values(arm) for arm in spec.arms}, recipe, self.scorers.tested, clusters)

    def _values(self, arm: ArmSpec) -> dict[str, stats.Floats]:
        return {
            metric.name: np.array([one[metric.name] for one in self.scores[arm.name]], dtype=np.float64)
            for metric in self.scorers.tested
        }

    def _score(self, answer: EvalAnswer, row: DatasetRow) -> dict[str, float]:
        if answer.error is not None:
            return self.scorers.failed_scores()
        measured = {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
            "latency_ms": self._times.get((answer.arm, row.id)),
        }
        scored = {
            choice.name: found.logprobs
            for choice in self.scorers.choices
            if (found := self.options.find(f"{answer.arm}~{choice.name}", row.id)) and found.logprobs
        }
        return self.scorers.score(ModelReply.to(row, answer.text, likelihoods=scored, **measured))


def _single(what: str, values: Iterable[str | None]) -> str | None:
    found = sorted({str(value) for value in values if value is not None})
    if len(found) > 1:
        rule = "compared answers share one base, and the answers of an arm one adapter version"
        raise DataError(what, f"found {', '.join(found)}", rule, "remove this run's answers.jsonl and run it again")
    return found[0] if found else None


def _arm_report(arm: ArmSpec, table: Table, scored: ScoredArms, rules: Rules) -> ArmReport:
    said, alone = table.answers[arm.name], table.alone[arm.name]
    scores = {metric.name: arm_score(arm.name, metric, scored, rules) for metric in scored.metrics}
    return ArmReport(
        name=arm.name,
        kind=arm_kind(arm),
        adapter=arm.adapter,
        adapter_version=table.versions[arm.name],
        retriever=f"{arm.retriever.kind}, k={arm.retriever.k}" if arm.retriever else None,
        shots=arm.prompt.shots if arm.prompt else 0,
        n=len(said),
        errors=sum(a.error is not None for a in said),
        not_json=sum(a.error is not None or parse_object(a.text) is None for a in said) if "form" in scores else None,
        truncated=sum(a.finish_reason == "length" for a in said),
        scores={name: score for name, score in scores.items() if score},
        prompt_tokens=_measure_distribution(said, metrics.PROMPT_TOKENS),
        ttft_ms=_measure_distribution(alone, TTFT_MS),
        completion_tokens=_measure_distribution(said, metrics.COMPLETION_TOKENS),
        latency_ms=_measure_distribution(alone, LATENCY_MS),
    )


def _measure_distribution(said: Sequence[EvalAnswer], metric: Metric) -> Distribution | None:
    values = (getattr(answer, metric.name) for answer in said if answer.error is None)
    return distribution((value for value in values if value is not None), metric.unit)


def _against_baseline(spec: CompareSpec, scored: ScoredArms, rules: Rules) -> tuple[Difference, ...]:
    others = [name for name in scored.names if name != spec.baseline]
    families = (
        family(scored, [(name, spec.baseline, metric.name) for name in others], rules) for metric in scored.metrics
    )
    return tuple(difference for one in families for difference in one)


def _samples(spec: CompareSpec, table: Table) -> tuple[Sample, ...]:
    """Questions drawn by the seed alone, so that nobody picked them."""
    count = min(spec.samples, len(table.rows))
    drawn = sorted(random.Random(spec.seed).sample(range(len(table.rows)), count))
    return tuple(_sample(index, table) for index in drawn)


def _sample(index: int, table: Table) -> Sample:
    row = table.rows[index]
    asked = [turn["content"] for turn in question(row) if turn["role"] == "user"]
    answers = tuple(
        _sample_answer(name, said[index], table.scores[name][index]) for name, said in table.answers.items()
    )
    return Sample(row_id=row.id, question=asked[-1] if asked else "", gold=dict(row.gold or {}), answers=answers)


def _sample_answer(arm: str, answer: EvalAnswer, scores: Mapping[str, float]) -> SampleAnswer:
    cut = len(answer.text) - _SAMPLE_CHARS
    text = answer.text if cut <= 0 else f"{answer.text[:_SAMPLE_CHARS]} … ({cut} more characters)"
    shown = {name: value for name, value in scores.items() if not math.isnan(value)}
    return SampleAnswer(arm=arm, text=text, error=answer.error, scores=shown, retrieved_ids=answer.retrieved_ids)


def _with_cuts(advice: Advice, arms: Sequence[ArmReport]) -> Advice:
    """The verdict, and whose answers were cut: such an arm may have been about to say the right thing."""
    cut = [f"{arm.name} {words.percent(arm.truncated / arm.n)}" for arm in arms if arm.truncated / arm.n > _CUT_NAMED]
    if not cut:
        return advice
    return advice.model_copy(update={"sentence": f"{advice.sentence} Answers cut at max_new_tokens: {', '.join(cut)}."})


def _notes(arms: Sequence[ArmReport], table: Table) -> tuple[str, ...]:
    """Return the caveats of the numbers."""
    prose = [arm.name for arm in arms if arm.not_json is not None and arm.not_json - arm.errors > arm.n / 2]
    notes = []
    if prose:
        notes.append(
            f"{', '.join(prose)} answer mostly in prose. Their facts are looked for anywhere in the text, "
            "which flatters them against arms whose values must stand at their key."
        )
    notes += [
        f"{arm.name}: {arm.errors} of {arm.n} requests failed; they count as wrong." for arm in arms if arm.errors
    ]
    notes += [
        f"{arm.name}: {arm.truncated} of {arm.n} answers ({words.percent(arm.truncated / arm.n)}) were cut at "
        f"max_new_tokens."
        for arm in arms
        if arm.truncated / arm.n > _CUT_NAMED
    ]
    return (*notes, *_empty_gold(table), *_note_longer_answers(table))


def _empty_gold(table: Table) -> list[str]:
    """Gold values that are empty have nothing to be found, so that facts leaves them out; what arms wrote there."""
    if "facts" not in {metric.name for metric in table.scorers.tested}:
        return []
    empty = [
        (place, name)
        for place, row in enumerate(table.rows)
        for name, value in (row.gold or {}).items()
        if name not in row.given_fields and value in EMPTY
    ]
    if not empty:
        return []
    fields = Counter(name for _, name in empty)
    filled = {
        arm: sum(_answer_fields(said[place]).get(name) not in EMPTY for place, name in empty)
        for arm, said in table.answers.items()
    }
    return [
        f"facts leaves out {len(empty)} empty gold values ({_join_counts(fields)}): a value invented there costs facts "
        f"nothing, and both and field_accuracy count it as wrong. Invented: {_join_counts(filled)}."
    ]


def _answer_fields(answer: EvalAnswer) -> Mapping[str, object]:
    return (parse_object(answer.text) if answer.error is None else None) or {}


def _join_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _note_longer_answers(table: Table) -> list[str]:
    """Answers that `exact` counts as wrong although the right text is in them."""
    notes = []
    for scorer in table.scorers.exact:
        longer = {
            arm: sum(
                answer.error is None and not score[scorer.name] and scorer.compare(answer.text, row).contains
                for answer, score, row in zip(said, table.scores[arm], table.rows, strict=True)
            )
            for arm, said in table.answers.items()
        }
        if any(count > _CUT_NAMED * len(table.rows) for count in longer.values()):
            notes.append(
                f"{scorer.name} counts answers as wrong that contain the right text and more: "
                f"{_join_counts(longer)} of {len(table.rows)}. It rewards brevity; the scorer qa reports exact "
                "match, F1 and containment together."
            )
    return notes


# Slices: questions that share a field's value. Exploratory: p-values by Benjamini-Hochberg, never a claim.


OTHER = "(other)"


def slices(
    scored: ScoredArms, fields: Mapping[str, Sequence[str]], metric: str, baseline: str, rules: Rules, fewest: int
) -> tuple[Slice, ...]:
    """Every arm against the baseline in every slice. `fields`: the value of each question, by field.

    Values with fewer than `fewest` questions are taken together; where those are too few as well, they are left out.
    """
    parts = [(field, value, part) for field, values in fields.items() for value, part in _parts(scored, values, fewest)]
    others = [name for name in scored.names if name != baseline]
    pairs = [
        [UnadjustedDifference.compute(part, (name, baseline, metric), rules) for name in others] for _, _, part in parts
    ]
    judged = iter(judge([seen for some in pairs for seen in some if seen], rules, "bh"))
    return tuple(
        Slice(
            field=field,
            value=value,
            n=part.n,
            scores=_scores(part, metric, rules),
            differences=tuple(next(judged) for seen in some if seen),
        )
        for (field, value, part), some in zip(parts, pairs, strict=True)
    )


def _parts(scored: ScoredArms, values: Sequence[str], fewest: int) -> list[tuple[str, ScoredArms]]:
    counts = Counter(sorted(values))
    named = [value if counts[value] >= fewest else OTHER for value in values]
    kept = [value for value in counts if counts[value] >= fewest]
    kept += [OTHER] if named.count(OTHER) >= fewest else []
    return [(value, scored.only(np.array([name == value for name in named]))) for value in kept]


def _scores(part: ScoredArms, metric: str, rules: Rules) -> dict[str, Score]:
    found = {arm: arm_score(arm, part.by_name[metric], part, rules) for arm in part.names}
    return {arm: score for arm, score in found.items() if score}
