"""Builder of the `QuantizeReport`: scores, paired differences to the reference, and the recommended precision.

Scores, intervals and tests are those of a comparison (`serving.experiment`): an arm at a precision is an arm there.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graftwork import metrics
from graftwork.datasets.rows import DatasetRow, fingerprint
from graftwork.metrics import Distribution, distribution
from graftwork.report.evaluation_schema import PrecisionArm, PrecisionFacts, PrecisionRow, QuantizeReport
from graftwork.report.schema import Difference
from graftwork.scoring import AnswerSchema, FieldScores, GoldAnswer, score
from graftwork.serving.evaluation.differences import Rules, ScoredArms, arm_score, family
from graftwork.serving.quantize.measure import AnswerText, MeasuredArm, PrecisionResult
from graftwork.serving.quantize.spec import QuantizeSpec
from graftwork.stats import Floats

# Recommendation: the smallest precision shown to keep score and speed, else the reference.
#
# A precision is good enough where, for every arm, 1. the paired interval of its score minus the reference's has its
# lower end above -margin (one side of TOST, at alpha / 2 because the interval is two-sided): a loss of the margin or
# more is ruled out, and 2. it decodes at `min_speed` times the reference's tokens per second or more, at the spec's
# last batch. Of those that are good enough, the reference among them, the one with the fewest resident bytes is
# recommended; where two take the same, the reference, else the faster. Few questions give wide intervals: then nothing
# is ruled out, and the reference stays.


@dataclass(frozen=True)
class Candidate:
    """One precision as the rule sees it."""

    precision: str
    resident_bytes: int
    tokens_per_s: Mapping[str, float]
    """Median at the last batch, by arm."""
    differences: Mapping[str, Difference]
    """Of the spec's metric against the reference, by arm; empty for the reference."""


@dataclass(frozen=True)
class Rule:
    """Acceptable losses of score and speed."""

    reference: str
    metric: str
    margin: float
    min_speed: float
    batch: int


@dataclass(frozen=True)
class PrecisionVerdict:
    """Result of the rule for one precision."""

    precision: str
    good_enough: bool
    why: str


@dataclass(frozen=True)
class Recommendation:
    """The precision to serve, the reason in a sentence, and the finding on each candidate in order."""

    precision: str
    sentence: str
    findings: tuple[PrecisionVerdict, ...]


def recommend(candidates: Sequence[Candidate], rule: Rule) -> Recommendation:
    """Apply the rule. `candidates` hold the reference."""
    by_name = {one.precision: one for one in candidates}
    reference = by_name[rule.reference]
    findings = tuple(_judge(one, reference, rule) for one in candidates)
    good = [by_name[finding.precision] for finding in findings if finding.good_enough]
    best = min(good, key=lambda one: (one.resident_bytes, one is not reference, -min(one.tokens_per_s.values())))
    return Recommendation(best.precision, _sentence(best, reference, findings, len(good), rule), findings)


def _judge(one: Candidate, reference: Candidate, rule: Rule) -> PrecisionVerdict:
    if one is reference:
        return PrecisionVerdict(one.precision, True, "the reference")
    problems = [*_lost(one, rule), *_slow(one, reference, rule)]
    kept = f"{rule.metric} within {rule.margin:g} of {rule.reference}, {_ratio(one, reference):.2f}x its speed"
    return PrecisionVerdict(one.precision, not problems, "; ".join(problems) or kept)


def _lost(one: Candidate, rule: Rule) -> list[str]:
    """The arm that fares worst, and how many more fail."""
    failing = {arm: d for arm, d in one.differences.items() if d.low <= -rule.margin}
    if not failing:
        return []
    arm, d = min(failing.items(), key=lambda item: item[1].low)
    decide = f"n={d.n}; {d.n_needed} questions would decide" if d.n_needed else f"n={d.n}"
    more = f", and {len(failing) - 1} more arms" if len(failing) > 1 else ""
    seen = f"{arm}{more}: {rule.metric} {d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"
    return [f"{seen} does not rule out a loss of {rule.margin:g} ({decide})"]


def _slow(one: Candidate, reference: Candidate, rule: Rule) -> list[str]:
    ratio = _ratio(one, reference)
    if ratio >= rule.min_speed:
        return []
    return [f"{ratio:.2f}x the speed of {rule.reference} at batch {rule.batch}, {rule.min_speed:g}x is needed"]


def _ratio(one: Candidate, reference: Candidate) -> float:
    """Speed against the reference on the arm where it is worst."""
    return min(one.tokens_per_s[arm] / reference.tokens_per_s[arm] for arm in one.tokens_per_s)


