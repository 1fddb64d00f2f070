"""Which precision to serve: the smallest that keeps the score and the speed, or the reference where none is shown to.

A precision is good enough where, for every arm,
  1. the paired interval of its score minus the reference's has its lower end above -margin (one side of TOST, at
     alpha / 2 because the interval is two-sided): a loss of the margin or more is ruled out, and
  2. it decodes at `min_speed` times the reference's tokens per second or more, at the spec's last batch.
Of those that are good enough, the reference among them, the one with the fewest resident bytes is recommended; where
two take the same, the reference, else the faster. Few questions give wide intervals: then nothing is ruled out, and the
reference stays.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graftwork.report.records import Difference


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
    """What is good enough."""

    reference: str
    metric: str
    margin: float
    min_speed: float
    batch: int


@dataclass(frozen=True)
class PrecisionVerdict:
    """What the rule says of one precision."""

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
        f"({share:.2f}x {rule.reference}'s), {_kept(best, rule)}, and decodes at {_ratio(best, reference):.2f}x "
        f"its speed at batch {rule.batch}."
    )


def _kept(best: Candidate, rule: Rule) -> str:
    arm, d = min(best.differences.items(), key=lambda item: item[1].low)
    return (
        f"rules out a loss of {rule.margin:g} in {rule.metric} (worst arm {arm}: {d.value:+.3f} "
        f"[{d.low:+.3f}, {d.high:+.3f}], n={d.n})"
    )
