"""Monitor of an experiment: estimates, sequences and verdicts, updated row by row without clock, files or network.

Rows become independent observations (`units`), these feed one confidence sequence a challenger (`contrast`), the
sample-ratio test that blocks every conclusion, and the guardrails that name arms to cut. All of it holds at every look.
A million rows at once leave the very bits that a million single rows leave.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graftwork.report.evaluation_schema import ContrastState
from graftwork.serving.ab_test.attribution import Attribution, NewObservations, shares
from graftwork.serving.ab_test.guardrails import GuardrailState, GuardrailTest, facts_of
from graftwork.serving.ab_test.log_reader import LogColumns, numbers_of
from graftwork.serving.ab_test.spec import GuardrailSpec, OnlineRules
from graftwork.stats import Floats, Verdict
from graftwork.stats.sequential import (
    BLOCK,
    AsymptoticSequence,
    BettingSequence,
    PairScores,
    SampleRatio,
    SequentialEvidence,
    SplitScores,
    UnboundedSplitScores,
    sums,
    units_to_show,
)

# State so far: one `MonitorState`, frozen, equal for equal logs.


@dataclass(frozen=True)
class ArmState:
    """One arm. A unit is of the arm of its first assignment."""

    arm: str
    units: int
    """Units assigned to it."""
    counted: int
    """Units whose outcome is fixed, and that of all units assigned before them."""
    scored: int
    """Counted units with a score of their own (a failed answer has the worst); the others count with the middle."""
    mean: float | None
    """Plain mean of the primary metric over counted units."""
    answers: int
    errors: int
    """Failed answers; each counts with the lowest score."""


@dataclass(frozen=True)
class MonitorState:
    """Everything that may be said at this point of the log."""

    arms: tuple[ArmState, ...]
    contrasts: tuple[ContrastState, ...]
    guardrails: tuple[GuardrailState, ...]
    srm_e_value: float
    """Evidence that units, or those of them that got a score, do not fall to arms as planned; 1 / srm_alpha blocks."""
    blocked: str | None
    """Why no conclusion may be drawn; None when one may."""
    cut: tuple[str, ...]
    """Arms to be taken out: a guardrail of theirs broke."""
    waiting: int
    """Units (pairs, in a shadow) that are assigned and not counted yet: an outcome is open."""
    left_out: dict[str, int]
    """Rows that count for nothing, by reason."""


# One arm against the control: the confidence sequence for the metric, its verdict, its history.


_HISTORY_FROM, _HISTORY_STEP = 10, 1.04


class ArmContrast:
    """Arm minus control. What is kept for the plot: the evidence at about 4 % steps of n."""

    def __init__(self, rules: OnlineRules, arm: str) -> None:
        self.rules, self.arm = rules, arm
        self._scale = rules.high - rules.low if rules.kind == "bounded" else 1.0
        self._margin = rules.margin / self._scale
        self._split, self._unbounded, self._pair = SplitScores(), UnboundedSplitScores(), PairScores()
        alpha = rules.contrast_alpha
        self._sequence: BettingSequence | AsymptoticSequence = (
            BettingSequence(alpha, (self._margin,)) if rules.kind == "bounded" else AsymptoticSequence(alpha)
        )
        self.history: list[SequentialEvidence] = []
        self._next = _HISTORY_FROM

    def split(self, treated: NDArray[np.bool_], outcomes: Floats, chance: Floats) -> None:
        """Units of this arm (treated) and of the control, with the arm's chance among the two."""
        for part in self._blocks(len(outcomes)):
            if isinstance(self._sequence, BettingSequence):
                scored = self._split.update(treated[part], outcomes[part], chance[part])
                self._sequence.update(scored.values, scored.low, scored.high, scored.spread)
            else:
                self._update(self._unbounded.update(treated[part], outcomes[part], chance[part]))
            self._note()

    def pairs(self, scores: Floats, control: Floats) -> None:
        """Both arms' scores on the same prompts."""
        differences = scores - control
        for part in self._blocks(len(differences)):
            if isinstance(self._sequence, BettingSequence):
                scored = self._pair.update(differences[part])
                self._sequence.update(scored.values, scored.low, scored.high, scored.spread)
            else:
                self._update(differences[part])
            self._note()

    def state(self, blocked: bool) -> ContrastState:
        """Return the contrast so far, in the metric's unit."""
        seen, scale = self._sequence.evidence, self._scale
        verdict: Verdict = "undecided" if blocked else self._verdict(seen)
        needed = self._units_needed(seen) if verdict == "undecided" and not blocked else None
        return ContrastState(
            arm=self.arm,
            control=self.rules.control,
            n=seen.n,
            low=seen.low * scale,
            high=seen.high * scale,
            estimate=None if seen.estimate is None else seen.estimate * scale,
            level=1 - self.rules.contrast_alpha,
            e_value=seen.e_value,
            verdict=verdict,
            n_needed=needed,
        )

    def scaled(self, seen: SequentialEvidence) -> tuple[int, float, float, float]:
        """(n, estimate, low, high) in the metric's unit."""
        return seen.n, (seen.estimate or 0.0) * self._scale, seen.low * self._scale, seen.high * self._scale

    def _verdict(self, seen: SequentialEvidence) -> Verdict:
        if -self._margin <= seen.low and seen.high <= self._margin:
            return "equivalent"
        if seen.e_value < 1 / self.rules.contrast_alpha:
            return "undecided"
        return "better" if (seen.low >= 0) == (self.rules.better == "higher") else "worse"

    def _units_needed(self, seen: SequentialEvidence) -> int | None:
        """Units after which the interval would exclude 0, or within the margin, were the estimate the truth."""
        if seen.estimate is None or seen.variance is None:
            return None
        gaps = [abs(seen.estimate), self._margin - abs(seen.estimate)]
        return max(
            seen.n + 1, min(units_to_show(gap, seen.variance, self.rules.contrast_alpha) for gap in gaps if gap > 0)
        )

    def _blocks(self, count: int) -> Iterator[slice]:
        """Cut so that the history has the same points however the log was cut."""
        start = 0
        while start < count:
            stop = min(count, start + BLOCK, start + max(1, self._next - self._sequence.evidence.n))
            yield slice(start, stop)
            start = stop

    def _update(self, values: Floats) -> None:
        if len(values) and isinstance(self._sequence, AsymptoticSequence):
            self._sequence.update(values)

    def _note(self) -> None:
        seen = self._sequence.evidence
        if seen.n >= self._next:
            self.history.append(seen)
            self._next = math.ceil(seen.n * _HISTORY_STEP)


