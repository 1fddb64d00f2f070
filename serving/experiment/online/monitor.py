"""What an experiment's log says, kept up to date row by row. Pure: no clock, no files, no network.

Rows become independent observations (`units`), these feed one confidence sequence a challenger (`contrast`), the
sample-ratio test that blocks every conclusion, and the guardrails that name arms to cut. All of it holds at every look.
A million rows at once leave the very bits that a million single rows leave.
"""

import math

import numpy as np

from graftwork.serving.experiment.online.contrast import ArmContrast
from graftwork.serving.experiment.online.guardrails import GuardrailTest, facts_of
from graftwork.serving.experiment.online.log_columns import LogColumns, columns_of_rows, numbers_of
from graftwork.serving.experiment.online.log_row import LogRow
from graftwork.serving.experiment.online.monitor_state import ArmState, MonitorState
from graftwork.serving.experiment.online.rules import Guardrail, OnlineRules
from graftwork.serving.experiment.online.units import Attribution, NewObservations, shares
from graftwork.stats import Floats
from graftwork.stats.running import BLOCK, sums
from graftwork.stats.sample_ratio import SampleRatio

_COUNTS = ("units", "counted", "scored", "total", "answers", "errors")
_PAIRED = ("units", "counted", "scored")


class Monitor:
    """One experiment. `add` is O(1) and O(number of arms); so is the memory but for a number a unit (see `units`)."""

    def __init__(self, rules: OnlineRules) -> None:
        self.rules, self.numbers = rules, numbers_of(rules)
        self._units = Attribution(rules)
        self._drawn, self._scored = (_Ratio(np.array(self._units.plans[0])) for _ in range(2))
        self.contrasts = tuple(ArmContrast(rules, arm) for arm in rules.challengers)
        self._watches = [[GuardrailTest(rule, arm) for rule in rules.guardrails if not rule.arms or arm in rule.arms]
                         for arm in rules.arms]  # fmt: skip
        self._counts = {name: np.zeros(len(rules.arms)) for name in _COUNTS}

    def ingest_row(self, row: LogRow) -> None:
        """Take one row."""
        self.ingest(columns_of_rows([row], self.numbers))

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
    def watched(self) -> tuple[Guardrail, ...]:
        """The rule of each of the state's guardrails."""
        return tuple(watch.rule for watches in self._watches for watch in watches)

    def state(self) -> MonitorState:
        """What may be said now."""
        blocked = self._blocked()
        return MonitorState(
            arms=tuple(self._arm(number) for number in range(len(self.rules.arms))),
            contrasts=tuple(contrast.state(blocked is not None) for contrast in self.contrasts),
            guardrails=tuple(watch.state() for watches in self._watches for watch in watches),
            srm_e_value=max(self._drawn.most, self._scored.most), blocked=blocked, cut=self._cut(),
            waiting=self._units.waiting, left_out=dict(sorted(self._units.left_out.items())),
        )  # fmt: skip

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

    def _blocked(self) -> str | None:
        bound = 1 / self.rules.srm_alpha
        for ratio, what in ((self._drawn, "units"), (self._scored, "units with a score")):
            if ratio.most >= bound:
                size = f"{ratio.most:.3g}" if math.isfinite(ratio.most) else "beyond all bounds"
                return (f"{what} do not fall to the arms as planned (e-value {size}, bound {bound:g}): "
                        "find out why before any difference is believed")  # fmt: skip
        return None

    def _cut(self) -> tuple[str, ...]:
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
