"""Which finalist is taken, and how often the verdict is wrong, over simulated sweeps and against scipy."""

import functools
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from graftwork import config, stats
from graftwork.artifacts import publish as artifact
from graftwork.artifacts.manifest import aliases, roll_back
from graftwork.cli.tune import show, sweep_json
from graftwork.environment import Speed
from graftwork.errors import ConfigError, RunError
from graftwork.planning.hardware import GIB, Machine
from graftwork.planning.memory import RowSizes
from graftwork.storage.store import RunPaths, Store
from graftwork.training.evaluation.spec import RetentionSpec
from graftwork.training.planning.plan import RAY_TUNE_START_S
from graftwork.tuning.finals import WithFinals, choose, repeated, seeds_of, with_finals
from graftwork.tuning.plan import plan_tuning, search_of
from graftwork.tuning.report import SweepEnd, sweep_record
from graftwork.tuning.search import Suggestion, Wait, digest, grid
from graftwork.tuning.spec import TuneSpec
from graftwork.tuning.trial_store import Ledger
from graftwork.tuning.trials import SearchDecision, State, TrialRecord, TuneReport
from graftwork.tuning.winner import WinnerRecord, move, winner_spec
from tests.adapters import facts, write_adapter
from tests.shapes import SMOLLM2

RANKS = {"adapter.rank": {"kind": "choice", "values": [2, 4, 8, 16, 32]}}


def sweep(**keys: Any) -> TuneSpec:
    train = {"name": "t", "base": "b", "data": {"train": "t.jsonl", "eval": "e.jsonl"}, "seed": 7}
    given = {"name": "s", "train": train, "space": RANKS, "num_trials": 5, "finals": {}, "steps": 4, "scheduler": None}
    return config.validate(TuneSpec, {**given, **keys}, where="s.yaml")


@functools.cache
def trial_id(rank: int, seed: int | None = None) -> str:
    return digest({"adapter.rank": rank} if seed is None else {"adapter.rank": rank, "seed": seed})


def trial(rank: int, loss: float, state: State = "finished", **more: Any) -> TrialRecord:
    metrics = {"trained_parameters": 1e5 * rank, "step_s": 1.0}
    return TrialRecord(trial_id(rank), {"adapter.rank": rank}, ((4, loss),), state, 4, metrics=metrics, **more)


def repeats(first: TrialRecord, *losses: float) -> list[TrialRecord]:
    """The runs of a trial with the seeds that follow 7."""
    rank = int(str(first.values["adapter.rank"]))
    return [
        replace(
            first,
            trial_id=trial_id(rank, seed),
            values=repeated(first.values, seed),
            losses=((4, loss),),
            repeat_of=first.trial_id,
        )
        for seed, loss in enumerate(losses, 8)
    ]


def taken(spec: TuneSpec, *runs: tuple[int, tuple[float, ...]]) -> tuple[int, SearchDecision]:
    """The rank that is taken when each (rank, losses by seed) ran."""
    searched = [trial(rank, losses[0]) for rank, losses in runs]
    again = (repeats(first, *losses[1:]) for first, (_, losses) in zip(searched, runs, strict=True))
    found = choose(spec, [*searched, *itertools.chain.from_iterable(again)])
    return next(rank for rank, _ in runs if trial_id(rank) == found.trial_id), found


# What runs.


def test_the_best_run_again_seed_by_seed_once_the_search_has_ended() -> None:
    spec = sweep(finals={"finalists": 2, "repeats": 3})
    search = with_finals(spec, search_of(spec))
    trials: list[TrialRecord] = []
    for place in range(5):
        chosen = search.suggest(trials)
        assert isinstance(chosen, Suggestion)
        assert chosen.repeat_of is None
        trials.append(trial(int(str(chosen.values["adapter.rank"])), 1.0 + place))
    assert isinstance(search.suggest([*trials[:4], replace(trials[4], state="running")]), Wait)
    for _ in range(4):
        chosen = search.suggest(trials)
        assert isinstance(chosen, Suggestion)
        record = TrialRecord(digest(chosen.values), chosen.values, repeat_of=chosen.repeat_of, state="running")
        trials.append(record)
    assert search.suggest(trials) is None
    best, second = (one.values["adapter.rank"] for one in trials[:2])
    ran = [(one.values["adapter.rank"], one.values["seed"]) for one in trials[5:]]
    assert ran == [(best, 8), (second, 8), (best, 9), (second, 9)]
    assert [one.repeat_of for one in trials[5:7]] == [trials[0].trial_id, trials[1].trial_id]
    assert search.total == len(trials)


