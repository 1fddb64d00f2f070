"""Rewards of an answer: the spec of each with its function, and rewards loaded for a run. `- json` is `- {name: json}`.

A row that no answer can be compared with raises DataError, whatever the answer. The functions are pure, and each may
run in a process pool.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, JsonValue, Tag, model_validator

from graftwork import plugins
from graftwork.artifacts.manifest import AdapterManifest
from graftwork.artifacts.publish import require_base
from graftwork.artifacts.registry import resolve
from graftwork.base.load import ResolvedBase
from graftwork.base.load import resolve as resolve_base
from graftwork.config import Spec
from graftwork.datasets.rows import DatasetRow, read_text
from graftwork.errors import ArtifactError, DataError, GraftworkError, RunError
from graftwork.scoring import AnswerSchema, GoldText, Pattern, matches, parse_object, right_fields, same_text
from graftwork.scoring import field_f1 as f1_of_fields
from graftwork.storage.store import ALIAS_PATTERN, NAME_PATTERN, Store

if TYPE_CHECKING:
    from graftwork.training.spec import TrainSpec

GROUP = "graftwork.rewards"
"""Entry point group of rewards of installed packages."""
Score = Callable[[str, DatasetRow], float]


@dataclass(frozen=True)
class LoadedReward:
    """Picklable function of an answer and its row."""

    score: Score
    content: str = ""
    """Text that decides the reward in addition to the spec's keys: its JSON schema."""


class WeightedReward(Spec):
    """Weight and name of one reward. `load` of its kinds returns the function of an answer and its row."""

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

    def load(self) -> LoadedReward:
        return LoadedReward(json_object)


class JsonSchemaReward(WeightedReward):
    """1 where the answer is one JSON object that validates, else 0."""

    name: Literal["json_schema"]
    json_schema: str
    """A path, `file://`, `s3://` or `recipe://NAME/FILE`."""

    def load(self) -> LoadedReward:
        schema = _answer_schema(self.json_schema)
        return LoadedReward(functools.partial(json_schema, schema=schema), schema)


class FormatReward(WeightedReward):
    """Share of gold's fields that the answer has with a value of gold's JSON type; 0 where it has other fields."""

    name: Literal["format"]

    def load(self) -> LoadedReward:
        return LoadedReward(form)


class FieldAccuracyReward(WeightedReward):
    """Share of gold's fields that the answer has with exactly gold's value."""

    name: Literal["field_accuracy"]
    json_schema: str | None = None
    """An answer that does not validate gets 0; null asks for one JSON object alone."""

    def load(self) -> LoadedReward:
        schema = _answer_schema(self.json_schema) if self.json_schema else None
        return LoadedReward(functools.partial(field_accuracy, schema=schema), schema or "")


class FieldF1Reward(WeightedReward):
    """F1 of the answer's fields against gold's: a field too many costs as one that is missing."""

    name: Literal["field_f1"]

    def load(self) -> LoadedReward:
        return LoadedReward(field_f1)


class ExactReward(WeightedReward):
    """1 where the answer is one of the right texts, else 0."""

    name: Literal["exact"]
    field: str | None = None
    """Field of gold with the right text, or several; null takes the row's assistant turn, else gold's only field."""
    ignore_case: bool = False
    """Compare words alone: case, accents and punctuation do not count."""

    def load(self) -> LoadedReward:
        return LoadedReward(functools.partial(exact, field=self.field, ignore_case=self.ignore_case))


class RegexReward(WeightedReward):
    """1 where the answer matches a regular expression, else 0."""

    name: Literal["regex"]
    pattern: Pattern
    """Python's syntax."""
    whole: bool = True
    """It matches the whole answer, not only somewhere in it."""

    def load(self) -> LoadedReward:
        return LoadedReward(functools.partial(regex, pattern=self.pattern, whole=self.whole))


class LengthReward(WeightedReward):
    """0 up to `max_chars`, then falling evenly to -1 at twice as many."""

    name: Literal["length"]
    max_chars: int = Field(ge=1)

    def load(self) -> LoadedReward:
        return LoadedReward(functools.partial(length, max_chars=self.max_chars))


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

    def load(self) -> LoadedReward:
        function = plugins.load(GROUP, self.name, f"objective.rewards: name={self.name}", own=BUILT_IN)
        return LoadedReward(functools.partial(function, **self.params))


_BUILT_IN: tuple[type[WeightedReward], ...] = (
    JsonReward,
    JsonSchemaReward,
    FormatReward,
    FieldAccuracyReward,
    FieldF1Reward,
    ExactReward,
    RegexReward,
    LengthReward,
    RewardModelReward,
)
BUILT_IN = tuple(kind.model_fields["name"].annotation.__args__[0] for kind in _BUILT_IN)  # type: ignore[union-attr]
"""Names that need no package."""


def _tag_of(value: Any) -> str:
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
    Discriminator(_tag_of),
    BeforeValidator(_short_form),
]


class BadReward(RunError):
    """A reward failed or is no number. Raised on all ranks at the same step."""


@dataclass(frozen=True)
class Reward:
    """A reward that any process can compute from the answer's text. Picklable."""

    label: str
    weight: float
    clip: tuple[float, float] | None
    score: Score
    content: str = ""
    """Text that decides the reward in addition to the spec's keys: its schema."""

    def compute(self, answer: str, row: DatasetRow) -> float:
        """The clipped reward. Raises BadReward naming the row."""
        try:
            value = float(self.score(answer, row))
        except GraftworkError:
            raise
        except Exception as error:  # a function of another package: whatever it raises ends the run with the row named
            raise _bad_reward(self, row, f"it raised {type(error).__name__}: {error}", answer) from error
        return checked(self, row, value, answer)


