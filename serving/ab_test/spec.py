"""Spec of an experiment on a running endpoint: arms with weights, units, primary metric, guardrails."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from graftwork.config import Spec
from graftwork.errors import ConfigError
from graftwork.serving.evaluation.scorers.load import ScorerSpec
from graftwork.storage.store import NAME_PATTERN, Store

MEASURES = ("latency_ms", "ttft_ms", "prompt_tokens", "completion_tokens")
"""Metrics that a row holds in a field of its own; every other is looked for among its scores."""


ARM_PATTERN = r"^[a-z0-9][a-z0-9+._-]{0,62}$"
SUM_TOLERANCE = 1e-9
UnitKind = Literal["user", "session", "request"]
ArmName = Annotated[str, Field(pattern=ARM_PATTERN)]
Weight = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class TrafficArm(Spec):
    """One arm of an experiment: a model of the endpoint, and its share of the units."""

    name: ArmName
    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """A name of GET /v1/models; null is the endpoint's `arm/NAME`. An alias is pinned to its version at the start."""
    weight: Weight | None = None
    """Share of the units; all arms' sum to 1. mode: shadow has none: the control answers, the others get copies."""

    @property
    def model_name(self) -> str:
        """The endpoint's model name."""
        return self.model or f"arm/{self.name}"


class RampStep(Spec):
    """Weights that hold from a time on."""

    after_s: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Seconds since the start."""
    weights: dict[ArmName, Weight]


class MetricSpec(Spec):
    """The one number that decides. In YAML a plain string is its `name`."""

    name: str
    """A scorer's metric, one that POST /v1/feedback brings later, or latency_ms, ttft_ms, prompt_tokens,
    completion_tokens."""
    kind: Literal["bounded", "unbounded", "log"] = "bounded"
    """bounded: within low..high, tested without any approximation; unbounded: tested asymptotically; log: the same for
    its logarithm."""
    low: float = 0.0
    high: float = 1.0
    better: Literal["higher", "lower"] = "higher"
    window_s: float = Field(default=0.0, ge=0)
    """A unit counts with the mean over its requests in this time from its first; 0: with its first request."""
    deadline_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 600.0
    """Seconds, after the window, at which a unit's outcome is fixed: an answer that is missing then counts with the
    worst score, feedback that is missing with the middle of low..high. Give the longest time that feedback takes."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _range(self) -> Self:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"low={self.low:g} is to be below high={self.high:g}, both finite")
        return self


class GuardrailSpec(Spec):
    """A bound that an arm may not break: when the log shows that it does, the arm is cut at once."""

    kind: Literal["errors", "latency", "schema_invalid", "empty_context", "fairness_gap"]
    """errors: failed answers; latency: answers slower than bound_ms; schema_invalid: answers whose `score` is below 1;
    empty_context: answers without retrieved passages; fairness_gap: between the mean `score` of two `groups`."""
    limit: Annotated[float, Field(gt=0, lt=1)]
    """Share of answers (or gap) that is still allowed."""
    bound_ms: Annotated[float, Field(gt=0)] | None = None
    """latency: a p95 of 2 s is bound_ms 2000 and limit 0.05."""
    score: str = "json_schema"
    arms: tuple[ArmName, ...] = ()
    """Whom it watches; none named: all. The control is never cut."""
    groups: tuple[str, str] | None = None
    """fairness_gap: two scores that are 1 for their members."""
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Chance that an arm within the limit is ever cut."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.kind == "latency") != (self.bound_ms is not None):
            raise ValueError("bound_ms stands with kind=latency, and only there")
        if (self.kind == "fairness_gap") != (self.groups is not None):
            raise ValueError("groups stands with kind=fairness_gap, and only there")
        return self


