"""Guardrails of one arm: one-sided sequential tests over the growing log."""

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graftwork.serving.ab_test.spec import GuardrailSpec
from graftwork.stats import Floats
from graftwork.stats.sequential import BLOCK, LimitTest


@dataclass(frozen=True)
class GuardrailState:
    """One guardrail of one arm."""

    arm: str
    kind: str
    n: int
    value: float | None
    """Share of answers beyond it, or gap between the groups."""
    limit: float
    e_value: float
    """Largest evidence so far that the limit is broken; 1 / alpha cuts the arm."""
    broken_at: int | None
    """Observations of this guardrail when it broke."""


Facts = Mapping[str, Floats]
"""Columns of the rows in question as numbers: failed, cold, empty (0 or 1), and those of `LogColumns.numbers`."""


GuardRow = tuple[float, ...]
"""One request: failed, cold, empty (0 or 1), then the numbers in the order of `numbers_of(rules)`."""
GUARD_EVERY_S = 600.0
"""A unit enters an arm's guardrails once in this time: retries of one failing prompt are one observation."""
_RECENT = 1 << 16
"""Units remembered for that."""


def facts_of(requests: Sequence[GuardRow], numbers: Sequence[str]) -> dict[str, Floats]:
    """Return the requests as columns."""
    names = ("failed", "cold", "empty", *numbers)
    table = np.array(requests, dtype=np.float64).reshape(len(requests), len(names))
    return {name: table[:, column].copy() for column, name in enumerate(names)}


class GuardQueue:
    """Requests of one arm on the way to its guardrails, in the order of assignment.

    In the order of answers, quick failures would enter before slow successes that were asked earlier, and an arm
    within its limit would be cut at the start of an experiment.
    """

    def __init__(self, deadline_s: float, numbers: int) -> None:
        self._deadline_s, self._lost = deadline_s, (1.0, 0.0, 0.0, *[math.nan] * numbers)
        self._recent: dict[int, float] = {}
        self._older: dict[int, float] = {}
        self._waiting: OrderedDict[str, tuple[float, GuardRow | None]] = OrderedDict()
        """Deadline and, once it is there, outcome by request."""

    def assign(self, unit: int, request: str, at: float) -> None:
        """Take a request, unless the unit had one in the last `GUARD_EVERY_S`."""
        last = self._recent.get(unit)
        if last is None:
            last = self._older.get(unit, -math.inf)
        if at < last + GUARD_EVERY_S:
            return
        if len(self._recent) >= _RECENT:
            self._recent, self._older = {}, self._recent
        self._recent[unit] = at
        self._waiting[request] = at + self._deadline_s, None

    def answer(self, request: str, outcome: GuardRow) -> None:
        """Note the first outcome of a request."""
        due, known = self._waiting.get(request, (0.0, outcome))
        if known is None:
            self._waiting[request] = due, outcome

    def lose(self, *, failed: bool) -> None:
        """End what has no answer: as failed, or as never asked."""
        for request in [request for request, (_, known) in self._waiting.items() if known is None]:
            if failed:
                self._waiting[request] = -math.inf, self._lost
            else:
                del self._waiting[request]

    def ready(self, now: float) -> Iterator[GuardRow]:
        """Release the requests that have an outcome, or have passed their deadline, and nothing open before them."""
        while self._waiting:
            due, known = next(iter(self._waiting.values()))
            if known is None and now < due:
                return
            self._waiting.popitem(last=False)
            yield known or self._lost


