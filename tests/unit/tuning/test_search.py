"""Which points a sweep tries: from its spec, its seed and the trials so far alone, never one twice."""

import ast
import json
import math
import random
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.search import above_best, compared
from graftwork import config
from graftwork.errors import ConfigError
from graftwork.storage.store import RunPaths, Store
from graftwork.tuning.plan import search_of
from graftwork.tuning.search import Suggestion, Values, as_forecast, as_reported, at_furthest_step, digest
from graftwork.tuning.search_optuna import min_reports
from graftwork.tuning.search_space import decides_rows
from graftwork.tuning.spec import TuneSpec
from graftwork.tuning.trial_store import Ledger
from graftwork.tuning.trials import State, TrialRecord, pareto

TRAIN = {"name": "t", "base": "b", "data": {"train": "t.jsonl", "eval": "e.jsonl"}}
LR = {"kind": "loguniform", "low": 1e-4, "high": 1e-2}
SPACE: dict[str, Any] = {"optim.lr": LR, "adapter.rank": {"kind": "power_of_two", "low": 2, "high": 64}}
RANDOM, TPE, BOHB = {"kind": "random"}, {"kind": "tpe"}, {"kind": "bohb"}
Measure = Callable[[Values], float]


def sweep(space: Any = None, train: Any = None, **keys: Any) -> TuneSpec:
    given_space = {} if space is None else {"space": space}
    return config.validate(
        TuneSpec, {"name": "s", "train": {**TRAIN, **(train or {})}, **given_space, **keys}, where="s.yaml"
    )


def bowl(values: Any) -> float:
    """Lowest, 1, at a rate of 2.5e-3 and rank 16; the best rate is the same for all ranks."""
    rate, rank = math.log10(values["optim.lr"]), math.log2(values["adapter.rank"])
    return float(1 + (rate + 2.6) ** 2 + 0.02 * (rank - 4) ** 2)


def ended(values: Values, loss: float, steps: int = 12, **more: Any) -> TrialRecord:
    losses = tuple((step, loss + (12 - step) / 12) for step in range(4, steps + 1, 4))
    return TrialRecord(digest(values), values, losses, "finished" if steps == 12 else "stopped", steps, **more)


def played(spec: TuneSpec, loss: Measure = bowl, sizes: bool = False) -> list[TrialRecord]:
    """The whole sweep, one trial after the other."""
    search, trials = search_of(spec), list[TrialRecord]()
    while isinstance(chosen := search.suggest(trials), Suggestion):
        size = {"adapter_bytes": float(str(chosen.values.get("adapter.rank")))} if sizes else {}
        trials.append(ended(chosen.values, loss(chosen.values), metrics=size))
    return trials


def best(trials: Sequence[TrialRecord]) -> float:
    return min(trial.losses[-1][1] for trial in trials)


# What a suggestion depends on.


@pytest.mark.parametrize("search", [RANDOM, TPE, {**TPE, "multivariate": True}, BOHB], ids=str)
def test_a_sweep_that_goes_on_after_a_kill_chooses_as_it_would_have(search: dict[str, Any]) -> None:
    spec = sweep(SPACE, search=search, num_trials=12, seed=3)
    whole = played(spec)
    assert len({trial.trial_id for trial in whole}) == 12
    assert played(sweep(SPACE, search=search, num_trials=12, seed=4)) != whole
    for done in range(12):
        kept = [TrialRecord.from_json(json.loads(json.dumps(asdict(trial)))) for trial in whole[:done]]
        assert search_of(spec).suggest(kept) == Suggestion(whole[done].values)


