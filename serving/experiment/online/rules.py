"""What an online experiment was told before it began: what decides, error rates, guardrails, planned weights.

Written down once: a change while it runs is another experiment. Only the weights may move, told by a `ramp` event.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from graftwork.errors import ConfigError

GuardrailKind = Literal["errors", "latency", "schema_invalid", "empty_context", "fairness_gap"]
MetricKind = Literal["bounded", "unbounded", "log"]

MEASURES = ("latency_ms", "ttft_ms", "prompt_tokens", "completion_tokens")
"""Metrics that a row holds in a field of its own; every other is looked for among its scores."""


@dataclass(frozen=True)
class Guardrail:
    """One one-sided bound that cuts an arm from the experiment when the log shows it to be broken.

    errors: failed answers. latency: answers slower than `bound_ms`; "p95 at most 2 s" is `bound_ms=2000, limit=0.05`.
    schema_invalid: answers whose `score` is below 1. empty_context: answers without retrieved passages.
    fairness_gap: difference of the mean `score` of two groups; a row is of a group where the score of that name is 1.
    """

    kind: GuardrailKind
    limit: float
    """Share of answers, or gap, that is still allowed."""
    bound_ms: float | None = None
    score: str = "form"
    groups: tuple[str, str] | None = None
    arms: tuple[str, ...] = ()
    """Whom it watches; none named: all."""
    alpha: float = 0.01
    """Chance that an arm within the limit is ever cut by this."""

    def __post_init__(self) -> None:
        if not 0 < self.limit < 1:
            raise ConfigError(f"guardrail {self.kind}: limit={self.limit}", rule="a share within 0..1, ends excluded",
                              hint="name the share of answers that may still fail")  # fmt: skip
        if self.kind == "latency" and (self.bound_ms is None or self.bound_ms <= 0):
            raise ConfigError("guardrail latency: bound_ms", f"{self.bound_ms}", "latency is held against a time",
                              "set bound_ms, as in bound_ms: 2000, limit: 0.05 for a p95 of 2 s")  # fmt: skip
        if self.kind == "fairness_gap" and self.groups is None:
            raise ConfigError("guardrail fairness_gap: groups", "none", "a gap is between two groups",
                              "name the two scores that are 1 for their members")  # fmt: skip


@dataclass(frozen=True)
class OnlineRules:
    """How the log is judged. `weights`: planned chance of each arm, summing to 1, units of the holdout aside.

    In a shadow every arm answers every request, so weights say nothing there.
    """

    arms: tuple[str, ...]
    control: str
    metric: str
    """A score's name, or one of `MEASURES`."""
    weights: Mapping[str, float]
    kind: MetricKind = "bounded"
    """bounded: within low..high, tested without any approximation; unbounded: tested asymptotically; log: the same for
    its logarithm."""
    low: float = 0.0
    high: float = 1.0
    better: Literal["higher", "lower"] = "higher"
    alpha: float = 0.05
    """Shared out evenly between the contrasts with the control."""
    margin: float = 0.03
    """Differences within it count as none, in the metric's own unit (of its logarithm: 0.03 is 3 %)."""
    mode: Literal["split", "shadow"] = "split"
    window_s: float = 0.0
    """A unit counts with the mean over its requests in this time from its first; 0: with its first request."""
    deadline_s: float = 600.0
    """Seconds, after a unit's window, at which its outcome is fixed (see `units`)."""
    guardrails: tuple[Guardrail, ...] = ()
    srm_alpha: float = 0.001
    max_units: int = field(default=1 << 20)
    """Units remembered; with more, every second one by hash goes on (then every fourth, ...)."""

    def __post_init__(self) -> None:
        if self.control not in self.arms or len(set(self.arms)) != len(self.arms) or len(self.arms) < 2:
            raise ConfigError(f"control={self.control!r}", f"arms {list(self.arms)}",
                              "two or more different arms, the control among them", "name them so")  # fmt: skip
        if self.mode == "split":
            check_weights(self.weights, self.arms)
        elif self.window_s:
            raise ConfigError(f"window_s={self.window_s:g}", "mode=shadow", "in a shadow a unit's first pair counts",
                              "leave window_s out")  # fmt: skip
        if self.deadline_s <= 0:
            raise ConfigError(f"deadline_s={self.deadline_s:g}", rule="a time above 0",
                              hint="give the longest time that an answer or score may take")  # fmt: skip
        if not self.low < self.high:
            raise ConfigError(f"metric {self.metric}: low={self.low}, high={self.high}", rule="low is below high",
                              hint="give the metric's range")  # fmt: skip
        if not 0 < self.alpha < 1 or self.margin <= 0:
            raise ConfigError(f"alpha={self.alpha}, margin={self.margin}", rule="alpha within 0..1, margin above 0",
                              hint="alpha: 0.05 and margin: 0.03 are the usual")  # fmt: skip

    @property
    def challengers(self) -> tuple[str, ...]:
        """All arms but the control."""
        return tuple(arm for arm in self.arms if arm != self.control)

    @property
    def contrast_alpha(self) -> float:
        """Error rate of one contrast (Bonferroni)."""
        return self.alpha / len(self.challengers)


def check_weights(weights: Mapping[str, float], arms: tuple[str, ...]) -> None:
    """Raises ConfigError unless there is one weight for each arm and they sum to 1."""
    total = math.fsum(weights.values())
    if set(weights) != set(arms) or min(weights.values()) < 0 or abs(total - 1) > 1e-9:
        raise ConfigError(f"weights={dict(weights)}", f"a sum of {total:g} over {len(weights)} arms",
                          f"one weight of 0 or more for each of {list(arms)}, summing to 1",
                          "give every arm its weight; 0 switches it off")  # fmt: skip


def weights_detail(weights: Mapping[str, float]) -> dict[str, Any]:
    """What the `detail` (JSON) of a `start` or `ramp` event holds: the weights from then on."""
    return {"weights": dict(weights)}


def weights_of(detail: str | None, arms: tuple[str, ...]) -> dict[str, float] | None:
    """The weights that a `start` or `ramp` event told; None where it told none. Raises ConfigError."""
    try:
        told = json.loads(detail or "null")
    except ValueError:
        return None
    if not isinstance(told, dict) or "weights" not in told:
        return None
    weights = {str(arm): float(weight) for arm, weight in told["weights"].items()}
    check_weights(weights, arms)
    return weights