def test_a_stopped_trial_is_no_finalist() -> None:
    spec = sweep(num_trials=5)
    trials = [trial(2, 0.1, "stopped"), trial(4, 2.0), trial(8, 0.2, "failed"), trial(16, 1.0), trial(32, 3.0)]
    chosen = with_finals(spec, search_of(spec)).suggest(trials)
    assert isinstance(chosen, Suggestion)
    assert chosen.repeat_of == trials[3].trial_id


def test_a_repeat_stays_one_when_the_sweep_goes_on(tmp_path: Any) -> None:
    spec = sweep()
    ledger = Ledger(RunPaths(Store(str(tmp_path)), "s", "0" * 64))
    for rank in (2, 4, 8, 16, 32):
        ledger.records[trial_id(rank)] = trial(rank, 0.1 * rank)
    search = with_finals(spec, search_of(spec))
    first = ledger.next(search)
    assert isinstance(first, TrialRecord)
    ledger.update(first.trial_id, state="running")
    again = Ledger(ledger.run)
    again.resume()
    found = again.next(search)
    assert isinstance(found, TrialRecord)
    assert (found.trial_id, found.values, found.repeat_of) == (first.trial_id, first.values, trial_id(2))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"space": {**RANKS, "seed": {"kind": "choice", "values": [0, 1]}}}, "take `seed` out of the space"),
        ({"finals": {"finalists": 6}}, "finals.finalists=6: num_trials=5"),
        ({"finals": {"repeats": 1}}, "greater than or equal to 2"),
    ],
)
def test_finals_that_cannot_work_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sweep(**change)


# What is said.


def test_the_interval_is_that_of_scipy() -> None:
    a, b = np.array([1.2, 1.1, 1.35, 1.3]), np.array([1.4, 1.2, 1.5, 1.6])
    found, theirs = stats.student_mean(b - a, 0.1), scipy.stats.ttest_rel(b, a)
    assert found.p_value == pytest.approx(theirs.pvalue)
    assert (found.interval.low, found.interval.high) == pytest.approx(tuple(theirs.confidence_interval(0.9)))


def test_the_interval_is_that_of_the_table() -> None:
    """Student's table: t(0.975, 2) = 4.303; differences 1, 2, 3 have mean 2 and standard error 1 / sqrt(3)."""
    found = stats.student_mean(np.array([1.0, 2.0, 3.0]))
    assert found.interval.high - found.mean == pytest.approx(4.303 / 3**0.5, abs=1e-3)


def test_equal_runs_are_tied() -> None:
    assert stats.student_mean(np.zeros(3)).p_value == 1.0
    assert stats.student_mean(np.full(3, 0.5)).p_value == 0.0


def test_a_better_one_is_taken_though_it_costs_more() -> None:
    rank, choice = taken(sweep(), (16, (1.00, 1.10, 1.05)), (2, (1.21, 1.30, 1.25)))
    assert rank == 16
    [contrast] = choice.contrasts
    assert contrast.beaten
    assert contrast.difference == pytest.approx((0.21 + 0.20 + 0.20) / 3)
    assert choice.verdict == "rank=16 beats rank=2 by 0.2033 nats [0.1890, 0.2177] over 3 seeds"


def test_of_tied_ones_the_cheaper_is_taken() -> None:
    rank, choice = taken(sweep(), (16, (1.00, 1.10, 1.05)), (2, (1.02, 1.08, 1.10)))
    assert rank == 2
    assert choice.best_id == trial_id(16)
    assert choice.verdict == (
        "rank=16 and rank=2 are tied (rank=2 is 0.0167 nats [-0.0706, 0.1039] behind over 3 seeds); "
        "the cheaper one is taken, rank=2: 0.20 M against 1.60 M trained parameters"
    )


