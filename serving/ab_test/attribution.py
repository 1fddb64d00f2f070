"""Turn log rows into independent observations, in the order of assignment.

Rows of one unit depend on each other, and only the unit's draw was random, so a unit enters the comparison and the
sample-ratio test once, with the arm of its first assignment. With `window_s=0` its outcome is that of its first
request; with a window, the mean over the requests assigned in that time. In a shadow the observation is the unit's
first copy, paired with the control's answer to the same prompt.

Intention to treat: every drawn unit counts, whatever becomes of its answer. An outcome is fixed at the latest
`deadline_s` after the end of the unit's window, by the clock of the log. A bounded metric then has

- the worst score for an answer that failed, or that is missing at the deadline, or that was in flight when the ingress
  restarted (its `resume` event names the weights);
- the middle of low..high for a unit that was answered and not scored (feedback that never came).

An unbounded metric has no such values: the unit is left out, and the test of "units with a score" guards against arms
that differ in that.

Order: an outcome is held until all units assigned before it have theirs. Without that, a slower arm would enter later
than a quicker one, and the sample-ratio test and the confidence sequence would take the difference in latency for a
difference in shares and scores (measured: docs/log.md). With it the order depends on the draws alone. Given all that
entered before, the next unit's arm was drawn with its logged chance and its outcome is a function of that arm and of
the unit, so each score of `aipw` has the effect as its mean. Units are assumed not to act on each other. A log that is
read again gives the same order. At its end, units behind an open outcome are not counted yet (`waiting`).

Copies of a shadow that were lost with the ingress, or cancelled by a stop, are left out: nobody waited for them, so the
loss is no outcome of the arm. Copies that the queue dropped were never assigned.

Memory: one number a unit, up to `max_units`; then all units of an odd hash are forgotten and left out from there on,
later those of every second pair, and so on. Who is left out depends on the hash alone, so nothing is biased by it.
"""

import math
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b

from graftwork.serving.ab_test.guardrails import GuardQueue, GuardRow
from graftwork.serving.ab_test.log_reader import LogColumns, numbers_of
from graftwork.serving.ab_test.spec import OnlineRules, weights_of

_RECENT = 1 << 16
"""Prompts whose control score is remembered for the copies, and requests that missed their deadline."""
_MIDDLE = 0.5
"""Score of a unit without feedback, on the scale 0..1 of a bounded metric."""
_PRIME = (1 << 61) - 1
_ASKED, _ANSWERED, _DONE = 0, 1, 2
"""States of a request. Answered: only its score is missing."""


@dataclass
class NewObservations:
    """Observations of some rows, in order. Arms and plans are numbers: of `rules.arms`, of `Attribution.plans`."""

    ratio_arm: list[int] = field(default_factory=list)
    """Arms of units as they are assigned, for the sample-ratio test."""
    ratio_plan: list[int] = field(default_factory=list)
    arm: list[int] = field(default_factory=list)
    """Arms of units whose outcome is fixed."""
    plan: list[int] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    scored: list[bool] = field(default_factory=list)
    """False: no score came in time, the unit counts with the middle."""
    pair_arm: list[int] = field(default_factory=list)
    pair_score: list[float] = field(default_factory=list)
    pair_control: list[float] = field(default_factory=list)
    guard_arm: list[int] = field(default_factory=list)
    guard_rows: list[GuardRow] = field(default_factory=list)


@dataclass(slots=True)
class _Unit:
    """A unit from its draw until its outcome is fixed."""

    first_at: float
    arm: int
    plan: int
    requests: dict[str, int]
    """State by request."""
    pending: int = 1
    """Requests that are not done."""
    total: float = 0.0
    count: int = 0


@dataclass(slots=True)
class _Pair:
    """A copy from its assignment until its outcome is fixed."""

    control: float
    due: float
    value: float | None = None
    """None: no answer yet. NaN: answered, not scored."""


