"""Rewards: what each built-in gives, what a wrong name or a broken function says, what a spec may not ask."""

import json
import pickle
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import TypeAdapter

from graftwork import plugins
from graftwork.datasets.rows import DatasetRow
from graftwork.errors import ConfigError, DataError
from graftwork.prompts.render import Message
from graftwork.training.rewards import (
    BUILT_IN,
    GROUP,
    BadReward,
    Reward,
    RewardFunctionSpec,
    check_rows,
    load_rewards,
    total,
)
from graftwork.training.spec import TrainSpec

SPECS: TypeAdapter[tuple[RewardFunctionSpec, ...]] = TypeAdapter(tuple[RewardFunctionSpec, ...])
SPEC: dict[str, Any] = {"name": "t", "base": "b", "data": {"train": "x"}, "quant": {"kind": "none"}}
TASK = TrainSpec.model_validate({**SPEC, "objective": {"kind": "grpo", "rewards": ["json"]}})
GOLD = {"city": "Kunming", "feet": 6217}
ROW = DatasetRow("r1", (Message("user", "Where?"), Message("assistant", "Kunming")), gold=GOLD)


def loaded(*trees: Any) -> tuple[Reward, ...]:
    rewards = load_rewards(SPECS.validate_python(trees), TASK)
    return tuple(reward for reward in rewards if isinstance(reward, Reward))


@pytest.mark.parametrize(
    ("tree", "by_answer"),
    [
        ("json", {'{"a": 1}': 1, " {} \n": 1, '```{"a": 1}```': 0, "[1]": 0, '{"a": 1} x': 0, '{"a": NaN}': 0}),
        (
            "format",
            {
                '{"city": "Oslo", "feet": 3.5}': 1,
                '{"city": 3, "feet": 1}': 0.5,
                '{"city": "O", "x": 1}': 0,
                '{"feet": true, "city": ""}': 0.5,
                "no": 0,
            },
        ),
        ("field_accuracy", {'{"city": "Kunming", "feet": 6217.0}': 1, '{"city": "Kunming", "x": 1}': 0.5, "x": 0}),
        ("field_f1", {'{"city": "Kunming", "feet": 6217}': 1, '{"city": "Kunming", "x": 1}': 0.5, "x": 0}),
        ("exact", {" Kunming\n": 1, "kunming": 0}),
        ({"name": "exact", "field": "city", "ignore_case": True}, {"kunming.": 1, "Oslo": 0}),
        ({"name": "regex", "pattern": "[A-Z]+"}, {"ABC": 1, "ABc": 0}),
        ({"name": "regex", "pattern": "[A-Z]+", "whole": False}, {"ABc": 1, "abc": 0}),
        ({"name": "length", "max_chars": 4}, {"": 0, "four": 0, "sixsix": -0.5, "more than twice": -1}),
        ({"name": "length", "max_chars": 4, "clip": [-0.25, 0]}, {"sixsix": -0.25}),
    ],
)
def test_each_built_in_gives(tree: Any, by_answer: dict[str, float]) -> None:
    (reward,) = loaded(tree)
    sent: Reward = pickle.loads(pickle.dumps(reward))  # as it reaches a worker
    assert {answer: sent.compute(answer, ROW) for answer in by_answer} == by_answer


def test_a_schema_travels_with_its_reward(tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps({"type": "object", "properties": {"feet": {"type": "integer", "maximum": 9000}}}))
    holds, accurate = loaded(
        {"name": "json_schema", "json_schema": str(file)}, {"name": "field_accuracy", "json_schema": str(file)}
    )
    file.unlink()
    assert [holds.compute(answer, ROW) for answer in ('{"feet": 1}', '{"feet": 9999}', "{")] == [1, 0, 0]
    assert accurate.compute('{"city": "Kunming", "feet": 9999}', ROW) == 0, "it does not validate"
    assert "9000" in holds.content, "part of the data's digest"
    file.write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        loaded({"name": "json_schema", "json_schema": str(file)})


def test_rewards_are_added_by_weight() -> None:
    rewards = loaded({"name": "json", "weight": 2}, {"name": "length", "max_chars": 1, "weight": 0.5})
    assert total(rewards, [1.0, -1.0]) == 1.5


def test_a_row_without_gold_is_named_before_anything_starts() -> None:
    specs = SPECS.validate_python(("json", "field_accuracy"))
    check_rows(load_rewards(specs, TASK), specs, [ROW])
    with pytest.raises(DataError, match=r"row 'bare': gold: missing or empty"):
        check_rows(load_rewards(specs, TASK), specs, [ROW, DatasetRow("bare", ROW.messages)])


def brevity(answer: str, row: DatasetRow, *, per: float = 1.0) -> float:
    if answer == "broken":
        raise KeyError("city")
    return float("nan") if answer == "nan" else -len(answer) / per


def test_own_rewards_are_taken_by_name_and_stop_the_run_where_they_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    found = EntryPoints([EntryPoint("brevity", f"{__name__}:brevity", GROUP)])
    monkeypatch.setattr(plugins, "entry_points", lambda group: found.select(group=group))
    monkeypatch.setitem(sys.modules, __name__, SimpleNamespace(brevity=brevity))  # pytest imports it by path
    (mine,) = loaded({"name": "brevity", "params": {"per": 2.0}, "label": "short"})
    assert mine.compute("abc", ROW) == -1.5
    for answer, said in (("broken", r"reward 'short' of row 'r1': it raised KeyError"), ("nan", "it returned nan")):
        with pytest.raises(BadReward, match=said):
            mine.compute(answer, ROW)
    for name, near in (("brevty", "'brevity'"), ("jsn", "'json'"), ("zzz", "install its package")):
        with pytest.raises(ConfigError, match=f"name={name}: 0 entry points of this name") as caught:
            loaded({"name": name})
        assert near in caught.value.hint


def test_every_built_in_name_is_known() -> None:
    assert BUILT_IN == (
        "json",
        "json_schema",
        "format",
        "field_accuracy",
        "field_f1",
        "exact",
        "regex",
        "length",
        "reward_model",
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": {"kind": "grpo"}}, r"rewards"),
        ({"objective": {"kind": "grpo", "rewards": []}}, "rewards is empty"),
        ({"objective.generations": 1}, "greater than or equal to 2"),
        ({"objective.rewards": ["json", "json"]}, "two rewards are called 'json'"),
        ({"objective.rewards": [{"name": "json", "pattern": "x"}]}, "pattern"),
        ({"objective.rewards": [{"name": "regex", "pattern": "("}]}, "no regular expression"),
        ({"objective.rewards": [{"name": "json", "clip": [1, 0]}]}, "the lowest value comes first"),
        ({"objective.kind": "rloo", "objective.loss_type": "dapo"}, "loss_type=dapo is grpo's"),
        ({"objective.kind": "rloo", "objective.scale_rewards": "group"}, "rloo takes batch or none"),
        ({"adapter": {"kind": "prefix"}}, "does not train adapter.kind=prefix"),
        ({"adapter": {"kind": "full"}, "optim.lr": 1e-5}, "does not train adapter.kind=full"),
        ({"adapter.dropout": 0.1}, "adapter.dropout=0.1"),
        ({"objective.max_new_tokens": 512}, "leaves a prompt no room in max_length=512"),
        ({"objective.iterations": 3}, "checkpoint_every=20 must be a multiple of objective.iterations=3"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TASK.with_(changes)