class ExperimentSpec(Spec):
    """A live split or a shadow on a running endpoint. Clients ask for the model `experiment/NAME`."""

    kind: Literal["experiment"] = "experiment"
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    endpoint: str = "http://127.0.0.1:8000"
    """Address of the endpoint that it runs on."""
    admin_token_env: str | None = None
    """Environment variable with the endpoint's admin token."""
    mode: Literal["split", "shadow"] = "split"
    """split: each unit is answered by its own arm; shadow: the control answers all, the others answer copies unseen."""
    arms: Annotated[tuple[TrafficArm, ...], Field(min_length=2, max_length=16)]
    control: str
    """The arm that the others are measured against. It answers everybody once the experiment is stopped or killed."""
    unit: tuple[UnitKind, ...] = ("user", "session", "request")
    """Unit of assignment: the first of these that a request names. user: OpenAI's field `user`; session: the header
    `x-session-id`; request: each request for itself."""
    salt: str = ""
    """Another salt gives another assignment."""
    overrides: dict[str, str] = {}
    """Unit (the user's or session's name) -> arm. They are no part of the draw."""
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the units that always get the control and are no part of the draw."""
    ramp: tuple[RampStep, ...] = ()
    """Weights that change by themselves; `graftwork experiment ramp` changes them by hand."""
    shadow_queue: int = Field(default=64, ge=1, le=100_000)
    """Copies that may wait for idle time; the oldest is dropped, and counted, when another one comes."""
    shadow_concurrency: int = Field(default=4, ge=1, le=256)
    """Copies answered at a time."""
    primary: MetricSpec
    guardrails: tuple[GuardrailSpec, ...] = ()
    scorers: tuple[ScorerSpec, ...] = ()
    """Scorers of each answer as it comes: kinds that need no gold (json_schema, regex, cost, own)."""
    answer_schema: str | None = None
    """JSON schema of a valid answer, for the scorers."""
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Error rate of the verdict, however often it is looked at."""
    margin: Annotated[float, Field(gt=0)] = 0.03
    """Differences smaller than this count as none."""
    log: str | None = None
    """Location of the rows: a folder, file:// or s3://; null is the endpoint's own root."""
    log_outputs: bool = True
    """Keep the answers' texts in the log."""
    log_prompts: bool = False
    """Keep the conversations that are answered in the log: `graftwork experiment feedback` makes rows of both."""
    log_buffer: int = Field(default=20_000, ge=1)
    """Rows that wait to be written; requests beyond it take no part, and are counted."""
    log_every_s: Annotated[float, Field(gt=0, le=3600)] = 1.0
    """A segment of the log is published at least this often while there are rows: what a killed ingress loses."""

    @field_validator("unit", mode="before")
    @classmethod
    def _one_unit(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("log")
    @classmethod
    def _log_is_a_place(cls, log: str | None) -> str | None:
        try:
            return log and Store(log).uri
        except ConfigError as error:
            raise ValueError(f"{error.problem}: {error.rule}") from None

    @model_validator(mode="after")
    def _arms_stand(self) -> Self:
        names = [arm.name for arm in self.arms]
        if len(set(names)) != len(names):
            raise ValueError(f"arms: names must differ, found {names}")
        if self.control not in names:
            raise ValueError(f"control={self.control!r} is none of the arms {names}")
        for unit, arm in self.overrides.items():
            if arm not in names:
                raise ValueError(f"overrides: {unit!r} is sent to {arm!r}, which is none of the arms {names}")
        for arm in {arm for guardrail in self.guardrails for arm in guardrail.arms}:
            if arm not in names:
                raise ValueError(f"guardrails: {arm!r} is none of the arms {names}")
        if not self.unit or len(set(self.unit)) != len(self.unit):
            raise ValueError(f"unit: each of user, session, request once at most, found {list(self.unit)}")
        return self

    @model_validator(mode="after")
    def _weights_stand(self) -> Self:
        given = {arm.name: arm.weight for arm in self.arms if arm.weight is not None}
        if self.mode == "shadow":
            if given or self.ramp or self.holdout or self.overrides:
                raise ValueError("mode=shadow: the control answers all, so weights, ramp, holdout, overrides can't act")
            if self.primary.window_s:
                raise ValueError("mode=shadow: a unit's first pair counts, so primary.window_s can't act")
            return self
        require_weights("arms", given, [arm.name for arm in self.arms])
        for number, step in enumerate(self.ramp, 1):
            require_weights(f"ramp step {number}", step.weights, [arm.name for arm in self.arms])
        times = [step.after_s for step in self.ramp]
        if times != sorted(set(times)):
            raise ValueError(f"ramp: after_s is to grow from step to step, found {times}")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """By arm, at the start; in a shadow the control has all."""
        if self.mode == "shadow":
            return {arm.name: float(arm.name == self.control) for arm in self.arms}
        return {arm.name: arm.weight or 0.0 for arm in self.arms}


def require_weights(where: str, given: dict[str, float], names: list[str]) -> None:
    """Raises ValueError unless every arm has a weight and they sum to 1."""
    missing = [name for name in names if name not in given]
    unknown = [name for name in given if name not in names]
    if missing or unknown:
        raise ValueError(f"{where}: a weight for each of {names}, found {given}")
    total = math.fsum(given.values())
    if abs(total - 1) > SUM_TOLERANCE or min(given.values()) < 0:
        raise ValueError(f"{where}: weights sum to 1, found {total:g} ({given})")


# Rules fixed before the start: primary metric, error rates, guardrails, planned weights.
#
# A change of the rules while it runs is another experiment. Only the weights may move, by a `ramp` event.


@dataclass(frozen=True)
class OnlineRules:
    """Rules of the verdict. `weights`: planned chance of each arm, summing to 1, units of the holdout aside.

    In a shadow every arm answers every request, so weights say nothing there.
    """

    arms: tuple[str, ...]
    control: str
    metric: str
    """A score's name, or one of `MEASURES`."""
    weights: Mapping[str, float]
    kind: Literal["bounded", "unbounded", "log"] = "bounded"
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
    guardrails: tuple[GuardrailSpec, ...] = ()
    srm_alpha: float = 0.001
    max_units: int = 1 << 20
    """Units remembered; with more, every second one by hash goes on (then every fourth, ...)."""

    @property
    def challengers(self) -> tuple[str, ...]:
        """All arms but the control."""
        return tuple(arm for arm in self.arms if arm != self.control)

    @property
    def contrast_alpha(self) -> float:
        """Error rate of one contrast (Bonferroni)."""
        return self.alpha / len(self.challengers)


def weights_detail(weights: Mapping[str, float]) -> dict[str, Any]:
    """Return the `detail` (JSON) of a `start` or `ramp` event: the weights from then on."""
    return {"weights": dict(weights)}


def weights_of(detail: str | None, arms: tuple[str, ...]) -> dict[str, float] | None:
    """Return the weights in a `start` or `ramp` event; None where it has none. Raises ConfigError."""
    try:
        found = json.loads(detail or "null")
    except ValueError:
        return None
    if not isinstance(found, dict) or "weights" not in found:
        return None
    weights = {str(arm): float(weight) for arm, weight in found["weights"].items()}
    try:
        require_weights("weights of an event", weights, list(arms))
    except ValueError as error:
        raise ConfigError("experiment log", str(error)) from None
    return weights


UNCHANGED_BY_RAMP = frozenset(
    {
        "endpoint",
        "admin_token_env",
        "ramp",
        "shadow_queue",
        "shadow_concurrency",
        "log",
        "log_outputs",
        "log_prompts",
        "log_buffer",
        "log_every_s",
    }
)
"""Keys that are no part of an experiment's identity: places, sizes of buffers, and how weights change."""


def identity_of(spec: ExperimentSpec) -> dict[str, Any]:
    """Return the keys that must not change while it runs, without the weights."""
    tree = spec.model_dump(mode="json", exclude=set(UNCHANGED_BY_RAMP))
    tree["arms"] = [{key: value for key, value in arm.items() if key != "weight"} for arm in tree["arms"]]
    return tree