def test_what_a_ledger_has_on_disk_is_all_that_a_search_needs(tmp_path: Path) -> None:
    """Killed while the sixth trial runs, the next driver runs that one again and goes on as if nothing had been."""
    run, spec = RunPaths(Store(str(tmp_path)), "s", "0" * 64), sweep(SPACE, search=TPE, num_trials=10)
    whole = [trial.values for trial in played(spec)]
    seen = []
    for ends in (5, 10):
        ledger = Ledger(run)
        ledger.resume()
        while isinstance(chosen := ledger.next(search_of(spec)), TrialRecord):
            seen.append(chosen.values)
            ledger.update(chosen.trial_id, state="running")
            if len(ledger.trials) > ends:
                break
            done = ended(chosen.values, bowl(chosen.values))
            ledger.update(chosen.trial_id, state=done.state, losses=done.losses, steps=done.steps)
    assert seen == whole[:6] + whole[5:]


def test_it_begins_with_the_points_of_a_random_search() -> None:
    drawn = played(sweep(SPACE, search=RANDOM, num_trials=8))
    modelled = played(sweep(SPACE, search={**TPE, "n_startup": 5}, num_trials=8))
    assert [trial.values for trial in modelled[:5]] == [trial.values for trial in drawn[:5]]
    assert all(mine.values != other.values for mine, other in zip(modelled[5:], drawn[5:], strict=True))


def test_values_can_be_typed_again() -> None:
    for trial in played(sweep(SPACE, search=TPE, num_trials=10)):
        rate, rank = (float(str(trial.values[key])) for key in SPACE)
        assert rate == float(f"{rate:.4g}")
        assert rank in (2, 4, 8, 16, 32, 64)


@pytest.mark.parametrize("search", [TPE, BOHB], ids=str)
def test_no_point_is_tried_twice_and_a_small_space_ends(search: dict[str, Any]) -> None:
    space: dict[str, Any] = {
        "adapter.rank": {"kind": "choice", "values": [4, 8, 16]},
        "seed": {"kind": "choice", "values": [0, 1]},
    }
    spec = sweep(space, search=search, num_trials=20)
    trials = played(spec, lambda values: float(str(values["adapter.rank"])))
    assert len({trial.trial_id for trial in trials}) == len(trials) == 6
    assert search_of(spec).total == 6
    assert search_of(spec).suggest(trials) is None


def test_a_range_without_another_number_ends_as_well() -> None:
    narrow = {"optim.lr": {"kind": "uniform", "low": 0.001, "high": 0.001002}}
    trials = played(sweep(narrow, search=TPE, num_trials=20), lambda values: 1.0)
    assert {trial.values["optim.lr"] for trial in trials} == {0.001, 0.001001, 0.001002}


def test_repeats_of_finalists_are_no_trials_of_the_search() -> None:
    spec = sweep(SPACE, search=TPE, num_trials=8)
    trials = played(spec)[:6]
    again = replace(trials[0], trial_id="again", values={**trials[0].values, "seed": 1}, repeat_of=trials[0].trial_id)
    assert search_of(spec).suggest([*trials, again]) == search_of(spec).suggest(trials)
    drawn = search_of(sweep(SPACE, search=RANDOM, num_trials=8))
    assert drawn.suggest([*trials, again]) == drawn.suggest(trials)


# What the trials teach.


def test_tpe_beats_random_on_a_bowl() -> None:
    found = {
        kind: [best(played(sweep(SPACE, search={"kind": kind}, num_trials=20, seed=seed))) - 1 for seed in range(10)]
        for kind in ("random", "tpe")
    }
    assert statistics.mean(found["tpe"]) < statistics.mean(found["random"]) / 2


def test_gp_finds_the_bowls_ground_in_a_dozen_trials_and_seeks_the_front_of_two_goals() -> None:
    """Optuna's GP imports torch, so both are one test."""
    trials = played(sweep(SPACE, search={"kind": "gp", "n_startup": 4}, num_trials=10, seed=1))
    assert best(trials) < 1.01 < best(played(sweep(SPACE, search=RANDOM, num_trials=10, seed=1)))
    two = sweep(SPACE, search={"kind": "gp"}, objectives=["eval_loss", "adapter_bytes"], num_trials=6)
    front = pareto(played(two, sizes=True), two.objectives)
    assert len(front) > 1