def test_one_that_other_pairs_leave_in_doubt_is_neither_beaten_nor_taken_for_its_price() -> None:
    spec = sweep(finals={"finalists": 4})
    losses = (1.144, 1.115, 1.124), (1.157, 1.119, 1.120), (1.173, 1.176, 1.174), (1.156, 1.123, 1.122)
    rank, choice = taken(spec, *zip((8, 16, 2, 32), losses, strict=True))
    (doubtful,) = [one for one in choice.contrasts if not one.tied]
    assert doubtful.other_id == trial_id(2)
    assert doubtful.low > 0
    assert doubtful.p_value > 0.05
    assert not doubtful.beaten
    assert rank == 8, "of those tied the cheapest, and not the cheapest of all"
    assert "ahead of rank=2, which is not certain over all pairs (p=" in choice.verdict


def test_the_mean_over_seeds_decides_which_is_best_not_the_run_of_the_search() -> None:
    _, choice = taken(sweep(), (16, (1.00, 1.50, 1.40)), (2, (1.02, 1.31, 1.20)))
    assert choice.best_id == trial_id(2)


def test_where_parameters_are_equal_the_faster_is_taken() -> None:
    spec = sweep()
    slow, fast = trial(16, 1.0), trial(8, 1.01)
    equal = {"trained_parameters": 1e5}
    slow = replace(slow, metrics={**equal, "step_s": 2.0})
    fast = replace(fast, metrics={**equal, "step_s": 1.0})
    found = choose(spec, [slow, fast, *repeats(slow, 1.1, 1.2), *repeats(fast, 1.0, 1.3)])
    assert found.trial_id == fast.trial_id
    assert "the faster one is taken, rank=8: 1 against 2 s a step" in found.verdict
    hardly = replace(fast, metrics={**equal, "step_s": 1.96})
    found = choose(spec, [slow, hardly, *repeats(slow, 1.1, 1.2), *repeats(hardly, 1.0, 1.4)])
    assert "they cost the same, so the lower mean loss is taken, rank=16" in found.verdict


def test_a_finalist_with_a_failed_repeat_is_out() -> None:
    spec = sweep(finals={"finalists": 3})
    a, b, c = trial(2, 1.0), trial(4, 1.1), trial(8, 1.2)
    failed = replace(repeats(a, 9.0)[0], state="failed", losses=())
    found = choose(spec, [a, b, c, failed, *repeats(b, 1.2, 1.3), *repeats(c, 1.31, 1.4)])
    assert found.best_id == b.trial_id
    assert found.notes == ("rank=2 is out: of its 3 runs 1 reached their end",)


def test_too_few_finalists_are_told() -> None:
    spec = sweep(finals={"finalists": 3})
    a, b = trial(2, 1.0), trial(4, 1.1)
    found = choose(spec, [a, b, trial(8, 0.1, "stopped"), *repeats(a, 1.2, 1.3), *repeats(b, 1.3, 1.41)])
    assert found.notes == ("finals.finalists=3, but 2 trials ran to their end",)
    assert "compared with nothing" in choose(spec, [a, trial(8, 0.1, "stopped")]).verdict
    with pytest.raises(RunError, match="none ran to step 4: 1 stopped"):
        choose(spec, [trial(8, 0.1, "stopped")])


def test_one_run_a_point_tells_no_noise() -> None:
    found = choose(sweep(finals=None), [trial(2, 1.0), trial(4, 1.1)])
    assert "has the lowest loss, 1.0000, of 2 points run once each" in found.verdict
    assert "`finals: {}` runs the best again" in found.verdict


# Several objectives.


def test_among_those_tied_in_the_first_goal_the_second_decides() -> None:
    spec = sweep(objectives=["eval_loss", "step_s"])
    a, b = trial(2, 1.0), trial(16, 1.02)
    a, b = replace(a, metrics={**a.metrics, "step_s": 2.0}), replace(b, metrics={**b.metrics, "step_s": 1.0})
    dominated = replace(trial(8, 1.01), metrics={"step_s": 2.5})
    trials = [a, dominated, b, *repeats(a, 1.1, 1.05), *repeats(b, 1.08, 1.10)]
    found = choose(spec, trials)
    assert set(found.front) == {a.trial_id, b.trial_id}
    assert found.trial_id == b.trial_id, "faster, and its rank, though larger, comes after the objectives"
    chosen = with_finals(spec, search_of(spec))
    assert isinstance(chosen, WithFinals)
    suggested = chosen.suggest([a, dominated, b, trial(4, 3.0), trial(32, 4.0)])
    assert isinstance(suggested, Suggestion)
    assert suggested.repeat_of == a.trial_id


# How often it is wrong.


