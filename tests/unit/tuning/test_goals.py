"""Objectives of a sweep: the known metrics, a trial's values, the Pareto front."""

import json
from pathlib import Path
from typing import Any

import pytest

from graftwork import config
from graftwork.errors import BaseModelError, ConfigError
from graftwork.training.worker_messages import StepReport
from graftwork.tuning.run import check
from graftwork.tuning.search_space import METRICS, Goal
from graftwork.tuning.spec import TuneSpec
from graftwork.tuning.trials import Costs, State, TrialRecord, pareto, value_of
from tests.training import task

SPACE = {"adapter.rank": {"kind": "choice", "values": [2, 8]}}
LOSS, BYTES = Goal(), Goal(metric="adapter_bytes")


def sweep(train: Any, **keys: Any) -> TuneSpec:
    return config.validate(TuneSpec, {"name": "s", "train": train, "space": SPACE, **keys}, where="s.yaml")


def trial(name: str, loss: float, size: float, state: State = "finished", **more: Any) -> TrialRecord:
    return TrialRecord(name, {"seed": name}, ((4, loss),), state, 4, metrics={"adapter_bytes": size}, **more)


@pytest.mark.parametrize(
    ("objectives", "said"),
    [
        (["eval_loss", "adapter_byte"], "no trial reports it(.|\n)*a trial reports eval_loss,(.|\n)*'adapter_bytes'"),
        (["adapter_bytes"], r"write objectives: \[eval_loss, adapter_bytes\]"),
        ([{"metric": "eval_loss", "direction": "max"}], r"the first is eval_loss \(max\)"),
        (["eval_loss", "wall_s", "wall_s"], "objectives must differ"),
        ([], "at least 1 item"),
    ],
)
def test_a_goal_that_nobody_can_reach_is_refused(objectives: list[Any], said: str) -> None:
    train = {"name": "t", "base": "b", "data": {"train": "t.jsonl", "eval": "e.jsonl"}}
    with pytest.raises(ConfigError, match=said):
        sweep(train, objectives=objectives)


def test_goals_are_named_by_their_metric_alone() -> None:
    train = {"name": "t", "base": "b", "data": {"train": "t.jsonl", "eval": "e.jsonl"}}
    assert sweep(train).objectives == (LOSS,)
    assert sweep(train, objectives=["eval_loss", "adapter_bytes"]).objectives == (LOSS, BYTES)


def test_a_size_for_a_goal_is_refused_on_a_base_whose_layers_are_not_known(tmp_path: Path) -> None:
    train = task(tmp_path).model_dump(mode="json", exclude_unset=True)
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "unknown_layers"}))
    with pytest.raises(BaseModelError, match="unknown_layers"):
        check(sweep({**train, "eval_every": 20}, objectives=["eval_loss", "adapter_bytes"]))


def test_the_front_is_what_no_other_trial_beats_in_every_goal() -> None:
    small, good, both_worse, tied = trial("a", 2.0, 10), trial("b", 1.0, 40), trial("c", 2.5, 20), trial("d", 1.0, 40)
    short, diverged = trial("e", 0.5, 5, state="stopped"), trial("f", 0.1, 1, state="failed")
    again = trial("g", 0.1, 1, repeat_of="a")
    unknown = TrialRecord("h", {}, ((4, 0.1),), "finished", 4)
    trials = (small, good, both_worse, tied, short, diverged, again, unknown)
    assert pareto(trials, (LOSS, BYTES)) == (small, good, tied)
    assert pareto(trials[:3], (LOSS,)) == (good,)
    largest = Goal(metric="adapter_bytes", direction="max")
    assert pareto(trials[:3], (largest,)) == (good,)
    assert pareto((), (LOSS,)) == ()


def test_the_value_of_a_goal_is_that_of_the_last_report() -> None:
    record = TrialRecord("a", {}, ((2, 3.0), (4, 1.5)), "running", 4, wall_s=7.5, metrics={"tokens": 90.0})
    values = {name: value_of(record, Goal(metric=name)) for name in METRICS}
    assert values == {
        "eval_loss": 1.5,
        "wall_s": 7.5,
        "tokens": 90.0,
        "peak_rss_bytes": 0.0,
        "trained_parameters": None,
        "adapter_bytes": None,
        "step_s": None,
    }
    assert value_of(TrialRecord("b", {}, wall_s=3.0), Goal(metric="wall_s")) is None, "nothing was reported yet"


def test_costs_are_those_of_the_adapter_and_of_all_steps(tmp_path: Path) -> None:
    costs = Costs(task(tmp_path, **{"adapter.rank": 2}))
    for step, took in ((1, 0.4), (2, 0.2)):
        costs.add(StepReport(step, 8, 2.0, 1e-3, 1.0, tokens=50 * step, elapsed_s=1.0, step_s=took))
    larger = Costs(task(tmp_path, **{"adapter.rank": 8})).metrics()
    found = costs.metrics()
    assert found["tokens"] == 100.0
    assert found["step_s"] == pytest.approx(0.3)
    assert found["adapter_bytes"] == 4 * found["trained_parameters"] > 0
    assert larger["adapter_bytes"] == 4 * found["adapter_bytes"], "a LoRA's size goes with its rank"
