"""What a sweep tries, what it refuses, and which trial it chooses."""

import json
from pathlib import Path
from typing import Any

import pytest

from graftwork import config
from graftwork.errors import ConfigError, RunError
from graftwork.storage.store import RunPaths, Store
from graftwork.tuning.early_stopping import AshaSpec, stopping_rule
from graftwork.tuning.finals import choose
from graftwork.tuning.plan import expected_share, search_of
from graftwork.tuning.run import check
from graftwork.tuning.search import FixedPoints, digest, grid_size
from graftwork.tuning.spec import TuneSpec
from graftwork.tuning.trial_store import Ledger
from graftwork.tuning.trials import State, TrialRecord, TuneProgress
from tests.training import task

LR = {"optim.lr": {"kind": "loguniform", "low": 1e-4, "high": 1e-2}}
GRID = {"adapter.rank": {"kind": "choice", "values": [4, 8]}, "seed": {"kind": "choice", "values": [0, 1, 2]}}


def sweep(space: dict[str, Any], **keys: Any) -> TuneSpec:
    train = {"name": "t", "base": "b", "data": {"train": "t.jsonl", "eval": "e.jsonl"}}
    return config.validate(TuneSpec, {"name": "s", "train": train, "space": space, **keys}, where="s.yaml")


def draw(spec: TuneSpec) -> FixedPoints:
    search = search_of(spec)
    assert isinstance(search, FixedPoints)
    return search


# What is tried.


def test_a_small_grid_is_taken_whole_in_order() -> None:
    drawn = draw(sweep(GRID, num_trials=6))
    assert drawn.reason.startswith("grid: ")
    assert [tuple(point.values()) for point in drawn.points] == [(4, 0), (4, 1), (4, 2), (8, 0), (8, 1), (8, 2)]
    assert "all 6 combinations" in drawn.reason


def test_a_larger_grid_is_sampled_without_repeats() -> None:
    drawn = draw(sweep(GRID, num_trials=5))
    assert drawn.reason.startswith("random: ")
    assert len({digest(point) for point in drawn.points}) == 5
    assert drawn.reason == "random: 5 of 6 combinations by seed 0"


def test_the_seed_decides_the_points_and_more_trials_keep_the_first() -> None:
    few, many = (draw(sweep(LR, num_trials=count, search={"kind": "random"})).points for count in (3, 10))
    assert many[:3] == few
    assert draw(sweep(LR, num_trials=3, seed=1)).points != few


def test_log_uniform_values_spread_evenly_over_the_decades() -> None:
    values = [
        float(str(point["optim.lr"])) for point in draw(sweep(LR, num_trials=400, search={"kind": "random"})).points
    ]
    assert all(1e-4 <= value <= 1e-2 for value in values)
    low = sum(value < 1e-3 for value in values)
    assert 160 < low < 240, "half of the points in the lower decade, within four standard deviations"
    assert all(value == float(f"{value:.4g}") for value in values), "they can be typed again"


def test_a_range_has_no_grid() -> None:
    assert grid_size(sweep(LR).space) is None
    assert grid_size(sweep(GRID).space) == 6


# What is refused.


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"space": {}}, "space is empty"),
        ({"space": {"adapter.rnk": {"kind": "choice", "values": [4]}}}, "did you mean 'rank'"),
        ({"space": {"adapter.rank": {"kind": "choice", "values": [4, 0]}}}, "adapter.rank=0"),
        ({"space": {"adapter.rank": {"kind": "uniform", "low": 4, "high": 16}}}, "whole number"),
        ({"space": {"optim.lr": {"kind": "loguniform", "low": 0, "high": 1}}}, "greater than 0"),
        ({"space": {"optim.lr": {"kind": "uniform", "low": 2, "high": 1}}}, "low=2 must be less than high=1"),
        ({"space": {"optim.lr": {"kind": "uniform", "low": 1, "high": "inf"}}}, "finite"),
        ({"space": {"seed": {"kind": "choice", "values": [1, 1]}}}, "values must differ"),
        ({"space": {"num_workers": {"kind": "choice", "values": [1, 2]}}}, "num_workers cannot take effect"),
        ({"space": {"optim.epochs": {"kind": "choice", "values": [1, 2]}}}, "steps of the sweep takes its place"),
        ({"space": {"data.eval": {"kind": "choice", "values": ["a", "b"]}}}, "the same held-out rows"),
        (
            {"space": {"adapter": {"kind": "choice", "values": [{"rank": 4}]}, "adapter.rank": GRID["adapter.rank"]}},
            "overlap",
        ),
        ({"scheduler": {"grace_steps": 12}}, "grace_steps=12 must be less than steps=12"),
        ({"report_every": 13}, "no report would come"),
        ({"train": {"name": "t", "base": "b", "data": {"train": "t.jsonl"}}}, "train.data.eval is not given"),
        ({"numtrials": 3}, "did you mean 'num_trials'"),
    ],
)
def test_a_sweep_that_cannot_work_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sweep(**{"space": GRID, **change})


def test_values_that_contradict_each_other_are_refused_before_the_first_trial() -> None:
    space = {
        "quant": {"kind": "choice", "values": [{"kind": "nf4"}, {"kind": "none"}]},
        "quant.double_quant": {"kind": "choice", "values": [True]},
    }
    with pytest.raises(ConfigError, match="overlap"):
        sweep(space)
    apart = {
        "quant.kind": {"kind": "choice", "values": ["nf4", "none"]},
        "quant.double_quant": {"kind": "choice", "values": [True]},
    }
    with pytest.raises(ConfigError, match="double_quant cannot take effect with kind='none'"):
        draw(sweep(apart))