@dataclass(frozen=True)
class ModelReward:
    """A reward that a published reward model gives to the whole conversation. Picklable: a worker loads the model."""

    label: str
    weight: float
    clip: tuple[float, float] | None
    content: str
    """`task@version`."""


AnyReward = Reward | ModelReward


def checked(reward: AnyReward, row: DatasetRow, value: float, answer: str) -> float:
    """The value, clipped. Raises BadReward where it is no number."""
    if not math.isfinite(value):
        raise _bad_reward(reward, row, f"it returned {value}", answer)
    return value if reward.clip is None else min(max(value, reward.clip[0]), reward.clip[1])


def total(rewards: Sequence[AnyReward], values: Sequence[float]) -> float:
    """The weighed sum of an answer's rewards."""
    return math.fsum(reward.weight * value for reward, value in zip(rewards, values, strict=True))


def _bad_reward(reward: AnyReward, row: DatasetRow, found: str, answer: str) -> BadReward:
    return BadReward(
        f"reward {reward.label!r} of row {row.id!r}",
        f"{found}; the answer was {answer[:200]!r}",
        "a reward is a finite number for every answer",
        "fix it, and run the same command: it continues from the last checkpoint",
    )


def load_rewards(specs: Sequence[RewardFunctionSpec], spec: "TrainSpec") -> tuple[AnyReward, ...]:
    """The rewards in order. Raises ConfigError (an unknown name, a broken schema), ArtifactError, StorageError."""
    rewards: list[AnyReward] = []
    for one in specs:
        label = one.label or one.name
        if isinstance(one, RewardModelReward):
            manifest = scoring_adapter(Store(spec.root), one.model, resolve_base(spec.base))
            rewards.append(ModelReward(label, one.weight, one.clip, manifest.ref))
        else:
            loaded = one.load()
            rewards.append(Reward(label, one.weight, one.clip, loaded.score, loaded.content))
    return tuple(rewards)


def check_rows(rewards: Sequence[AnyReward], specs: Sequence[RewardFunctionSpec], rows: Sequence[DatasetRow]) -> None:
    """Raise DataError for the first row that a built-in reward can't hold an answer against."""
    for reward, spec in zip(rewards, specs, strict=True):
        if isinstance(reward, Reward) and spec.name in BUILT_IN:
            for row in rows:
                reward.score("", row)


def scoring_adapter(store: Store, ref: str, base: ResolvedBase) -> AdapterManifest:
    """The manifest of a published reward model for this base. Raises ArtifactError."""
    manifest = resolve(store, ref)
    if manifest.method.get("objective") != "reward":
        raise ArtifactError(
            f"reward model {ref}",
            f"it was trained with objective.kind={manifest.method.get('objective', 'sft')}",
            "a reward model is trained with objective.kind=reward",
            "name one, or train one on pairs first (examples/train-reward.yaml)",
        )
    require_base(manifest, base.digest)
    return manifest


# The functions of the rewards, which their classes describe.


def json_object(answer: str, row: DatasetRow) -> float:
    return float(parse_object(answer) is not None)


def json_schema(answer: str, row: DatasetRow, *, schema: str) -> float:
    found = parse_object(answer)
    return float(found is not None and _schema(schema).holds(found))


def form(answer: str, row: DatasetRow) -> float:
    gold, found = _gold(row), parse_object(answer)
    if found is None or not found.keys() <= gold.keys():
        return 0.0
    return sum(name in found and _kind(found[name]) == _kind(value) for name, value in gold.items()) / len(gold)


def field_accuracy(answer: str, row: DatasetRow, *, schema: str | None = None) -> float:
    gold, found = _gold(row), parse_object(answer)
    if found is None or (schema is not None and not _schema(schema).holds(found)):
        return 0.0
    return right_fields(found, gold) / len(gold)


def field_f1(answer: str, row: DatasetRow) -> float:
    return f1_of_fields(parse_object(answer) or {}, _gold(row))


def exact(answer: str, row: DatasetRow, *, field: str | None = None, ignore_case: bool = False) -> float:
    right = GoldText(field).find_texts(row.gold, row.answer, row.id)
    return float(any(same_text(answer, text, ignore_case=ignore_case) for text in right))


def regex(answer: str, row: DatasetRow, *, pattern: str, whole: bool = True) -> float:
    return float(matches(answer, pattern, whole=whole))


def length(answer: str, row: DatasetRow, *, max_chars: int) -> float:
    return -min(1.0, max(0, len(answer) - max_chars) / max_chars)


def _gold(row: DatasetRow) -> Mapping[str, Any]:
    if not row.gold:
        raise DataError(
            f"row {row.id!r}: gold",
            "missing or empty",
            "this reward holds the answer against an object of fields",
            "add `gold`, or reward by json or json_schema",
        )
    return row.gold


def _kind(value: object) -> type:
    return float if isinstance(value, int) and not isinstance(value, bool) else type(value)


@functools.lru_cache(maxsize=16)
def _schema(text: str) -> AnswerSchema:
    return AnswerSchema(json.loads(text))


def _answer_schema(uri: str) -> str:
    """The schema's text, checked: workers may not see the file."""
    AnswerSchema.load(uri)
    return json.dumps(json.loads(read_text(uri)), sort_keys=True)
