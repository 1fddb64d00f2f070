"""Measurements of all precisions -> `QuantizeReport`: scores, paired differences to the reference, the recommendation.

Scores, intervals and tests are those of a comparison (`serving.experiment`): an arm at a precision is an arm there.
"""

import math
import statistics
from collections.abc import Sequence

import numpy as np

from graftwork import metrics
from graftwork.answers.fields import FieldScores, GoldAnswer, score
from graftwork.answers.schema import AnswerSchema
from graftwork.data import DatasetRow, fingerprint
from graftwork.metrics import Distribution, distribution
from graftwork.report.quantize_records import PrecisionArm, PrecisionFacts, PrecisionRow, QuantizeReport
from graftwork.report.records import Difference
from graftwork.serving.experiment.verdict import Rules, ScoredArms, arm_score, family
from graftwork.serving.quantize.measured import AnswerText, MeasuredArm, PrecisionResult
from graftwork.serving.quantize.rule import Candidate, PrecisionVerdict, Rule, recommend
from graftwork.serving.quantize.spec import QuantizeSpec
from graftwork.stats import Floats

_WRONG = FieldScores(0.0, 0.0, 0.0, 0.0, is_json=False)


def judge(
    spec: QuantizeSpec,
    measured: Sequence[PrecisionResult],
    rows: Sequence[DatasetRow],
    schema: AnswerSchema,
    *,
    text: str,
    template_digest: str,
) -> QuantizeReport:
    """The result, the same for the same measurements and seed. `text` says what perplexity was taken on."""
    digest = measured[0].base_digest
    scored = _scored(measured, rows, schema, {"base": digest[:8], "tmpl": template_digest[:8]})
    rules = Rules(spec.alpha, spec.margin, spec.seed)
    differences = _differences(spec, scored, rules)
    found = recommend(_candidates(spec, measured, differences), _rule(spec))
    said = {finding.precision: finding for finding in found.findings}
    return QuantizeReport(
        name=spec.name, base_digest=digest, reference=spec.reference, metric=spec.metric, margin=spec.margin,
        min_speed=spec.min_speed, alpha=spec.alpha, seed=spec.seed, n=len(rows), data_fingerprint=fingerprint(rows),
        text=text, precisions=tuple(_row(one, said[one.precision], scored, rules) for one in measured),
        differences=differences, recommended=found.precision, sentence=found.sentence,
        notes=tuple(_notes(spec, measured, scored)),
    )  # fmt: skip


def label(precision: str, arm: str) -> str:
    """How an arm at a precision is named in differences and signatures."""
    return f"{precision}/{arm}"


def _scored(
    measured: Sequence[PrecisionResult], rows: Sequence[DatasetRow], schema: AnswerSchema, recipe: dict[str, object]
) -> ScoredArms:
    keys = [GoldAnswer.from_row(row) for row in rows]
    values = {label(one.precision, arm.arm): _values(arm.answers, keys, schema) for one in measured for arm in one.arms}
    return ScoredArms(values, recipe)


def _values(answers: Sequence[AnswerText], keys: Sequence[GoldAnswer], schema: AnswerSchema) -> dict[str, Floats]:
    pairs = zip(answers, keys, strict=True)
    found = [_WRONG if said.error is not None else score(said.text, key, schema) for said, key in pairs]
    return {m.name: np.array([getattr(one, m.name) for one in found], dtype=np.float64) for m in metrics.SCORES}


def _differences(spec: QuantizeSpec, scored: ScoredArms, rules: Rules) -> tuple[Difference, ...]:
    others = [precision for precision in spec.precisions if precision != spec.reference]
    sides = [(label(one, arm.name), label(spec.reference, arm.name)) for one in others for arm in spec.arms]
    families = (family(scored, [(a, b, metric.name) for a, b in sides], rules) for metric in metrics.SCORES)
    return tuple(difference for one in families for difference in one)


def _rule(spec: QuantizeSpec) -> Rule:
    return Rule(spec.reference, spec.metric, spec.margin, spec.min_speed, spec.speed.batches[-1])


def _candidates(
    spec: QuantizeSpec, measured: Sequence[PrecisionResult], differences: Sequence[Difference]
) -> list[Candidate]:
    by_label = {difference.a: difference for difference in differences if difference.metric == spec.metric}
    batch = spec.speed.batches[-1]
    return [
        Candidate(
            one.precision, one.resident_bytes,
            {arm.arm: statistics.median(arm.tokens_per_s[batch]) for arm in one.arms},
            {arm.arm: by_label[label(one.precision, arm.arm)] for arm in one.arms}
            if one.precision != spec.reference else {},
        )
        for one in measured
    ]  # fmt: skip


def _row(one: PrecisionResult, finding: PrecisionVerdict, scored: ScoredArms, rules: Rules) -> PrecisionRow:
    facts = {key: getattr(one, key) for key in PrecisionFacts.model_fields}
    arms = tuple(_arm(one, arm, scored, rules) for arm in one.arms)
    return PrecisionRow(**facts, good_enough=finding.good_enough, why=finding.why, arms=arms)


def _arm(one: PrecisionResult, arm: MeasuredArm, scored: ScoredArms, rules: Rules) -> PrecisionArm:
    name = label(one.precision, arm.arm)
    return PrecisionArm(
        arm=arm.arm, adapter_version=arm.adapter_version, perplexity=math.exp(arm.nats),
        scores={metric.name: found for metric in metrics.SCORES if (found := arm_score(name, metric, scored, rules))},
        cut=sum(said.cut for said in arm.answers), failed=sum(said.error is not None for said in arm.answers),
        tokens_per_s={rows: _rounds(values) for rows, values in arm.tokens_per_s.items()}, merge_loss=arm.merge_loss,
    )  # fmt: skip


def _rounds(values: Sequence[float]) -> Distribution:
    found = distribution(values, "tokens/s")
    assert found is not None, "at least one round is timed"
    return found


def _notes(spec: QuantizeSpec, measured: Sequence[PrecisionResult], scored: ScoredArms) -> list[str]:
    """What a reader must know before believing the numbers."""
    notes = [f"{one.precision}: {one.caveat}." for one in measured if one.caveat]
    if len(machines := {one.machine for one in measured}) > 1:
        notes.append(f"Measured on different machines, so that speeds do not compare: {'; '.join(sorted(machines))}.")
    for arm in spec.arms:
        mean = scored.mean(label(spec.reference, arm.name), spec.metric)
        if mean <= spec.margin:
            notes.append(f"{arm.name} has {spec.metric}={mean:.2f} at {spec.reference}: it has nothing to lose, "
                         "so it says nothing about a precision.")  # fmt: skip
    losses = [loss for one in measured for arm in one.arms if (loss := arm.merge_loss) is not None]
    if losses:
        notes.append(f"Adapters stay beside the base: merged into nf4 and quantised again, the delta would be off by "
                     f"{100 * max(losses):.0f}% of its norm.")  # fmt: skip
    notes += [f"{one.precision}, {arm.arm}: {failed} of {len(arm.answers)} requests failed; they count as wrong."
              for one in measured for arm in one.arms
              if (failed := sum(said.error is not None for said in arm.answers))]  # fmt: skip
    return notes