# Which trial is chosen.


def trial(name: str, state: State, *losses: float, error: str | None = None) -> TrialRecord:
    steps = tuple((4 * (place + 1), loss) for place, loss in enumerate(losses))
    return TrialRecord(name, {"seed": name}, steps, state, steps[-1][0] if steps else 0, error=error)


def test_a_stopped_trial_cannot_win() -> None:
    trials = [trial("a", "finished", 3.0, 2.0), trial("b", "stopped", 1.0), trial("c", "finished", 3.5, 1.9)]
    assert choose(sweep(GRID), trials).trial_id == "c"


def test_equal_losses_take_the_earlier_trial() -> None:
    assert choose(sweep(GRID), [trial("a", "finished", 2.0), trial("b", "finished", 2.0)]).trial_id == "a"


def test_without_a_finished_trial_there_is_no_best() -> None:
    with pytest.raises(RunError, match="none ran to step 12: 1 stopped, 1 failed; first error: out of memory"):
        choose(sweep(GRID), [trial("a", "stopped", 1.0), trial("b", "failed", error="out of memory")])


def test_progress_names_the_best_at_the_furthest_step() -> None:
    trials = (
        trial("a", "running", 3.0),
        trial("b", "running", 3.1, 2.0),
        trial("c", "failed", 0.1),
        trial("d", "pending"),
    )
    progress = TuneProgress(trials, 4, 1.0)
    assert (progress.done, progress.total) == (1, 4)
    assert progress.text == "best so far 2.000 at step 8 (seed=b)"


# What survives.


def test_a_ledger_forgets_only_what_must_run_again(tmp_path: Path) -> None:
    run = RunPaths(Store(str(tmp_path)), "s", "0" * 64)
    search = draw(sweep(GRID, num_trials=6))
    ledger = Ledger(run)
    for state in ("finished", "stopped", "running", "failed"):
        chosen = ledger.next(search)
        assert isinstance(chosen, TrialRecord)
        ledger.update(chosen.trial_id, state=state, losses=((4, 2.5),), steps=4)
    again = Ledger(run)
    again.resume()
    assert [record.state for record in again.trials] == ["finished", "stopped", "pending", "pending"]
    assert again.trials[0] == ledger.trials[0]
    started = []
    while isinstance(chosen := again.next(search), TrialRecord):
        again.update(chosen.trial_id, state="running")
        started.append(chosen.trial_id)
    assert chosen is None
    assert started == [digest(point) for point in search.points[2:]], "what did not end first, then what is new"
    again.resume(failed_too=True)
    assert [record.state for record in again.trials] == ["finished", "stopped"] + ["pending"] * 4


def test_a_judge_remembers_the_trials_of_an_interrupted_sweep() -> None:
    """A new trial that two of three past ones beat at the first rung is stopped, as it would be without a break."""
    spec = sweep(GRID, scheduler={"grace_steps": 4, "reduction": 2})
    past = [trial("a", "finished", 2.0, 1.5, 1.0), trial("b", "stopped", 4.0), trial("c", "stopped", 5.0)]
    judge = stopping_rule(spec, past)
    assert judge.reason_to_stop("bad", 4, 4.5)
    assert judge.reason_to_stop("good", 4, 1.9) is None


def test_the_median_rule_stops_what_is_worse_than_most() -> None:
    judge = stopping_rule(sweep(GRID, scheduler={"kind": "median", "grace_steps": 4, "min_trials": 2}), [])
    for name, loss in (("a", 2.2), ("b", 2.1), ("c", 2.0)):
        assert judge.reason_to_stop(name, 4, loss) is None
        assert judge.reason_to_stop(name, 8, loss) is None
    assert judge.reason_to_stop("bad", 8, 4.0)
    assert judge.reason_to_stop("good", 8, 1.0) is None


def test_the_plan_counts_the_steps_that_early_stopping_leaves() -> None:
    assert AshaSpec(grace_steps=2, reduction=2).rungs(8) == (2, 4)
    spec = sweep(GRID, num_trials=8, steps=8, scheduler={"grace_steps": 2, "reduction": 2}, report_every=2)
    assert expected_share(spec, 8) == (8 * 2 + 4 * 2 + 2 * 4) / 64
    assert expected_share(sweep(GRID, scheduler=None), 8) == 1.0


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[3] / "examples").glob("tune*.yaml")), ids=lambda p: p.name
)
def test_an_example_is_a_short_valid_spec(path: Path) -> None:
    assert isinstance(config.load(path, expect="tune"), TuneSpec)
    assert len(path.read_text().splitlines()) < 60


def test_rows_that_are_too_long_are_said_before_a_sweep(tmp_path: Path) -> None:
    train = task(tmp_path, max_length=512).model_dump(mode="json", exclude_unset=True)
    held_out = tmp_path / "eval.jsonl"
    lines = [json.loads(line) for line in held_out.read_text().splitlines()]
    for line in lines[:3]:
        line["messages"][-1]["content"] = "red " * 512
    held_out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = config.validate(TuneSpec, {"name": "s", "train": {**train, "eval_every": 20}, "space": GRID}, "s.yaml")
    assert "3 of 8 held-out rows left out: longer than max_length=512" in check(asked)
