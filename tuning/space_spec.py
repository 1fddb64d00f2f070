"""The values that a sweep tries for one key of the training spec."""

from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from graftwork.config import Spec


class Choice(Spec):
    """One of the listed values."""

    kind: Literal["choice"] = "choice"
    values: Annotated[tuple[JsonValue, ...], Field(min_length=1)]

    def samples(self) -> tuple[JsonValue, ...]:
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

    def samples(self) -> tuple[float, ...]:
        """Both ends and a fraction between them, which an integer key refuses."""
        return self.low, self.high, self.low + 0.381966 * (self.high - self.low)


class Uniform(_Range):
    """A float between `low` and `high`, evenly."""

    kind: Literal["uniform"] = "uniform"


class LogUniform(_Range):
    """A float between `low` and `high`, evenly on the log scale."""

    kind: Literal["loguniform"] = "loguniform"
    low: float = Field(gt=0, allow_inf_nan=False)


Domain = Annotated[Choice | Uniform | LogUniform, Field(discriminator="kind")]