_COUNTS = ("units", "counted", "scored", "total", "answers", "errors")
_PAIRED = ("units", "counted", "scored")


class Monitor:
    """One experiment. `add` is O(1) and O(number of arms); so is the memory but for a number a unit (see `units`)."""

    def __init__(self, rules: OnlineRules) -> None:
        self.rules, self.numbers = rules, numbers_of(rules)
        self._units = Attribution(rules)
        self._drawn, self._scored = (_Ratio(np.array(self._units.plans[0])) for _ in range(2))
        self.contrasts = tuple(ArmContrast(rules, arm) for arm in rules.challengers)
        self._watches = [
            [GuardrailTest(rule, arm) for rule in rules.guardrails if not rule.arms or arm in rule.arms]
            for arm in rules.arms
        ]
        self._counts = {name: np.zeros(len(rules.arms)) for name in _COUNTS}

    def ingest(self, rows: LogColumns) -> None:
        """Take the next rows of the log, with `numbers` among their columns."""
        entered = self._units.attribute(rows)
        self._ingest(entered)
        facts = facts_of(entered.guard_rows, self.numbers)
        arms = np.array(entered.guard_arm, dtype=np.intp)
        self._count("answers", arms, np.ones(len(arms)))
        self._count("errors", arms, facts["failed"])
        for number, watches in enumerate(self._watches):
            mine = {name: values[arms == number] for name, values in facts.items()} if watches else {}
            for watch in watches:
                watch.update(mine)

    @property
    def weights(self) -> dict[str, float]:
        """The plan that holds now, by arm; none in a shadow."""
        plan = self._units.plan
        return dict(zip(self.rules.arms, plan, strict=True)) if self.rules.mode == "split" else {}

    @property
    def watched(self) -> tuple[GuardrailSpec, ...]:
        """The rule of each of the state's guardrails."""
        return tuple(watch.rule for watches in self._watches for watch in watches)

    def state(self) -> MonitorState:
        """Return the state after the rows so far."""
        blocked = self._block_reason()
        return MonitorState(
            arms=tuple(self._arm(number) for number in range(len(self.rules.arms))),
            contrasts=tuple(contrast.state(blocked is not None) for contrast in self.contrasts),
            guardrails=tuple(watch.state() for watches in self._watches for watch in watches),
            srm_e_value=max(self._drawn.most, self._scored.most),
            blocked=blocked,
            cut=self._arms_to_cut(),
            waiting=self._units.waiting,
            left_out=dict(sorted(self._units.left_out.items())),
        )

    def _ingest(self, entered: NewObservations) -> None:
        self._count("units", np.array(entered.ratio_arm, dtype=np.intp), np.ones(len(entered.ratio_arm)))
        self._drawn.ingest(entered.ratio_arm, entered.ratio_plan, self._units.plans)
        if entered.arm:
            self._ingest_split(entered)
        if entered.pair_arm:
            self._ingest_pairs(entered)

    def _ingest_split(self, entered: NewObservations) -> None:
        arms, plans, scores = np.array(entered.arm), np.array(entered.plan), np.array(entered.score)
        scored = np.array(entered.scored)
        self._count("counted", arms, np.ones(len(arms)))
        self._count("scored", arms, scored.astype(np.float64))
        self._count("total", arms, scores)
        self._scored.ingest(arms[scored].tolist(), plans[scored].tolist(), self._units.plans)
        control = self.rules.arms.index(self.rules.control)
        for contrast in self.contrasts:
            number = self.rules.arms.index(contrast.arm)
            chances = np.full(len(self._units.plans), np.nan)
            for plan, chance in shares(self._units.plans, number, control).items():
                chances[plan] = chance
            here = ((arms == number) | (arms == control)) & ~np.isnan(chances[plans])
            contrast.split(arms[here] == number, scores[here], chances[plans[here]])

    def _ingest_pairs(self, entered: NewObservations) -> None:
        arms, scores, control = (
            np.array(part) for part in (entered.pair_arm, entered.pair_score, entered.pair_control)
        )
        for contrast in self.contrasts:
            here = arms == self.rules.arms.index(contrast.arm)
            contrast.pairs(scores[here], control[here])
        for name, values in (*((name, np.ones(len(arms))) for name in _PAIRED), ("total", scores)):
            self._count(name, arms, values)
        first = arms == self.rules.arms.index(self.contrasts[0].arm)
        base = np.full(int(np.sum(first)), self.rules.arms.index(self.rules.control))
        for name, values in (*((name, np.ones(len(base))) for name in _PAIRED), ("total", control[first])):
            self._count(name, base, values)

    def _count(self, name: str, arms: np.ndarray[tuple[int], np.dtype[np.intp]], values: Floats) -> None:
        if len(arms):
            places = arms[:, None] == np.arange(len(self.rules.arms))
            self._counts[name] = sums(self._counts[name], np.where(places, values[:, None], 0.0))[1][-1]

    def _arm(self, number: int) -> ArmState:
        counts = {name: float(values[number]) for name, values in self._counts.items()}
        counted, rules = counts["counted"], self.rules
        mean = counts["total"] / counted if counted else None
        if mean is not None and rules.kind == "bounded":
            mean = rules.low + mean * (rules.high - rules.low)
        whole = {name: int(counts[name]) for name in _COUNTS if name != "total"}
        return ArmState(arm=rules.arms[number], mean=mean, **whole)

    def _block_reason(self) -> str | None:
        bound = 1 / self.rules.srm_alpha
        for ratio, what in ((self._drawn, "units"), (self._scored, "units with a score")):
            if ratio.most >= bound:
                size = f"{ratio.most:.3g}" if math.isfinite(ratio.most) else "beyond all bounds"
                return (
                    f"{what} do not fall to the arms as planned (e-value {size}, bound {bound:g}): "
                    "find out why before any difference is believed"
                )
        return None

    def _arms_to_cut(self) -> tuple[str, ...]:
        broken = {watch.arm for watches in self._watches for watch in watches if watch.broken}
        return tuple(arm for arm in self.rules.challengers if arm in broken)


class _Ratio:
    """A sample-ratio test of units as they enter."""

    def __init__(self, planned: Floats) -> None:
        self._test, self.most = SampleRatio(planned), 1.0

    def ingest(self, arms: list[int], plans: list[int], known: list[tuple[float, ...]]) -> None:
        """`plans` are numbers of `known` ones."""
        numbers, planned = np.array(arms, dtype=np.intp), np.array(known)[np.array(plans, dtype=np.intp)]
        for start in range(0, len(numbers), BLOCK):
            capital = self._test.update(numbers[start : start + BLOCK], planned[start : start + BLOCK])
            self.most = max(self.most, float(np.max(capital)))
