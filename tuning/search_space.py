"""The space of a sweep: the values to try for keys of the training spec, and the objectives to compare trials by."""

import difflib
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, model_validator

from graftwork.adapters.spec import AdapterSpec
from graftwork.config import Spec
from graftwork.errors import ConfigError


class CategoricalSpace(Spec):
    """One of the listed values, which may be whole parts of the spec: `adapter: {kind: choice, values: [{kind: lora,
    rank: 8}, {kind: ia3}]}`."""

    kind: Literal["choice"] = "choice"
    values: Annotated[tuple[JsonValue, ...], Field(min_length=1)]

    def listed(self) -> Sequence[JsonValue]:
        """All values in order."""
        return self.values

    def samples(self) -> Sequence[JsonValue]:
        """Values that all must be allowed."""
        return self.values

    @model_validator(mode="after")
    def _check_distinct(self) -> Self:
        if any(value in self.values[:index] for index, value in enumerate(self.values)):
            raise ValueError(f"values must differ, found {list(self.values)}")
        return self


class _Range(Spec):
    low: float = Field(allow_inf_nan=False)
    high: float = Field(allow_inf_nan=False)

    @model_validator(mode="after")
    def _check_rising(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low={self.low:g} must be less than high={self.high:g}")
        return self

    def listed(self) -> None:
        """Too many."""

    def samples(self) -> Sequence[float]:
        """Both ends and a fraction between them, which an integer key refuses."""
        return self.low, self.high, self.low + 0.381966 * (self.high - self.low)


class Uniform(_Range):
    """A float between `low` and `high`, evenly."""

    kind: Literal["uniform"] = "uniform"


class LogUniform(_Range):
    """A float between `low` and `high`, evenly on the log scale."""

    kind: Literal["loguniform"] = "loguniform"
    low: float = Field(gt=0, allow_inf_nan=False)


class _Integers(Spec):
    low: int
    high: int

    @model_validator(mode="after")
    def _check_rising(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low={self.low} must be less than high={self.high}")
        return self

    def samples(self) -> Sequence[int]:
        """Both ends."""
        return self.low, self.high


class IntRange(_Integers):
    """A whole number from `low` to `high`, both included."""

    kind: Literal["int"] = "int"
    log: bool = False
    """Evenly on the log scale."""

    @model_validator(mode="after")
    def _has_a_logarithm(self) -> Self:
        if self.log and self.low < 1:
            raise ValueError(f"low={self.low} has no place on a log scale: with log, low is 1 or more")
        return self

    def listed(self) -> Sequence[int]:
        """All values in order."""
        return range(self.low, self.high + 1)


class PowerOfTwo(_Integers):
    """A power of two from `low` to `high`, both included: 4, 8, 16, ..."""

    kind: Literal["power_of_two"] = "power_of_two"

    @model_validator(mode="after")
    def _are_powers(self) -> Self:
        for end in (self.low, self.high):
            if end < 1 or end & (end - 1):
                near = 2 ** max(0, end.bit_length() - 1) if end > 0 else 1
                raise ValueError(f"{end} is no power of two; {near} is one, and {2 * near}")
        return self

    def listed(self) -> Sequence[int]:
        """All values in order."""
        return [2**power for power in range(self.low.bit_length() - 1, self.high.bit_length())]


Domain = Annotated[CategoricalSpace | Uniform | LogUniform | IntRange | PowerOfTwo, Field(discriminator="kind")]
Space = dict[str, Domain]
"""By dotted key of the training spec."""


# Default space: the learning rate, and the rank of a LoRA.


RANKS = (2, 64)
"""Capacity goes with the rank, so powers of two; a few thousand rows fit into 64 (the same source)."""


def default_space(adapter: AdapterSpec) -> Space:
    """For the adapter that is trained."""
    low, high = adapter.learning_rates
    space: Space = {"optim.lr": LogUniform(low=low, high=high)}
    if adapter.has_rank:
        space["adapter.rank"] = PowerOfTwo(low=RANKS[0], high=RANKS[1])
    return space


DECIDES_ROWS = ("base", "data", "prompt", "max_length", "on_overlong", "objective", "seed")
"""Keys of `train` that decide the rows of a trial and their order."""
SAME_ROWS = frozenset(
    f"objective.{key}" for key in ("beta", "label_smoothing", "centre", "temperature", "on_policy", "epsilon")
)
"""Numbers of an objective that weigh the loss and leave the rows as they are."""


def decides_rows(key: str) -> bool:
    """Whether two trials that differ in this key have rows of their own."""
    return key not in SAME_ROWS and any(key == other or key.startswith(f"{other}.") for other in DECIDES_ROWS)


def hint_for_key(key: str, error: ConfigError) -> str:
    """What to do where a value of a space is refused: parts that belong together are given together."""
    part = key.partition(".")[0]
    if f"--set '{part}=" in error.hint:
        return f"give whole parts: {part}: {{kind: choice, values: [{{kind: ..., ...}}, {{kind: ...}}]}}"
    return error.hint


# Objectives: the held-out loss, and figures of what a trial costs.


EVAL_LOSS = "eval_loss"
METRICS = {
    EVAL_LOSS: "held-out loss of the last report, nats a trained token",
    "trained_parameters": "numbers of the adapter; of the whole base where all weights are trained",
    "adapter_bytes": "size of its published tensors: 4 bytes a trained parameter",
    "step_s": "mean seconds of an optimizer step",
    "wall_s": "seconds of the trial, loading and evaluations included",
    "tokens": "tokens processed, padding left out",
    "peak_rss_bytes": "largest resident set of the trial's process",
}
"""What every trial reports, by name."""


def _check_metric(metric: str) -> str:
    if metric not in METRICS:
        near = difflib.get_close_matches(metric, METRICS, n=1, cutoff=0.5)
        raise ConfigError(
            f"objectives: metric={metric!r}",
            "no trial reports it",
            f"a trial reports {', '.join(METRICS)}",
            f"did you mean {near[0]!r}?" if near else "",
        )
    return metric


class Goal(Spec):
    """One figure of a trial and which way is better."""

    metric: Annotated[str, AfterValidator(_check_metric)] = EVAL_LOSS
    direction: Literal["min", "max"] = "min"


def _from_name(value: Any) -> Any:
    return {"metric": value} if isinstance(value, str) else value


def _loss_first(objectives: tuple[Goal, ...]) -> tuple[Goal, ...]:
    names = [goal.metric for goal in objectives]
    if objectives[0] != Goal():
        raise ConfigError(
            f"objectives={names}",
            f"the first is {objectives[0].metric} ({objectives[0].direction})",
            "early stopping and reports use the held-out loss, so it is the first objective",
            f"write objectives: [{', '.join([EVAL_LOSS, *(name for name in names if name != EVAL_LOSS)])}]",
        )
    if len(set(names)) < len(names):
        raise ValueError(f"objectives must differ, found {names}")
    return objectives


NamedGoal = Annotated[Goal, BeforeValidator(_from_name)]
"""In YAML a plain string is its `metric`."""
Goals = Annotated[tuple[NamedGoal, ...], Field(min_length=1), AfterValidator(_loss_first)]
