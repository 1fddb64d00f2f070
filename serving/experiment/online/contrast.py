"""One arm against the control while the log grows: the sequence that fits the metric, its verdict, its history."""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from graftwork.serving.experiment.online.monitor_state import ContrastState
from graftwork.serving.experiment.online.rules import OnlineRules
from graftwork.stats import Floats, Verdict
from graftwork.stats.aipw import PairScores, SplitScores, UnboundedSplitScores
from graftwork.stats.confidence import AsymptoticSequence, BettingSequence, SequentialEvidence, units_to_show
from graftwork.stats.running import BLOCK

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
        """Where it stands, in the metric's unit."""
        seen, scale = self._sequence.evidence, self._scale
        verdict: Verdict = "undecided" if blocked else self._verdict(seen)
        needed = self._needed(seen) if verdict == "undecided" and not blocked else None
        return ContrastState(
            arm=self.arm, control=self.rules.control, n=seen.n, low=seen.low * scale, high=seen.high * scale,
            estimate=None if seen.estimate is None else seen.estimate * scale, level=1 - self.rules.contrast_alpha,
            e_value=seen.e_value, verdict=verdict, n_needed=needed,
        )  # fmt: skip

    def scaled(self, seen: SequentialEvidence) -> tuple[int, float, float, float]:
        """(n, estimate, low, high) in the metric's unit."""
        return seen.n, (seen.estimate or 0.0) * self._scale, seen.low * self._scale, seen.high * self._scale

    def _verdict(self, seen: SequentialEvidence) -> Verdict:
        if -self._margin <= seen.low and seen.high <= self._margin:
            return "equivalent"
        if seen.e_value < 1 / self.rules.contrast_alpha:
            return "undecided"
        return "better" if (seen.low >= 0) == (self.rules.better == "higher") else "worse"

    def _needed(self, seen: SequentialEvidence) -> int | None:
        """Units after which the interval would lie beside 0, or within the margin, were the estimate the truth."""
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
