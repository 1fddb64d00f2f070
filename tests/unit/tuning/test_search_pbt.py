"""Population based training: what follows each generation, and the learning rate that it asks for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graftwork import config
from graftwork.errors import ConfigError
from graftwork.storage.store import RunPaths, Store
from graftwork.training.lr_schedule import factor_at, scale
from graftwork.training.spec import TrainSpec
from graftwork.tuning.plan import search_of
from graftwork.tuning.search import Suggestion, Wait
from graftwork.tuning.search_pbt import PbtSearch, finished_trials
from graftwork.tuning.spec import TuneSpec
from graftwork.tuning.trial_store import Ledger
from graftwork.tuning.trials import TrialRecord

LR = {"optim.lr": {"kind": "loguniform", "low": 1e-4, "high": 1e-2}}


def sweep(**keys: Any) -> TuneSpec:
    train = {"name": "t", "base": "b", "data": {"train": "t.jsonl", "eval": "e.jsonl"}}
    given = {"name": "s", "train": train, "space": LR, "steps": 12, "report_every": 2}
    search = {"kind": "pbt", "population": 4, "every": 4, **keys.pop("search", {})}
    return config.validate(TuneSpec, {**given, "search": search, **keys}, where="s.yaml")


def searched(spec: TuneSpec) -> PbtSearch:
    search = search_of(spec)
    assert isinstance(search, PbtSearch)
    return search


def run_all(spec: TuneSpec, folder: Path, losses: Any) -> Ledger:
    """The whole sweep without training: `losses(number, record)` is a segment's last loss, None for a failed one."""
    ledger, search = Ledger(RunPaths(Store(str(folder)), "s", "0" * 64)), searched(spec)
    while isinstance(record := ledger.next(search), TrialRecord):
        loss = losses(len(ledger.trials) - 1, record)
        state = "failed" if loss is None else "finished" if record.until == spec.steps else "stopped"
        seen = () if loss is None else ((record.until, loss),)
        ledger.update(record.trial_id, state=state, steps=record.until, losses=seen)
    return ledger


def test_a_generation_is_the_barrier_of_the_next() -> None:
    search = searched(sweep())
    assert (search.generations, search.total) == (3, 12)
    assert search.reason.startswith("pbt: 4 members in 3 segments of 4 steps by seed 0")
    trials: list[TrialRecord] = []
    for number in range(4):
        chosen = search.suggest(trials)
        assert chosen == Suggestion(search.points[number], until=4)
        trials.append(TrialRecord(str(number), search.points[number], state="running", until=4))
    assert isinstance(search.suggest(trials), Wait)


def test_the_worst_goes_on_from_the_best_with_another_rate(tmp_path: Path) -> None:
    ledger = run_all(sweep(), tmp_path, lambda number, _: [3.0, 1.0, 9.0, 2.0][number % 4])
    first, second, third = (ledger.trials[at : at + 4] for at in (0, 4, 8))
    assert [trial.parent for trial in second] == [first[at].trial_id for at in (0, 1, 1, 3)]
    assert second[0].values == first[0].values, "those that are kept go on as they were"
    assert second[2].values["optim.factors"] in ([[0.333333333, 0.8]], [[0.333333333, 1.25]])
    assert second[2].values["optim.lr"] == first[1].values["optim.lr"]
    assert [trial.until for trial in third] == [12] * 4
    best = min(third, key=lambda trial: trial.losses[-1])
    assert best.state == "finished"
    whole = sweep().train.with_(best.values)
    assert whole.optim.lr == best.values["optim.lr"], "the best member's values are those of one run"


def test_a_member_that_failed_is_replaced_and_one_alive_is_enough(tmp_path: Path) -> None:
    ledger = run_all(sweep(), tmp_path, lambda number, _: 1.0 if number % 4 == 2 else None)
    only = ledger.trials[2]
    assert [trial.parent for trial in ledger.trials[4:8]] == [only.trial_id] * 4
    factors = [trial.values.get("optim.factors") for trial in ledger.trials[4:8]]
    assert factors[2] is None
    assert len({str(one) for one in factors}) == 4, "no two are alike"
    assert len(run_all(sweep(), tmp_path / "none", lambda *_: None).trials) == 4, "without any there is no next"


@pytest.mark.parametrize("seed", range(5))
def test_ids_differ_and_a_resumed_sweep_goes_on_alike(seed: int, tmp_path: Path) -> None:
    spec = sweep(seed=seed, search={"population": 8, "quantile": 0.5})

    def losses(number: int, record: TrialRecord) -> float | None:
        return None if number % 7 == 3 else float(int(record.trial_id, 16) % 100)

    whole = run_all(spec, tmp_path, losses)
    assert len(whole.trials) == 24, "the ledger refuses an id that was there before"
    search = searched(spec)
    for count in range(8, 24):
        chosen = search.suggest(whole.trials[:count])
        if isinstance(chosen, Suggestion):
            assert (chosen.values, chosen.parent) == (whole.trials[count].values, whole.trials[count].parent)