def _sentence(
    best: Candidate, reference: Candidate, findings: Sequence[PrecisionVerdict], good: int, rule: Rule
) -> str:
    if best is reference:
        others = [f"{finding.precision}: {finding.why}" for finding in findings if not finding.good_enough]
        reason = ". ".join(others) if others else "no other precision takes fewer bytes in memory"
        return f"Serve {best.precision}. {reason}."
    share = best.resident_bytes / reference.resident_bytes
    return (
        f"Serve {best.precision}: of {good} good enough, {rule.reference} included, it takes the fewest bytes "
        f"({share:.2f}x {rule.reference}'s), {_margins(best, rule)}, and decodes at {_ratio(best, reference):.2f}x "
        f"its speed at batch {rule.batch}."
    )


def _margins(best: Candidate, rule: Rule) -> str:
    arm, d = min(best.differences.items(), key=lambda item: item[1].low)
    return (
        f"rules out a loss of {rule.margin:g} in {rule.metric} (worst arm {arm}: {d.value:+.3f} "
        f"[{d.low:+.3f}, {d.high:+.3f}], n={d.n})"
    )


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
        name=spec.name,
        base_digest=digest,
        reference=spec.reference,
        metric=spec.metric,
        margin=spec.margin,
        min_speed=spec.min_speed,
        alpha=spec.alpha,
        seed=spec.seed,
        n=len(rows),
        data_fingerprint=fingerprint(rows),
        text=text,
        precisions=tuple(_row(one, said[one.precision], scored, rules) for one in measured),
        differences=differences,
        recommended=found.precision,
        sentence=found.sentence,
        notes=tuple(_notes(spec, measured, scored)),
    )


def label(precision: str, arm: str) -> str:
    """Return the name of an arm at a precision in differences and signatures."""
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
            one.precision,
            one.resident_bytes,
            {arm.arm: statistics.median(arm.tokens_per_s[batch]) for arm in one.arms},
            {arm.arm: by_label[label(one.precision, arm.arm)] for arm in one.arms}
            if one.precision != spec.reference
            else {},
        )
        for one in measured
    ]


def _row(one: PrecisionResult, finding: PrecisionVerdict, scored: ScoredArms, rules: Rules) -> PrecisionRow:
    facts = {key: getattr(one, key) for key in PrecisionFacts.model_fields}
    arms = tuple(_arm(one, arm, scored, rules) for arm in one.arms)
    return PrecisionRow(**facts, good_enough=finding.good_enough, why=finding.why, arms=arms)


def _arm(one: PrecisionResult, arm: MeasuredArm, scored: ScoredArms, rules: Rules) -> PrecisionArm:
    name = label(one.precision, arm.arm)
    return PrecisionArm(
        arm=arm.arm,
        adapter_version=arm.adapter_version,
        perplexity=math.exp(arm.nats),
        scores={metric.name: found for metric in metrics.SCORES if (found := arm_score(name, metric, scored, rules))},
        cut=sum(said.cut for said in arm.answers),
        failed=sum(said.error is not None for said in arm.answers),
        tokens_per_s={rows: _rounds(values) for rows, values in arm.tokens_per_s.items()},
        merge_loss=arm.merge_loss,
    )


def _rounds(values: Sequence[float]) -> Distribution:
    found = distribution(values, "tokens/s")
    assert found is not None, "at least one round is timed"
    return found


def _notes(spec: QuantizeSpec, measured: Sequence[PrecisionResult], scored: ScoredArms) -> list[str]:
    """Return the caveats of the numbers."""
    notes = [f"{one.precision}: {one.caveat}." for one in measured if one.caveat]
    if len(machines := {one.machine for one in measured}) > 1:
        notes.append(f"Measured on different machines, so that speeds do not compare: {'; '.join(sorted(machines))}.")
    for arm in spec.arms:
        mean = scored.mean(label(spec.reference, arm.name), spec.metric)
        if mean <= spec.margin:
            notes.append(
                f"{arm.name} has {spec.metric}={mean:.2f} at {spec.reference}: it has nothing to lose, "
                "so it says nothing about a precision."
            )
    losses = [loss for one in measured for arm in one.arms if (loss := arm.merge_loss) is not None]
    if losses:
        notes.append(
            f"Adapters stay separate from the base: merged into nf4 and quantised again, the delta would be off by "
            f"{100 * max(losses):.0f}% of its norm."
        )
    notes += [
        f"{one.precision}, {arm.arm}: {failed} of {len(arm.answers)} requests failed; they count as wrong."
        for one in measured
        for arm in one.arms
        if (failed := sum(said.error is not None for said in arm.answers))
    ]
    return notes