def simulated(seed: int, means: tuple[float, ...], finalists: int, repeats_: int, count: int) -> list[SearchDecision]:
    """Sweeps whose trials have these mean losses, and noise of standard deviation 1 of their own at every seed."""
    spec = sweep(num_trials=5, finals={"finalists": finalists, "repeats": repeats_})
    rng = np.random.default_rng(seed)
    ranks = (2, 4, 8, 16, 32)[: len(means)]
    found = []
    for _ in range(count):
        shared = rng.normal(0, 3, repeats_)  # luck that finalists share
        losses = np.array(means)[:, None] + shared + rng.normal(0, 1, (len(means), repeats_))
        order = np.argsort(losses[:, 0])[:finalists]
        searched = [trial(rank, row[0]) for rank, row in zip(ranks, losses, strict=True)]
        again = itertools.chain.from_iterable(repeats(searched[place], *losses[place, 1:]) for place in order)
        found.append(choose(spec, [*searched, *again]))
    return found


@pytest.mark.parametrize(("finalists", "repeats_", "count"), [(2, 3, 2_000), (4, 4, 500)])
def test_equal_points_are_seldom_called_better(finalists: int, repeats_: int, count: int) -> None:
    """alpha = 0.05; at most three standard errors of the share above it."""
    found = simulated(1, (0.0,) * 5, finalists, repeats_, count)
    wrong = np.mean([any(one.beaten for one in choice.contrasts) for choice in found])
    assert wrong <= 0.05 + 3 * (0.05 * 0.95 / count) ** 0.5


def test_a_better_point_is_found() -> None:
    """The power of the paired t-test at 5 seeds, a difference of 3 and sd sqrt(2), from the noncentral t: 0.92."""
    sd, n, gap = 2**0.5, 5, 3.0
    edge, shift = scipy.stats.t.ppf(0.975, n - 1), gap / (sd / n**0.5)
    power = 1 - scipy.stats.nct.cdf(edge, n - 1, shift) + scipy.stats.nct.cdf(-edge, n - 1, shift)
    found = simulated(2, (0.0, gap), 2, n, 400)
    right = np.mean([choice.contrasts[0].beaten and choice.verdict.startswith("rank=2 beats") for choice in found])
    assert right == pytest.approx(power, abs=4 * (power * (1 - power) / 400) ** 0.5)


def test_seeds_follow_that_of_the_search() -> None:
    assert seeds_of(sweep(finals={"repeats": 4})) == (7, 8, 9, 10)
    assert seeds_of(sweep(finals=None)) == (7,)


# What becomes of the winner.


def published(root: Path, run: str, loss: float, seed: int, data: str = "e.jsonl") -> str:
    """A version whose run scored `data`."""
    store = Store(str(root))
    store.write_bytes(f"data: {{eval: {data}}}\nprompt: {{system: Hello}}\n".encode(), "runs", run, "spec.yaml")
    folder = write_adapter(root / f"folder-{run}", seed)
    return artifact.publish(store, "card", folder, **facts(run=run, metrics={"eval_loss": loss})).version


@pytest.mark.parametrize(
    ("before", "moved", "why"),
    [
        ((1.5, "e.jsonl"), True, "held-out loss 1.2500 against 1.5000 of"),
        ((1.25, "e.jsonl"), True, "held-out loss 1.2500 against 1.2500 of"),
        ((1.1, "e.jsonl"), False, "has the lower held-out loss, 1.1000 against 1.2500, by one run each"),
        ((1.1, "other.jsonl"), True, "was not scored on the same rows"),
        (None, True, "it is new"),
    ],
)
def test_an_alias_moves_unless_what_it_points_at_is_better(
    tmp_path: Path, before: tuple[float, str] | None, moved: bool, why: str
) -> None:
    store, winner = Store(str(tmp_path)), published(tmp_path, "new-00000000", 1.25, seed=1)
    old = published(tmp_path, "old-00000000", before[0], 2, before[1]) if before else None
    if old:
        artifact.promote(store, "card", "champion", old)
    placed = move(store, "card", WinnerRecord(winner, "champion", old, None, None))
    assert placed.moved is moved
    assert why in placed.why
    assert aliases(store, "card") == {"champion": winner if moved else old}
    if moved and old:
        assert roll_back(store, "card", "champion") == (winner, old)


