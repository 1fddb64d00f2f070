"""The built-in rewards: plain functions of an answer and its row. Pure; each may stand in a process pool.

A row that no answer can be held against raises DataError, whatever the answer.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftwork import plugins
from graftwork.artifacts import publish as artifact
from graftwork.artifacts.manifest import AdapterManifest
from graftwork.artifacts.registry import resolve
from graftwork.base import load as base_model
from graftwork.base.load import ResolvedBase
from graftwork.datasets.rows import DatasetRow, read_text
from graftwork.errors import ArtifactError, DataError, GraftworkError, RunError
from graftwork.scoring import AnswerSchema, GoldText, matches, parse_object, right_fields, same_text
from graftwork.scoring import field_f1 as f1_of_fields
from graftwork.storage.store import Store
from graftwork.training.objectives.spec import (
    BUILT_IN,
    ExactReward,
    FieldAccuracyReward,
    JsonSchemaReward,
    LengthReward,
    OwnReward,
    RegexReward,
    RewardFunctionSpec,
    RewardModelReward,
)
from graftwork.training.spec import TrainSpec

# Finding a published reward model: told from other adapters by its manifest, before anything is loaded.


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
    artifact.require_base(manifest, base.digest)
    return manifest


def json_object(answer: str, row: DatasetRow) -> float:
    """1 where the answer is exactly one JSON object."""
    return float(parse_object(answer) is not None)


def json_schema(answer: str, row: DatasetRow, *, schema: str) -> float:
    """1 where the answer is one JSON object that validates. schema: the JSON text."""
    found = parse_object(answer)
    return float(found is not None and _schema(schema).holds(found))


def form(answer: str, row: DatasetRow) -> float:
    """Share of gold's fields that the answer has with a value of gold's JSON type; 0 where it has other fields."""
    gold, found = _gold(row), parse_object(answer)
    if found is None or not found.keys() <= gold.keys():
        return 0.0
    return sum(name in found and _kind(found[name]) == _kind(value) for name, value in gold.items()) / len(gold)


def field_accuracy(answer: str, row: DatasetRow, *, schema: str | None = None) -> float:
    """Share of gold's fields that the answer has with exactly gold's value; 0 where it does not validate."""
    gold, found = _gold(row), parse_object(answer)
    if found is None or (schema is not None and not _schema(schema).holds(found)):
        return 0.0
    return right_fields(found, gold) / len(gold)


def field_f1(answer: str, row: DatasetRow) -> float:
    """F1 of the answer's fields against gold's."""
    return f1_of_fields(parse_object(answer) or {}, _gold(row))


def exact(answer: str, row: DatasetRow, *, field: str | None = None, ignore_case: bool = False) -> float:
    """1 where the answer is one of the right texts."""
    right = GoldText(field).find_texts(row.gold, row.answer, row.id)
    return float(any(same_text(answer, text, ignore_case=ignore_case) for text in right))


def regex(answer: str, row: DatasetRow, *, pattern: str, whole: bool = True) -> float:
    """1 where the answer, or a part of it, matches."""
    return float(matches(answer, pattern, whole=whole))


def length(answer: str, row: DatasetRow, *, max_chars: int) -> float:
    """0 up to `max_chars`, then falling evenly to -1 at twice as many."""
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


# One reward of a run: its function, its weight, and what happens where the function fails.


Score = Callable[[str, DatasetRow], float]


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
    """What decides it beside the spec's own words: the text of its schema."""

    def compute(self, answer: str, row: DatasetRow) -> float:
        """The clipped reward. Raises BadReward naming the row."""
        try:
            value = float(self.score(answer, row))
        except GraftworkError:
            raise
        except Exception as error:  # a function of another package: whatever it raises ends the run with the row named
            raise _bad(self, row, f"it raised {type(error).__name__}: {error}", answer) from error
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
        raise _bad(reward, row, f"it returned {value}", answer)
    return value if reward.clip is None else min(max(value, reward.clip[0]), reward.clip[1])


def total(rewards: Sequence[AnyReward], values: Sequence[float]) -> float:
    """The weighed sum of an answer's rewards."""
    return math.fsum(reward.weight * value for reward, value in zip(rewards, values, strict=True))


def _bad(reward: AnyReward, row: DatasetRow, found: str, answer: str) -> BadReward:
    return BadReward(
        f"reward {reward.label!r} of row {row.id!r}",
        f"{found}; the answer was {answer[:200]!r}",
        "a reward is a finite number for every answer",
        "mend it, and run the same command: it continues from the last checkpoint",
    )


# `objective.rewards` of a spec -> rewards, in the driver: all that they need is found before any worker starts.


GROUP = "graftwork.rewards"
PLAIN = {"json": json_object, "format": form, "field_f1": field_f1}


def load_rewards(specs: Sequence[RewardFunctionSpec], spec: TrainSpec) -> tuple[AnyReward, ...]:
    """The rewards in order. Raises ConfigError (an unknown name, a broken schema), ArtifactError, StorageError."""
    return tuple(_load(one, spec) for one in specs)


def check_rows(rewards: Sequence[AnyReward], specs: Sequence[RewardFunctionSpec], rows: Sequence[DatasetRow]) -> None:
    """Raise DataError for the first row that a built-in reward can't hold an answer against."""
    for reward, spec in zip(rewards, specs, strict=True):
        if isinstance(reward, Reward) and spec.name in BUILT_IN:
            for row in rows:
                reward.score("", row)


def _load(one: RewardFunctionSpec, spec: TrainSpec) -> AnyReward:
    label = one.label or one.name
    if isinstance(one, RewardModelReward):
        found = scoring_adapter(Store(spec.root), one.model, base_model.resolve(spec.base))
        return ModelReward(label, one.weight, one.clip, found.ref)
    uri = one.json_schema if isinstance(one, JsonSchemaReward | FieldAccuracyReward) else None
    content = _answer_schema(uri) if uri else ""
    return Reward(label, one.weight, one.clip, _function(one, content), content)


def _function(one: RewardFunctionSpec, schema: str) -> Score:
    match one:
        case JsonSchemaReward():
            return functools.partial(json_schema, schema=schema)
        case FieldAccuracyReward():
            return functools.partial(field_accuracy, schema=schema or None)
        case ExactReward():
            return functools.partial(exact, field=one.field, ignore_case=one.ignore_case)
        case RegexReward():
            return functools.partial(regex, pattern=one.pattern, whole=one.whole)
        case LengthReward():
            return functools.partial(length, max_chars=one.max_chars)
        case OwnReward():
            found = plugins.load(GROUP, one.name, f"objective.rewards: name={one.name}", own=BUILT_IN)
            return functools.partial(found, **one.params)
        case _:
            return PLAIN[one.name]


def _answer_schema(uri: str) -> str:
    """The schema's text, checked: workers may not see the file."""
    AnswerSchema.load(uri)
    return json.dumps(json.loads(read_text(uri)), sort_keys=True)
