"""What an answer can be rewarded for, as a spec names it under `objective.rewards`. `- json` is `- {name: json}`."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, JsonValue, Tag, model_validator

from graftwork.answers.exact import Pattern
from graftwork.config import Spec
from graftwork.storage import ALIAS_PATTERN, NAME_PATTERN


class WeightedReward(Spec):
    """How much one reward counts."""

    weight: float = 1.0
    """The rewards of an answer are added up, each times its weight. Below 0 it punishes."""
    clip: tuple[float, float] | None = None
    """Lowest and highest value that is passed on, before the weight."""
    label: Annotated[str, Field(pattern=NAME_PATTERN)] | None = None
    """Its name in the figures; null takes `name`. Two rewards of one name need it."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.clip and not self.clip[0] < self.clip[1]:
            raise ValueError(f"clip={list(self.clip)} is empty: the lowest value comes first")
        return self


class JsonReward(WeightedReward):
    """1 where the answer is exactly one JSON object, else 0."""

    name: Literal["json"]


class JsonSchemaReward(WeightedReward):
    """1 where the answer is one JSON object that validates, else 0."""

    name: Literal["json_schema"]
    json_schema: str
    """A path, `file://`, `s3://` or `recipe://NAME/FILE`."""


class FormatReward(WeightedReward):
    """Share of gold's fields that the answer has with a value of gold's JSON type; 0 where it has other fields."""

    name: Literal["format"]


class FieldAccuracyReward(WeightedReward):
    """Share of gold's fields that the answer has with exactly gold's value."""

    name: Literal["field_accuracy"]
    json_schema: str | None = None
    """An answer that does not validate gets 0; null asks for one JSON object alone."""


class FieldF1Reward(WeightedReward):
    """F1 of the answer's fields against gold's: a field too many costs as one that is missing."""

    name: Literal["field_f1"]


class ExactReward(WeightedReward):
    """1 where the answer is one of the right texts, else 0."""

    name: Literal["exact"]
    field: str | None = None
    """Field of gold with the right text, or several; null takes the row's assistant turn, else gold's only field."""
    ignore_case: bool = False
    """Compare words alone: case, accents and punctuation do not count."""


class RegexReward(WeightedReward):
    """1 where the answer matches a regular expression, else 0."""

    name: Literal["regex"]
    pattern: Pattern
    """Python's syntax."""
    whole: bool = True
    """It matches the whole answer, not only somewhere in it."""


class LengthReward(WeightedReward):
    """0 up to `max_chars`, then falling evenly to -1 at twice as many."""

    name: Literal["length"]
    max_chars: int = Field(ge=1)


class RewardModelReward(WeightedReward):
    """What a reward model, published by a run with objective.kind=reward on the same base, says of the conversation."""

    name: Literal["reward_model"]
    model: Annotated[str, Field(pattern=ALIAS_PATTERN)]
    """`task@alias` or `task@version`; the version is looked up when the run starts."""


class OwnReward(WeightedReward):
    """A function `f(answer, row, **params) -> float` of an installed package, entry point group `graftwork.rewards`."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    params: dict[str, JsonValue] = {}
    """Passed on by name."""


_BUILT_IN: tuple[type[WeightedReward], ...] = (
    JsonReward, JsonSchemaReward, FormatReward, FieldAccuracyReward, FieldF1Reward, ExactReward, RegexReward,
    LengthReward, RewardModelReward,
)  # fmt: skip
BUILT_IN = tuple(kind.model_fields["name"].annotation.__args__[0] for kind in _BUILT_IN)  # type: ignore[union-attr]
"""Names that need no package."""


def _which(value: Any) -> str:
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return str(name) if name in BUILT_IN else "own"


def _short_form(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


RewardFunctionSpec = Annotated[
    Annotated[JsonReward, Tag("json")]
    | Annotated[JsonSchemaReward, Tag("json_schema")]
    | Annotated[FormatReward, Tag("format")]
    | Annotated[FieldAccuracyReward, Tag("field_accuracy")]
    | Annotated[FieldF1Reward, Tag("field_f1")]
    | Annotated[ExactReward, Tag("exact")]
    | Annotated[RegexReward, Tag("regex")]
    | Annotated[LengthReward, Tag("length")]
    | Annotated[RewardModelReward, Tag("reward_model")]
    | Annotated[OwnReward, Tag("own")],
    Discriminator(_which),
    BeforeValidator(_short_form),
]