def test_the_winner_is_kept_with_the_sweep_and_measured_for_what_it_forgot() -> None:
    spec = sweep(root="/sweeps", winner={})
    wanted = winner_spec(spec, spec.train.with_({"adapter.rank": 4}))
    assert (wanted.root, wanted.alias, wanted.outcomes.retention) == ("/sweeps", None, RetentionSpec())
    assert winner_spec(sweep(winner={"retention": False}), spec.train).outcomes.retention is None
    elsewhere = spec.with_({"train.root": "/adapters"})
    assert winner_spec(elsewhere, elsewhere.train).root == "/adapters"


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"alias": "prod"}, "train.alias='prod' with `winner`: it cannot take"),
        ({"adapter": {"kind": "full"}, "optim": {"lr": 1e-5}}, "a base has none"),
    ],
)
def test_a_winner_that_cannot_be_placed_is_refused(train: dict[str, Any], said: str) -> None:
    space = {"optim.lr": {"kind": "choice", "values": [0.1, 0.2]}}
    base = {"name": "t", "base": "b", "data": {"train": "t.jsonl", "eval": "e.jsonl"}, "quant": {"kind": "none"}}
    with pytest.raises(ConfigError, match=said):
        sweep(train={**base, **train}, space=space, num_trials=2, winner={"alias": "champion"})


def test_finals_are_planned_as_whole_runs() -> None:
    """Four repeats, two at a time: twice the time by which a sweep of one trial is longer than its start."""
    model = SMOLLM2
    machine = Machine(cores=2, memory_bytes=16 * GIB, speed=Speed(gflops=65.0, gbytes_per_s=20.0))
    rows = RowSizes.from_lengths([100] * 64, [50] * 64)

    def seconds(finals: dict[str, int] | None) -> float:
        spec = sweep(finals=finals, space={"optim.lr": {"kind": "choice", "values": [0.1, 0.2]}}, num_trials=2)
        return plan_tuning(spec, model, rows, rows, machine).seconds

    alone = seconds(None) - RAY_TUNE_START_S
    assert seconds({"finalists": 2, "repeats": 3}) - seconds(None) == pytest.approx(2 * alone)


# What one reads.


def test_a_person_and_a_machine_are_told_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    choices = {"adapter.rank": [2, 4], "optim.lr": [0.001, 0.002, 0.004]}
    space = {key: {"kind": "choice", "values": values} for key, values in choices.items()}
    spec = sweep(space=space, num_trials=6, steps=8, scheduler={"grace_steps": 4, "reduction": 2}, report_every=4)
    trials = []
    for place, values in enumerate(grid(spec.space)):
        state: State = "stopped" if place in (2, 5) else "finished"
        ends = 4 if state == "stopped" else 8
        losses = tuple((step, 1.0 + 0.1 * place + 0.5 * (step == 4)) for step in (4, 8) if step <= ends)
        metrics = {"trained_parameters": 1e5, "step_s": 0.5}
        trials.append(TrialRecord(digest(values), values, losses, state, losses[-1][0], 9.0, metrics=metrics))
    for first in trials[:2]:
        for seed in (8, 9):
            values, losses = repeated(first.values, seed), (first.losses[0], (8, first.losses[1][1] + 0.01 * seed))
            again = replace(first, trial_id=digest(values), values=values, losses=losses, repeat_of=first.trial_id)
            trials.append(again)
    choice = choose(spec, trials)
    best = next(trial for trial in trials if trial.trial_id == choice.trial_id)
    report = TuneReport(
        "s-00000000", tuple(trials), best.trial_id, best.values, spec.train, "grid", choice, 4, 9.0, False
    )
    sweep_ = sweep_record(spec, trials, SweepEnd("finished", 4, "grid", 9.0, choice))
    show(spec, report, sweep_, None)
    read = capsys.readouterr().out
    assert "finals: held-out loss by seed" in read
    assert "lr=0.001 beats lr=0.002 by 0.1000 nats" in read
    assert "the best lr moves with rank" in read
    assert "2 trials were stopped before 8 of" in read
    assert "best: --set adapter.rank=2 --set optim.lr=0.001" in read
    machine = json.loads(json.dumps(sweep_json(report, sweep_, None)))
    assert machine["choice"]["contrasts"][0]["beaten"] is True
    assert machine["stops"]["saved_steps"] == 8
    assert machine["heat"]["rates"]["row_key"] == "adapter.rank"
    assert machine["winner"] is None
