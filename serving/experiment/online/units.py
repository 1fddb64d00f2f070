"""From rows to independent observations: who counts, once, under which plan.

Rows of one unit depend on each other, and only its draw was random: so a unit enters the comparison and the
sample-ratio test once. With `window_s=0` that is its first scored answer, at once. With a window it is the mean of its
scored answers in that time from its first one, when the time has passed by the log's clock. In a shadow it is the first
prompt that both arms answered. A row that stands twice changes nothing: its unit is known, or its request is, while the
unit is open.

Why that keeps the tests valid, whatever a unit's own answers have in common: take units in the order in which they
enter. Given all that entered before, the next one's arm was drawn with its logged chance and its score is a function of
that arm and of itself alone, so that each score of `aipw` has the effect as its mean. With a window the order is that
of first answers. Without one, answers enter when they are written, so a quicker arm enters sooner: where the arms do
not differ that has no effect, so the false-alarm rate stands; else it moves the estimate by at most the share of units
still in flight. Units are taken not to act on each other.

Memory: one number a unit, up to `max_units`; then all units of an odd hash are forgotten and left out from there on,
later those of every second pair, and so on. Who is left out depends on the hash alone, so nothing is biased by it.
"""

import math
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b

from graftwork.serving.experiment.online.log_columns import LogColumns
from graftwork.serving.experiment.online.rules import OnlineRules, weights_of

GUARD_EVERY_S = 600.0
"""A unit enters an arm's guardrails once in this time: retries of one failing prompt are one observation."""
_RECENT = 1 << 16
"""Units remembered for that, and units within their window, and prompts that wait for another arm's answer."""
_SEEN, _SCORED = 1, 2
_PRIME = (1 << 61) - 1


@dataclass
class Entered:
    """Observations of some rows, in order. Arms and plans are numbers: of `rules.arms`, of `Units.plans`."""

    ratio_arm: list[int] = field(default_factory=list)
    ratio_plan: list[int] = field(default_factory=list)
    arm: list[int] = field(default_factory=list)
    plan: list[int] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    pair_arm: list[int] = field(default_factory=list)
    pair_score: list[float] = field(default_factory=list)
    pair_control: list[float] = field(default_factory=list)
    guard_row: list[int] = field(default_factory=list)
    """Rows that enter the guardrails."""
    guard_arm: list[int] = field(default_factory=list)


@dataclass
class _Open:
    """A unit within its window."""

    first_at: float
    arm: int
    plan: int
    requests: set[str] = field(default_factory=set)
    total: float = 0.0