def test_with_two_goals_small_and_good_are_both_sought() -> None:
    """Of what a rank can reach, TPE reaches more than random: the loss above the bowl's, summed over the ranks."""

    def above(kind: str, seed: int) -> float:
        spec = sweep(SPACE, search={"kind": kind}, objectives=["eval_loss", "adapter_bytes"], num_trials=24, seed=seed)
        front = {
            int(str(trial.values["adapter.rank"])): trial.losses[-1][1]
            for trial in pareto(played(spec, sizes=True), spec.objectives)
        }
        reached = [min((loss for rank, loss in front.items() if rank <= limit), default=2.0) for limit in (2, 4, 8, 16)]
        return sum(reached) - sum(bowl({"optim.lr": 10**-2.6, "adapter.rank": limit}) for limit in (2, 4, 8, 16))

    tpe, drawn = ([above(kind, seed) for seed in range(6)] for kind in ("tpe", "random"))
    assert statistics.median(tpe) < statistics.median(drawn) / 2


def test_diverging_rates_are_left_alone() -> None:
    """Of trials that are equally good, only those above 3e-3 diverged: a quarter of the range."""
    trials = [ended({"optim.lr": rate, "adapter.rank": 8}, 1.0) for rate in (1.5e-4, 5e-4, 9e-4, 1.6e-3, 2.4e-3)]
    high = [
        TrialRecord(str(rate), {"optim.lr": rate, "adapter.rank": 8}, state="failed")
        for rate in (3.3e-3, 4e-3, 5e-3, 7e-3, 9e-3)
    ]
    for search in (TPE, BOHB):
        rates = []
        for seed in range(30):
            spec = sweep(
                SPACE, search={**search, **({"random_share": 0} if search == BOHB else {})}, seed=seed, num_trials=20
            )
            chosen = search_of(spec).suggest([*trials, *high])
            assert isinstance(chosen, Suggestion)
            rates.append(float(str(chosen.values["optim.lr"])))
        assert sum(rate > 3e-3 for rate in rates) <= 3


def test_a_running_trial_keeps_others_away() -> None:
    spec = sweep(SPACE, search=TPE, num_trials=30)
    trials = played(spec)[:10]
    seen = []
    for _ in range(8):
        chosen = search_of(spec).suggest(trials)
        assert isinstance(chosen, Suggestion)
        seen.append(digest(chosen.values))
        trials = [*trials, TrialRecord(seen[-1], chosen.values, state="running")]
    assert len(set(seen)) == 8


def test_what_was_stopped_ranks_behind_what_finished() -> None:
    trials = [ended({"a": 1}, 2.0), ended({"a": 2}, 0.1, steps=4), replace(ended({"a": 3}, 0.0), state="failed")]
    finished, stopped, failed = as_reported(trials)
    assert (finished.costs, stopped.costs, failed.costs) == ((2.0,), None, None)
    assert stopped.losses == trials[1].losses
    assert failed.losses == ()


def test_a_stopped_trial_is_taken_to_fall_on_as_the_finished_did() -> None:
    spec = sweep(SPACE, objectives=["eval_loss", "tokens"])
    trials = [
        TrialRecord("a", {}, ((4, 4.0), (8, 3.0), (12, 1.0)), "finished", 12, metrics={"tokens": 120.0}),
        TrialRecord("b", {}, ((4, 6.0),), "stopped", 4, metrics={"tokens": 44.0}),
        TrialRecord("c", {}, (), "failed"),
        TrialRecord("d", {}, ((4, 1.0),), "running", 4),
    ]
    whole, stopped, failed, running = as_forecast(trials, spec.objectives, 12)
    assert whole.costs == (1.0, 120.0)
    assert stopped.costs == (6.0 * 1.0 / 4.0, 44.0 * 3)
    assert failed.costs == (1.5, 132.0), "as bad as the worst"
    assert (running.costs, running.running) == (None, True)


