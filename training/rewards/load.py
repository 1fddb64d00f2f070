"""`objective.rewards` of a spec -> rewards, in the driver: all that they need is found before any worker starts."""

import functools
import json
from collections.abc import Sequence

from graftwork import base_model, plugins
from graftwork.answers.schema import AnswerSchema
from graftwork.data import DatasetRow, read_text
from graftwork.storage import Store
from graftwork.training.reward_model import scoring_adapter
from graftwork.training.reward_spec import (
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
from graftwork.training.rewards import functions
from graftwork.training.rewards.reward import AnyReward, ModelReward, Reward, Score
from graftwork.training.spec import TrainSpec

GROUP = "graftwork.rewards"
PLAIN = {"json": functions.json_object, "format": functions.form, "field_f1": functions.field_f1}


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
    content = _schema(uri) if uri else ""
    return Reward(label, one.weight, one.clip, _function(one, content), content)


def _function(one: RewardFunctionSpec, schema: str) -> Score:
    match one:
        case JsonSchemaReward():
            return functools.partial(functions.json_schema, schema=schema)
        case FieldAccuracyReward():
            return functools.partial(functions.field_accuracy, schema=schema or None)
        case ExactReward():
            return functools.partial(functions.exact, field=one.field, ignore_case=one.ignore_case)
        case RegexReward():
            return functools.partial(functions.regex, pattern=one.pattern, whole=one.whole)
        case LengthReward():
            return functools.partial(functions.length, max_chars=one.max_chars)
        case OwnReward():
            found = plugins.load(GROUP, one.name, f"objective.rewards: name={one.name}", own=BUILT_IN)
            return functools.partial(found, **one.params)
        case _:
            return PLAIN[one.name]


def _schema(uri: str) -> str:
    """The schema's text, checked: workers may not see the file."""
    AnswerSchema.load(uri)
    return json.dumps(json.loads(read_text(uri)), sort_keys=True)
