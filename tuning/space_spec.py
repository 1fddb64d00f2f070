"""The values that a sweep tries for one key of the training spec."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from graftwork.config import Spec


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
    def _differ(self) -> Self:
        if any(value in self.values[:index] for index, value in enumerate(self.values)):
            raise ValueError(f"values must differ, found {list(self.values)}")
        return self


class _Range(Spec):
    low: float = Field(allow_inf_nan=False)
    high: float = Field(allow_inf_nan=False)

    @model_validator(mode="after")
    def _rises(self) -> Self:
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
    def _rises(self) -> Self:
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