def test_checkpoints_are_kept_as_long_as_someone_may_begin_from_them(tmp_path: Path) -> None:
    trials = run_all(sweep(), tmp_path, lambda number, _: float(number)).trials
    ids = [trial.trial_id for trial in trials]
    assert finished_trials(trials[:4]) == set()
    running = TrialRecord("r", {}, state="running", until=8)
    assert finished_trials((*trials[:7], running)) == set(), "one of the second generation is at work"
    assert finished_trials(trials[:8]) == set(ids[:4])
    assert finished_trials(trials) == set(ids[:8])
    assert finished_trials([TrialRecord("a", {}, state="stopped"), TrialRecord("b", {}, state="running")]) == {"a"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"search": {"every": 5}}, "search.every=5 must divide steps=12"),
        ({"search": {"every": 12}}, "at least two segments"),
        ({"report_every": 3}, "search.every=4 must be a multiple of report_every=3"),
        ({"scheduler": {"kind": "asha"}, "report_every": 4}, "scheduler.kind=asha can't go with search.kind=pbt"),
        ({"search": {"factors": [1.0, 2.0]}}, "factors must differ, from 1 too"),
        ({"share_base": 2}, "share_base=2 can't go with search.kind=pbt"),
        (
            {"space": {**LR, "optim.factors": {"kind": "choice", "values": [[[0.5, 0.8]], []]}}},
            "optim.factors can't go with search.kind=pbt",
        ),
        ({"finals": {"finalists": 9}}, "finals.finalists=9: search.population="),
    ],
)
def test_a_population_that_cannot_work_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sweep(**change)


def test_members_need_points_of_their_own() -> None:
    with pytest.raises(ConfigError, match="search.population=4: the space has 2 points"):
        searched(sweep(space={"optim.lr": {"kind": "choice", "values": [0.1, 0.2]}}))


def test_a_schedule_is_found_that_beats_the_best_constant_rate() -> None:
    """SGD with noisy gradients on 64 curvatures from 1 to .01, which wants a rate that falls; equal steps, 10 seeds."""
    curvature_D, factors, steps = np.logspace(0, -2, 64), [0.5, 2.0], 200

    def trained(weights_D: Any, values: Any, since: int, until: int, seed: int) -> Any:
        rng = np.random.default_rng([seed, until])  # all members see the same rows
        for done in range(since, until):
            rate = values["optim.lr"] * factor_at(values.get("optim.factors", ()), done, steps)
            weights_D = weights_D - rate * (curvature_D * weights_D + rng.normal(0, 0.3, 64))
        return weights_D

    def loss(weights_D: Any) -> float:
        return 0.5 * float((curvature_D * weights_D**2).sum())

    def against_constant(seed: int) -> float:
        space = {"optim.lr": {"kind": "loguniform", "low": 0.02, "high": 1.8}}
        search = searched(sweep(seed=seed, steps=steps, space=space, search={"every": 20, "factors": factors}))
        weights: dict[str | None, Any] = {None: np.ones(64)}
        trials: list[TrialRecord] = []
        while isinstance(chosen := search.suggest(trials), Suggestion):
            assert chosen.until is not None
            name, since = str(len(trials)), chosen.until - 20
            weights[name] = trained(weights[chosen.parent], chosen.values, since, chosen.until, seed)
            seen = ((chosen.until, loss(weights[name])),)
            trials.append(TrialRecord(name, chosen.values, seen, "stopped", until=chosen.until))
        alone = []
        for values in search.points:
            weights_D = weights[None]
            for since in range(0, steps, 20):
                weights_D = trained(weights_D, values, since, since + 20, seed)
            alone.append(loss(weights_D))
        return min(trial.losses[-1][1] for trial in trials[-4:]) / min(alone)

    ratios = [against_constant(seed) for seed in range(10)]
    assert sum(ratio < 1 for ratio in ratios) >= 9, ratios


# The learning rate.


def test_factors_hold_from_their_share_of_the_steps_on() -> None:
    factors = ((0.25, 2.0), (0.5, 0.5))
    assert [factor_at(factors, done, 8) for done in range(8)] == [1, 1, 2, 2, 0.5, 0.5, 0.5, 0.5]
    assert [factor_at(factors, done, 4) for done in range(4)] == [1, 2, 0.5, 0.5], "on any budget"


@pytest.mark.parametrize(
    ("optim", "said"),
    [
        ({"factors": [[0.5, 1.0], [0.5, 2.0]]}, "shares must rise"),
        ({"factors": [[1.0, 0.5]]}, "from 0 to less than 1"),
        ({"factors": [[0.5, 0.0]]}, "must be greater than 0"),
    ],
)
def test_factors_that_cannot_be_followed_are_refused(optim: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config.validate(TrainSpec, {"name": "t", "base": "b", "data": {"train": "t"}, "optim": optim}, where="t.yaml")


def test_a_run_without_factors_is_the_run_that_it_was() -> None:
    spec = sweep().train
    assert "factors" not in spec.recipe()["optim"]
    assert spec.with_({"optim.factors": [[0.5, 2.0]]}).recipe() != spec.recipe()


def test_a_rate_from_a_checkpoint_follows_the_new_factors() -> None:
    """torch's own LambdaLR with the product of both is the reference."""
    factors = ((0.5, 0.1),)

    def stepped(lambda_of: Any, state: Any = None, then: int = 0) -> tuple[list[float], Any]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda_of)
        if state is not None:
            optimizer.load_state_dict(state[0])
            scheduler.load_state_dict(state[1])
            scale(optimizer, scheduler, factors, 8)
        seen = []
        for _ in range(then):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return seen, (optimizer.state_dict(), scheduler.state_dict())

    before, state = stepped(lambda done: 1 - done / 8, then=4)
    after, _ = stepped(lambda done: 1 - done / 8, state, then=4)
    reference, _ = stepped(lambda done: (1 - done / 8) * factor_at(factors, done, 8), then=8)
    assert before + after == pytest.approx(reference, rel=1e-12)