class Attribution:
    """Reads rows in the order of the log. O(1) a row."""

    def __init__(self, rules: OnlineRules) -> None:
        self._rules, self._number = rules, {arm: k for k, arm in enumerate(rules.arms)}
        self._control = self._number[rules.control]
        self.plan = tuple(rules.weights.get(arm, 0.0) for arm in rules.arms)
        self.plans = [self.plan]
        self.left_out: dict[str, int] = {}
        self._known_plans: dict[tuple[int, float], int | None] = {}
        self._units: dict[int, int] = {}
        """Units seen; in a shadow, the bits of the challengers that have their pair."""
        self._thinned = 0
        self._open: OrderedDict[int, _Unit] = OrderedDict()
        self._prompts: OrderedDict[str, float] = OrderedDict()
        """Control's score by request, in a shadow."""
        self._pairs: OrderedDict[tuple[str, int], _Pair] = OrderedDict()
        self._late: OrderedDict[str, None] = OrderedDict()
        """Requests without an outcome at the deadline."""
        self._guards = [GuardQueue(rules.deadline_s, len(numbers_of(rules))) for _ in rules.arms]
        self._now = -math.inf
        bounded = rules.kind == "bounded"
        self._worst = (0.0 if rules.better == "higher" else 1.0) if bounded else math.nan

    @property
    def waiting(self) -> int:
        """Units (pairs, in a shadow) that are assigned and not counted yet."""
        return len(self._open) + len(self._pairs)

    def attribute(self, rows: LogColumns) -> NewObservations:
        """Return the observations that these rows complete."""
        entered, shadow = NewObservations(), self._rules.mode == "shadow"
        numbers = [values.tolist() for values in rows.numbers.values()]
        facts, scores = list(zip(rows.failed, rows.cold, rows.empty, *numbers, strict=True)), numbers[0]
        for row, kind in enumerate(rows.kind):
            if rows.at[row] > self._now:
                self._now = rows.at[row]
            if kind == "event":
                self._event(rows.event[row], rows.detail[row])
                self._release(entered, *range(len(self._guards)))
                continue
            arm = self._number.get(rows.arm[row])
            key = self._unit_key(rows, row, kind, arm)
            if arm is None or key is None:
                continue
            request = rows.request_id[row]
            if kind == "assignment":
                self._guards[arm].assign(key, request, self._now)
            elif kind == "answer":
                self._guards[arm].answer(request, facts[row])
            if shadow:
                self._shadow(kind, arm, key, request, scores[row], rows.failed[row])
            elif kind == "assignment":
                self._assign(entered, arm, self._plan(arm, rows.probability[row]), key, request)
            else:
                self._outcome(arm, key, request, scores[row], kind == "answer", rows.failed[row])
            self._release(entered, arm)
        return entered

    def _unit_key(self, rows: LogColumns, row: int, kind: str, arm: int | None) -> int | None:
        """The key of the row's unit; None where the row can't count. Reasons are counted once a request or score."""
        reason, role = "", rows.role[row]
        if arm is None:
            reason = "not of an arm"
        elif role in ("override", "holdout"):
            reason = role
        elif self._rules.mode == "split" and role == "shadow":
            reason = "of a shadow, in a split"
        elif self._rules.mode == "split" and self._plan(arm, rows.probability[row]) is None:
            reason = "chance of the arm not as planned"
        else:
            key = _key(rows.unit[row])
            if not (self._thinned and _spread(key) & self._thinned):
                return key
            reason = "beyond max_units"
        if kind != "assignment":
            self._skip(reason)
        return None

    def _event(self, event: str | None, detail: str | None) -> None:
        weights = weights_of(detail, self._rules.arms)
        if event == "resume" and weights is not None:
            self._lose()
        elif event == "stop" and self._rules.mode == "shadow":
            self._lose_copies("copy cancelled by the stop")
        if weights is not None and self._rules.mode == "split":
            plan = tuple(weights[arm] for arm in self._rules.arms)
            if plan != self.plan:
                self.plan = plan
                self.plans.append(plan)
                self._known_plans.clear()

    def _lose(self) -> None:
        """Give the requests that were in flight when the ingress restarted their outcome."""
        for unit in self._open.values():
            self._end(unit, _ASKED, self._worst)
        self._lose_copies("copy lost with the ingress")
        for arm, guard in enumerate(self._guards):
            if self._rules.mode == "split" or arm == self._control:
                guard.lose(failed=True)

    def _lose_copies(self, reason: str) -> None:
        """Leave out the copies that have no answer and get none."""
        for copy in [copy for copy, pair in self._pairs.items() if pair.value is None]:
            del self._pairs[copy]
            self._skip(reason)
        for arm, guard in enumerate(self._guards):
            if self._rules.mode == "shadow" and arm != self._control:
                guard.lose(failed=False)

    def _value(self, value: float, failed: bool) -> float:
        """The score on the scale 0..1 where the metric is bounded; a failed answer has the worst. NaN: none."""
        rules = self._rules
        if rules.kind != "bounded":
            return math.log(value) if rules.kind == "log" and value > 0 else value if rules.kind != "log" else math.nan
        if failed:
            return self._worst
        if value < rules.low or value > rules.high:
            self._skip("score out of its range, counted as the end of it")
            value = min(max(value, rules.low), rules.high)
        return (value - rules.low) / (rules.high - rules.low)

    def _assign(self, entered: NewObservations, arm: int, plan: int | None, key: int, request: str) -> None:
        assert plan is not None, "checked by _unit_key"
        unit = self._open.get(key)
        if key not in self._units:
            self._open[key] = _Unit(self._now, arm, plan, {request: _ASKED})
            self._remember(key)
            entered.ratio_arm.append(arm)
            entered.ratio_plan.append(plan)
        elif unit is None or unit.arm != arm or self._now >= unit.first_at + self._rules.window_s:
            return
        elif request not in unit.requests:
            unit.requests[request] = _ASKED
            unit.pending += 1

    def _outcome(self, arm: int, key: int, request: str, score: float, answered: bool, failed: bool) -> None:
        """An answer, or a later score."""
        unit = self._open.get(key)
        if unit is not None and unit.arm == arm and unit.requests.get(request, _DONE) != _DONE:
            if self._now >= self._due_time(unit):
                self._skip("after the deadline of its unit")
                return
            value = self._value(score, answered and failed)
            if value == value or failed:
                self._add(unit, request, value)
            elif answered:
                unit.requests[request] = _ANSWERED
        elif key not in self._units:
            self._skip("without an assignment before it")
        elif request in self._late and (score == score or failed):
            del self._late[request]
            self._skip("after the deadline of its unit")

    def _add(self, unit: _Unit, request: str, value: float) -> None:
        unit.requests[request] = _DONE
        unit.pending -= 1
        if value == value:
            unit.total += value
            unit.count += 1

    def _end(self, unit: _Unit, state: int, value: float) -> None:
        """Give the unit's requests that are in this state their outcome."""
        for request in [request for request, found in unit.requests.items() if found == state]:
            self._add(unit, request, value)

    def _due_time(self, unit: _Unit) -> float:
        return unit.first_at + self._rules.window_s + self._rules.deadline_s

    def _release(self, entered: NewObservations, *arms: int) -> None:
        """Enter what is fixed and has nothing open before it; into the guardrails, of these arms."""
        now, window_s, deadline_s = self._now, self._rules.window_s, self._rules.deadline_s
        for arm in arms:
            for done in self._guards[arm].ready(now):
                entered.guard_arm.append(arm)
                entered.guard_rows.append(done)
        while self._open:
            unit = next(iter(self._open.values()))
            closed = unit.first_at + window_s
            if now < closed or (unit.pending and now < closed + deadline_s):
                break
            self._open.popitem(last=False)
            self._enter(entered, unit)
        while self._pairs:
            (_, arm), pair = next(iter(self._pairs.items()))
            if pair.value is None and now < pair.due:
                break
            self._pairs.popitem(last=False)
            value = self._worst if pair.value is None else pair.value
            if value == value:
                entered.pair_arm.append(arm)
                entered.pair_score.append(value)
                entered.pair_control.append(pair.control)
            else:
                self._skip("copy without a score")

    def _enter(self, entered: NewObservations, unit: _Unit) -> None:
        if unit.pending:
            self._late.update((request, None) for request, state in unit.requests.items() if state != _DONE)
            while len(self._late) > _RECENT:
                self._late.popitem(last=False)
            self._end(unit, _ASKED, self._worst)
        if not unit.count and self._rules.kind != "bounded":
            self._skip("unit without a score")
            return
        entered.arm.append(unit.arm)
        entered.plan.append(unit.plan)
        entered.score.append(unit.total / unit.count if unit.count else _MIDDLE)
        entered.scored.append(unit.count > 0)

    def _shadow(self, kind: str, arm: int, key: int, request: str, score: float, failed: bool) -> None:
        """The control's answer, the assignment of a copy, or the copy's answer."""
        if arm == self._control:
            value = math.nan if kind == "assignment" else self._value(score, failed)
            if value == value:
                self._prompts.setdefault(request, value)
                if len(self._prompts) > _RECENT:
                    self._prompts.popitem(last=False)
            return
        bit, seen = 1 << arm, self._units.get(key, 0)
        pair = self._pairs.get((request, arm))
        if kind == "assignment" and not seen & bit:
            control = self._prompts.get(request)
            if control is None:
                self._skip("copy without a score of the control")
                return
            self._pairs[request, arm] = _Pair(control, self._now + self._rules.deadline_s)
            self._remember(key, bit)
        elif kind == "answer" and pair is not None and pair.value is None and self._now < pair.due:
            pair.value = self._value(score, failed)
        elif kind == "answer" and not seen & bit:
            self._skip("without an assignment before it")

    def _plan(self, arm: int, chance: float) -> int | None:
        """The latest plan that gives the arm this chance. Two arms need none: the other has the rest."""
        if (arm, chance) not in self._known_plans:
            fitting = [k for k, plan in enumerate(self.plans) if abs(plan[arm] - chance) < 2e-6 and chance > 0]
            if not fitting and len(self._rules.arms) == 2 and 0 < chance <= 1:
                self.plans.append((chance, 1 - chance) if arm == 0 else (1 - chance, chance))
                fitting = [len(self.plans) - 1]
            self._known_plans[arm, chance] = fitting[-1] if fitting else None
        return self._known_plans[arm, chance]

    def _remember(self, key: int, bit: int = 1) -> None:
        self._units[key] = self._units.get(key, 0) | bit
        if len(self._units) > self._rules.max_units:
            self._thinned = self._thinned * 2 + 1
            self._units = {one: bits for one, bits in self._units.items() if not _spread(one) & self._thinned}
            for one in [one for one in self._open if _spread(one) & self._thinned]:
                del self._open[one]
                self._skip("beyond max_units")

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