class Units:
    """Reads rows in the order of the log. O(1) a row."""

    def __init__(self, rules: OnlineRules) -> None:
        self._rules, self._number = rules, {arm: k for k, arm in enumerate(rules.arms)}
        self._control = self._number[rules.control]
        self.plan = tuple(rules.weights.get(arm, 0.0) for arm in rules.arms)
        self.plans = [self.plan]
        self.left_out: dict[str, int] = {}
        self._known_plans: dict[tuple[int, float], int | None] = {}
        self._units: dict[int, int] = {}
        self._thinned = 0
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._pairs: OrderedDict[str, dict[int, float]] = OrderedDict()
        self._guarded: list[tuple[dict[int, float], dict[int, float]]] = [({}, {}) for _ in rules.arms]
        self._now = -math.inf

    def read(self, rows: LogColumns) -> Entered:
        """The observations that these rows complete."""
        entered, values = Entered(), rows.numbers[self._rules.metric].tolist()
        for row, kind in enumerate(rows.kind):
            if kind == "event":
                self._event(rows.event[row], rows.detail[row])
                continue
            arm = self._number.get(rows.arm[row])
            role = rows.role[row]
            if arm is None or role in ("override", "holdout"):
                self._skip("not of an arm" if arm is None else role)
                continue
            key = _key(rows.unit[row])
            if self._thinned and _spread(key) & self._thinned:
                self._skip("beyond max_units")
                continue
            if kind == "answer":
                self._guard(entered, row, arm, key, rows.at[row])
            value = self._value(values[row], kind == "answer" and rows.failed[row])
            if self._rules.mode == "shadow":
                self._pair(entered, arm, key, rows.request_id[row], value)
            elif role == "primary":
                self._drawn(entered, rows, row, arm, key, value)
            else:
                self._skip("of a shadow, in a split")
        return entered

    def close(self) -> Entered:
        """Units whose window is still open enter as they are: for the end of a log."""
        entered = Entered()
        while self._open:
            self._enter(entered, next(iter(self._open)))
        return entered

    def _event(self, event: str | None, detail: str | None) -> None:
        weights = weights_of(detail, self._rules.arms) if self._rules.mode == "split" else None
        if weights is not None:
            plan = tuple(weights[arm] for arm in self._rules.arms)
            if plan != self.plan:
                self.plan = plan
                self.plans.append(plan)
                self._known_plans.clear()

    def _value(self, value: float, failed: bool) -> float:
        """The score within 0..1 where it is bounded; a failed answer has the worst. NaN where there is none."""
        rules = self._rules
        if rules.kind != "bounded":
            return math.log(value) if rules.kind == "log" and value > 0 else value if rules.kind != "log" else math.nan
        if failed:
            return 0.0 if rules.better == "higher" else 1.0
        if value < rules.low or value > rules.high:
            self._skip("score out of its range")
            return math.nan
        return (value - rules.low) / (rules.high - rules.low)

    def _drawn(self, entered: Entered, rows: LogColumns, row: int, arm: int, key: int, value: float) -> None:
        plan = self._plan(arm, rows.probability[row])
        if plan is None:
            self._skip("chance of the arm not as planned")
            return
        seen = self._units.get(key, 0)
        if not seen:
            self._remember(key)
            entered.ratio_arm.append(arm)
            entered.ratio_plan.append(plan)
        if self._rules.window_s > 0:
            self._gather(entered, rows, row, arm, plan, key, value, bool(seen))
        elif seen != _SCORED and value == value:
            self._units[key] = _SCORED
            entered.arm.append(arm)
            entered.plan.append(plan)
            entered.score.append(value)

    def _gather(
        self, entered: Entered, rows: LogColumns, row: int, arm: int, plan: int, key: int, value: float, seen: bool
    ) -> None:
        self._now = max(self._now, rows.at[row])
        while self._open:
            oldest = next(iter(self._open))
            if self._now < self._open[oldest].first_at + self._rules.window_s and len(self._open) <= _RECENT:
                break
            self._enter(entered, oldest)
        if not seen:
            self._open[key] = _Open(self._now, arm, plan)
        unit = self._open.get(key)
        if unit is not None and unit.arm == arm and value == value and rows.request_id[row] not in unit.requests:
            unit.requests.add(rows.request_id[row])
            unit.total += value

    def _enter(self, entered: Entered, key: int) -> None:
        unit = self._open.pop(key)
        if not unit.requests:
            self._skip("unit without a score")
            return
        entered.arm.append(unit.arm)
        entered.plan.append(unit.plan)
        entered.score.append(unit.total / len(unit.requests))

    def _pair(self, entered: Entered, arm: int, key: int, request: str, value: float) -> None:
        """A challenger's first pair of a unit; what waits longest for its other half is forgotten."""
        if value != value:
            return
        waiting = self._pairs.setdefault(request, {})
        waiting.setdefault(arm, value)
        if self._control in waiting:
            known = self._units.get(key, 0)
            if not known:
                self._remember(key)
            for other, score in waiting.items():
                if other != self._control and not known >> other & 1:
                    known |= 1 << other
                    entered.pair_arm.append(other)
                    entered.pair_score.append(score)
                    entered.pair_control.append(waiting[self._control])
            self._units[key] = known
        if len(waiting) == len(self._rules.arms):
            del self._pairs[request]
        elif len(self._pairs) > _RECENT:
            self._pairs.popitem(last=False)

    def _guard(self, entered: Entered, row: int, arm: int, key: int, at: float) -> None:
        recent, older = self._guarded[arm]
        last = recent.get(key)
        if last is None:
            last = older.get(key, -math.inf)
        if at < last + GUARD_EVERY_S:
            return
        if len(recent) >= _RECENT:
            recent, older = self._guarded[arm] = {}, recent
        recent[key] = at
        entered.guard_row.append(row)
        entered.guard_arm.append(arm)

    def _plan(self, arm: int, chance: float) -> int | None:
        """The latest plan that gives the arm this chance. Two arms need none: the other has the rest."""
        if (arm, chance) not in self._known_plans:
            fitting = [k for k, plan in enumerate(self.plans) if abs(plan[arm] - chance) < 2e-6 and chance > 0]
            if not fitting and len(self._rules.arms) == 2 and 0 < chance <= 1:
                self.plans.append((chance, 1 - chance) if arm == 0 else (1 - chance, chance))
                fitting = [len(self.plans) - 1]
            self._known_plans[arm, chance] = fitting[-1] if fitting else None
        return self._known_plans[arm, chance]

    def _remember(self, key: int) -> None:
        self._units[key] = _SEEN if self._rules.mode == "split" else 0
        if len(self._units) > self._rules.max_units:
            self._thinned = self._thinned * 2 + 1
            self._units = {one: state for one, state in self._units.items() if not _spread(one) & self._thinned}

    def _skip(self, reason: str) -> None:
        self.left_out[reason] = self.left_out.get(reason, 0) + 1


def _key(unit: str) -> int:
    """The unit's own hash, folded to 61 bits."""
    try:
        return int(unit, 16) % _PRIME
    except ValueError:
        return int.from_bytes(blake2b(unit.encode(), digest_size=8).digest(), "big")


def _spread(key: int) -> int:
    """Bits that have nothing to do with those that chose the arm."""
    return zlib.crc32(key.to_bytes(8, "big"))


def shares(plans: list[tuple[float, ...]], arm: int, control: int) -> Mapping[int, float]:
    """Chance of the arm among it and the control, by plan; plans that give one of them none are left out."""
    both = {number: (plan[arm], plan[control]) for number, plan in enumerate(plans)}
    return {number: one / (one + other) for number, (one, other) in both.items() if one > 0 and other > 0}