def test_a_loss_far_off_does_not_hide_the_differences_of_the_good() -> None:
    trials = [ended({"a": number}, loss) for number, loss in enumerate((1.1, 1.2, 1.3, 1.5, 14.0))]
    losses = [outcome.costs[0] for outcome in as_forecast(trials, sweep(SPACE).objectives, 12) if outcome.costs]
    assert losses == [1.1, 1.2, 1.3, 1.5, pytest.approx(1.1 + 3 * 0.2)]


def test_the_benchmark_is_at_the_grids_best_once_all_points_are_tried() -> None:
    points: list[Values] = [
        {"adapter.rank": rank, "optim.lr": rate} for rank in (1, 4) for rate in (0.001, 0.002, 0.004)
    ]
    trials = [ended(values, bowl(values)) for values in points]
    for search in (RANDOM, TPE):
        found = above_best("ua-parse", trials, search, 0)
        assert len(found) == 6
        assert found == sorted(found, reverse=True)
        assert found[-1] == 0 < found[0]
    same = [[2.0, 1.0, 0.5], [1.0, 0.5, 0.0]]
    told = compared({"random": same * 5, "tpe": [[one - 0.4 for one in run] for run in same] * 5}, "tpe", 1)
    assert told["less"] == pytest.approx(0.4)
    assert (told["won"], told["lost"]) == (10, 0)
    assert 0 < told["low"] <= told["less"] <= told["high"]


def test_bohb_learns_at_the_furthest_step_that_enough_trials_reported_at() -> None:
    trials = [
        ended({"a": number}, float(number), steps=12 if number < 2 else 8 if number < 4 else 4) for number in range(6)
    ]
    losses = {step: at_furthest_step(trials, count) for step, count in ((12, 2), (8, 4), (4, 6), (0, 7))}
    assert losses[0] is None
    assert [outcome.costs for outcome in losses[12] or ()] == [(0.0,), (1.0,)]
    assert [outcome.costs for outcome in losses[8] or ()] == [(number + 4 / 12,) for number in range(4)]
    assert len(losses[4] or ()) == 6
    assert min_reports(sweep(SPACE)) == 5


def test_bohb_draws_its_share_at_random() -> None:
    """Told that one corner is good, the model stays near; what is drawn goes everywhere."""
    spec = sweep({"optim.lr": LR}, search=BOHB, num_trials=60)
    trials = played(spec, lambda values: 1 + abs(math.log10(float(str(values["optim.lr"]))) + 4))
    far = sum(float(str(trial.values["optim.lr"])) > 1e-3 for trial in trials[10:])
    assert 4 <= far <= 15, "half of a third of fifty is eight"