class GuardrailTest:
    """One guardrail of one arm."""

    def __init__(self, rule: GuardrailSpec, arm: str) -> None:
        self.rule, self.arm = rule, arm
        self._gap = _Gap(rule) if rule.kind == "fairness_gap" else None
        self._test = LimitTest(rule.limit)
        self._n, self._beyond, self._most, self._broken_at = 0, 0, 1.0, None

    _broken_at: int | None

    @property
    def broken(self) -> bool:
        """Its limit was refuted at some look."""
        return self._broken_at is not None

    def update(self, facts: Facts) -> None:
        """Take answers of the arm, at most one of a unit in ten minutes."""
        if self._gap is not None:
            capital, n = self._gap.update(facts)
            self._note(capital, n)
            return
        values = _beyond(self.rule, facts)
        for start in range(0, len(values), BLOCK):
            block = values[start : start + BLOCK]
            self._note(self._test.update(block), len(block))
            self._beyond += int(np.sum(block))

    def state(self) -> GuardrailState:
        """Return the state after the rows so far."""
        share = self._beyond / self._n if self._n else None
        value = self._gap.value if self._gap is not None else share
        return GuardrailState(
            arm=self.arm,
            kind=self.rule.kind,
            n=self._n,
            value=value,
            limit=self.rule.limit,
            e_value=self._most,
            broken_at=self._broken_at,
        )

    def _note(self, capital: Floats, n: int) -> None:
        crossed = np.nonzero(capital >= 1 / self.rule.alpha)[0]
        if len(crossed) and self._broken_at is None:
            self._broken_at = self._n + int(crossed[0]) + 1
        self._n += n
        self._most = max(self._most, float(np.max(capital, initial=1.0)))


class _Gap:
    """Members of two groups compared pair by pair, in the order in which they come.

    The difference of a pair lies within -1..1 and has the gap as its mean; half of the capital bets on either side.
    """

    def __init__(self, rule: GuardrailSpec) -> None:
        assert rule.groups is not None, "a gap is between two groups"
        self._rule, self._groups = rule, rule.groups
        limit = (1 + rule.limit) / 2
        self._over, self._under = LimitTest(limit), LimitTest(limit)
        self._waiting: tuple[list[float], list[float]] = ([], [])
        self._pairs, self._total = 0, 0.0

    @property
    def value(self) -> float | None:
        """Mean difference so far, first group minus second."""
        return self._total / self._pairs if self._pairs else None

    def update(self, facts: Facts) -> tuple[Floats, int]:
        """(capital after each pair, pairs)."""
        differences = np.array(self._matched_scores(facts), dtype=np.float64)
        found = [np.zeros(0)]
        for start in range(0, len(differences), BLOCK):
            block = differences[start : start + BLOCK]
            found.append((self._over.update((1 + block) / 2) + self._under.update((1 - block) / 2)) / 2)
        return np.concatenate(found), len(differences)

    def _matched_scores(self, facts: Facts) -> list[float]:
        scores = np.where(facts["failed"] > 0, 0.0, facts[self._rule.score])
        first, second = self._waiting
        found = []
        for score, is_first, is_second in zip(scores, *(facts[group] for group in self._groups), strict=True):
            if not 0 <= score <= 1 or (is_first == 1) == (is_second == 1):
                continue
            (first if is_first == 1 else second).append(float(score))
            if first and second:
                found.append(first.pop(0) - second.pop(0))
        for difference in found:
            self._total += difference
        self._pairs += len(found)
        for waiting in self._waiting:
            del waiting[BLOCK:]
        return found


def _beyond(rule: GuardrailSpec, facts: Facts) -> Floats:
    """1 where an answer is beyond what the rule wants, for those that tell about it."""
    failed = facts["failed"] > 0
    if rule.kind == "errors":
        return facts["failed"]
    if rule.kind == "empty_context":
        empty: Floats = facts["empty"][~failed]
        return empty
    if rule.kind == "latency":
        times = facts["latency_ms"]
        assert rule.bound_ms is not None, "checked by GuardrailSpec"
        timed = ~failed & (facts["cold"] == 0) & ~np.isnan(times)
        slow: Floats = (times[timed] > rule.bound_ms).astype(np.float64)
        return slow
    scores = facts[rule.score]
    invalid: Floats = (scores[~failed & ~np.isnan(scores)] < 1).astype(np.float64)
    return invalid