# Domains.


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"adapter.rank": {"kind": "power_of_two", "low": 3, "high": 16}}, "3 is no power of two; 2 is one, and 4"),
        ({"adapter.rank": {"kind": "power_of_two", "low": 16, "high": 16}}, "low=16 must be less than high=16"),
        ({"adapter.rank": {"kind": "power_of_two", "low": 64, "high": 1024}}, "adapter.rank=1024"),
        ({"adapter.rank": {"kind": "int", "low": 0, "high": 8}}, "adapter.rank=0"),
        ({"optim.rows_per_step": {"kind": "int", "low": 0, "high": 8, "log": True}}, "no place on a log scale"),
        ({"optim.lr": {"kind": "logunifrom", "low": 1, "high": 2}}, "did you mean 'loguniform'"),
        ({"optm.lr": LR}, "did you mean 'optim'"),
        ({"adapter.rank": {"kind": "choice", "values": ["eight"]}}, "whole number"),
        ({"objective.kind": {"kind": "choice", "values": ["sft", "cpt"]}}, "losses of different kinds"),
        ({"objective": {"kind": "choice", "values": [{"kind": "sft"}, {"kind": "dpo"}]}}, "kinds dpo, sft: losses of"),
        ({"seed": {"kind": "int", "low": 0, "high": 3}}, "list its values"),
        ({"strategy.kind": {"kind": "choice", "values": ["ddp"]}}, "one process"),
    ],
)
def test_a_domain_that_cannot_be_is_refused(space: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sweep(space)


def test_training_rows_are_not_searched_where_held_out_rows_are_a_share_of_them() -> None:
    space = {"data.train": {"kind": "choice", "values": ["a.jsonl", "b.jsonl"]}}
    with pytest.raises(ConfigError, match="train.data.eval=0.1, a share of it: trials are compared on the same"):
        sweep(space, {"data": {"train": "a.jsonl", "eval": 0.1}})
    assert sweep(space, {"data": {"train": "a.jsonl", "eval": "c.jsonl"}}).space


@pytest.mark.parametrize(
    ("space", "train"),
    [
        ({"adapter.targets": {"kind": "choice", "values": ["all-linear", "attention", "mlp"]}}, {}),
        ({"adapter.dropout": {"kind": "uniform", "low": 0, "high": 0.3}}, {}),
        ({"optim.micro_batch": {"kind": "power_of_two", "low": 1, "high": 8}}, {}),
        ({"optim.rows_per_step": {"kind": "int", "low": 2, "high": 64, "log": True}}, {"num_workers": 1}),
        ({"optim.schedule": {"kind": "choice", "values": ["constant", "linear", "cosine"]}}, {}),
        ({"quant.kind": {"kind": "choice", "values": ["nf4", "int8", "none"]}}, {}),
        ({"adapter.kind": {"kind": "choice", "values": ["lora", "ia3"]}}, {}),
        ({"adapter": {"kind": "choice", "values": [{"kind": "lora", "rank": 8}, {"kind": "ia3"}]}}, {}),
        ({"objective.beta": {"kind": "loguniform", "low": 0.01, "high": 1}}, {"objective": {"kind": "dpo"}}),
    ],
    ids=lambda value: next(iter(value), "-"),
)
def test_any_key_can_be_searched(space: dict[str, Any], train: dict[str, Any]) -> None:
    spec = sweep(
        {**space, "optim.warmup_ratio": {"kind": "uniform", "low": 0, "high": 0.2}}, train, num_trials=7, search=TPE
    )
    trials = played(spec, lambda values: random.Random(digest(values)).random())
    assert len({str(trial.values[next(iter(space))]) for trial in trials}) > 1
    assert len(trials) == 7
    assert not any(decides_rows(key) for key in space)


def test_without_a_space_the_rate_and_a_loras_rank_are_searched() -> None:
    assert set(sweep().space) == {"optim.lr", "adapter.rank"}
    kinds = ("lora", "full", "ia3", "prefix", "bottleneck")
    plain = {"quant": {"kind": "none"}, "optim": {"lr": 1e-4}}
    spaces = {kind: sweep(train={"adapter": {"kind": kind}, **plain}).space for kind in kinds}
    assert {kind for kind, space in spaces.items() if "adapter.rank" in space} == {"lora"}
    lora, full = (spaces[kind]["optim.lr"].samples() for kind in ("lora", "full"))
    assert [float(str(a)) / float(str(b)) for a, b in zip(lora, full, strict=True)] == pytest.approx([10] * 3)
    assert sweep().with_({"train.adapter": {"kind": "ia3"}}).space == spaces["ia3"], "it follows the adapter"
    with pytest.raises(ConfigError, match="space is empty"):
        sweep({})


def test_a_train_that_is_wrong_is_told_without_a_space() -> None:
    with pytest.raises(ConfigError, match="did you mean 'rank'") as caught:
        sweep(train={"adapter": {"rnk": 3}})
    assert "Also" not in str(caught.value), "the space that was not made for it is no mistake of its own"


def test_points_that_contradict_themselves_are_refused_where_all_are_known_and_drawn_again_elsewhere() -> None:
    kinds = {"adapter.kind": {"kind": "choice", "values": ["lora", "ia3"]}}
    ranks = {"adapter.rank": {"kind": "power_of_two", "low": 2, "high": 8}}
    for search in (RANDOM, TPE, BOHB, None):
        with pytest.raises(ConfigError, match=r"adapter.kind=ia3, adapter.rank=2(.|\n)*give whole parts"):
            search_of(sweep({**kinds, **ranks}, search=search))
    for search in (RANDOM, TPE, BOHB):
        trials = played(sweep({**kinds, **ranks, "optim.lr": LR}, search=search, num_trials=12), bowl)
        assert {trial.values["adapter.kind"] for trial in trials} == {"lora"}
    doubled = {
        "quant.double_quant": {"kind": "choice", "values": [True]},
        "quant.kind": {"kind": "choice", "values": ["none", "int8"]},
        "optim.lr": LR,
    }
    with pytest.raises(ConfigError, match="200 points drawn in a row contradict themselves"):
        search_of(sweep(doubled, search=TPE))


def test_bohb_seeks_one_goal() -> None:
    with pytest.raises(ConfigError, match=r"bohb optimizes one objective, the held-out loss(.|\n)*take search"):
        search_of(sweep(SPACE, search=BOHB, objectives=["eval_loss", "wall_s"]))


NUMBERS = st.floats(1e-6, 0.4)
DOMAINS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "optim.lr": st.tuples(NUMBERS, NUMBERS)
    .filter(lambda ends: ends[0] < ends[1])
    .map(lambda ends: {"kind": "loguniform", "low": ends[0], "high": ends[1]}),
    "adapter.dropout": st.tuples(NUMBERS, NUMBERS)
    .filter(lambda ends: ends[0] < ends[1])
    .map(lambda ends: {"kind": "uniform", "low": ends[0], "high": ends[1]}),
    "adapter.rank": st.tuples(st.integers(0, 3), st.integers(4, 8)).map(
        lambda powers: {"kind": "power_of_two", "low": 2 ** powers[0], "high": 2 ** powers[1]}
    ),
    "optim.rows_per_step": st.tuples(st.integers(1, 9), st.integers(10, 90), st.booleans()).map(
        lambda given: {"kind": "int", "low": given[0], "high": given[1], "log": given[2]}
    ),
    "optim.micro_batch": st.lists(st.integers(1, 64), min_size=1, unique=True).map(
        lambda values: {"kind": "choice", "values": values}
    ),
    "quant": st.just({"kind": "choice", "values": [{"kind": "nf4", "double_quant": True}, {"kind": "none"}]}),
}


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_every_point_of_every_space_is_a_spec(data: st.DataObject) -> None:
    keys = data.draw(st.lists(st.sampled_from(sorted(DOMAINS)), min_size=1, unique=True))
    space = {key: data.draw(DOMAINS[key]) for key in keys}
    search = data.draw(st.sampled_from([RANDOM, TPE, {**TPE, "multivariate": True}, BOHB]))
    spec = sweep(space, {"num_workers": 1}, search=search, num_trials=9, seed=data.draw(st.integers(0, 9)))
    states: list[State] = data.draw(
        st.lists(st.sampled_from(["finished", "stopped", "failed", "running"]), min_size=9, max_size=9)
    )
    trials: list[TrialRecord] = []
    while isinstance(chosen := search_of(spec).suggest(trials), Suggestion):
        spec.train.with_(chosen.values)
        record = ended(chosen.values, data.draw(st.floats(0, 9)))
        state: State = states[len(trials)]
        losses = {"finished": record.losses, "stopped": record.losses[:1]}.get(state, ())
        trials.append(replace(record, state=state, losses=losses))
    assert len({trial.trial_id for trial in trials}) == len(trials) == search_of(spec).total


def test_optuna_says_nothing_and_waits_until_it_is_asked(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        played(sweep(SPACE, search={**TPE, "multivariate": True}, num_trials=6))
    assert capfd.readouterr() == ("", "")
    for path in (Path(__file__).parents[3] / "tuning").rglob("*.py"):
        at_import = ast.parse(path.read_text()).body
        names = [alias.name for node in at_import if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in at_import if isinstance(node, ast.ImportFrom)]
        assert not [name for name in names if name.split(".")[0] == "optuna"], path
