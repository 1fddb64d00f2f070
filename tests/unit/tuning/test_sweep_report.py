"""A sweep's page: what its figures say is what its trials say, for any sweep."""

import math
import random
import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import yaml

from graftwork import config
from graftwork.report import ReportInput, render_html, render_json
from graftwork.report.sweep_charts import timeline
from graftwork.report.sweep_schema import SweepKey, SweepRecord, SweepTrial
from graftwork.report.sweep_views import sentence, stops_words
from graftwork.tuning.finals import choose
from graftwork.tuning.report import SweepEnd, settings, stops, sweep_record, to_plain
from graftwork.tuning.search import Values
from graftwork.tuning.space_analysis import importance, rates, terms
from graftwork.tuning.spec import TuneSpec
from graftwork.tuning.trials import State, TrialRecord
from tests.unit.report.test_report import Page

RANK = {"kind": "choice", "values": [1, 4, 16, 64]}
RATE = {"kind": "choice", "values": [0.001, 0.002, 0.004, 0.008]}
KEYS = (SweepKey(name="adapter.rank", values=(1, 4, 16, 64)), SweepKey(name="optim.lr", low=1e-4, high=1e-2, log=True))


def spec(space: dict[str, Any], **keys: Any) -> TuneSpec:
    train = {"name": "t", "base": "hf://x/y", "data": {"train": "t.jsonl", "eval": "e.jsonl"}}
    given = {"name": "sweep", "train": train, "space": space, "num_trials": 50, "steps": 8, "report_every": 2}
    return config.validate(TuneSpec, {**given, "scheduler": None, **keys}, where="test")


def trial(name: str, values: dict[str, Any], losses: Sequence[float], state: State = "finished", **more: Any) -> Any:
    steps = tuple((2 * (index + 1), loss) for index, loss in enumerate(losses))
    known: dict[str, Any] = {"wall_s": 10.0, "started_s": 1.0, **more}
    return TrialRecord(name, values, steps, state, steps[-1][0] if steps else 0, **known)


def shown(name: str, values: dict[str, Any], losses: Sequence[float], state: State = "finished") -> SweepTrial:
    return SweepTrial(
        id=name, values=values, state=state, losses=tuple((2 * (index + 1), loss) for index, loss in enumerate(losses))
    )


def grid(loss: Any) -> list[TrialRecord]:
    return [
        trial(f"{rank}-{rate}", {"adapter.rank": rank, "optim.lr": rate}, [2.0, loss(rank, rate)])
        for rank in (1, 4, 16, 64)
        for rate in (0.001, 0.002, 0.004, 0.008)
    ]


def page_of(asked: TuneSpec, trials: Sequence[TrialRecord], ended: SweepEnd | None = None) -> tuple[SweepRecord, Page]:
    ended = ended or SweepEnd("finished", 16, "grid", 60.0, choose(asked, trials))
    record = sweep_record(asked, trials, ended)
    report = ReportInput(title="sweep", created_at="now", verdict=sentence(record), tune=record)
    assert render_json(ReportInput.model_validate_json(render_json(report))) == render_json(report)
    return record, Page(render_html(report))


# Importance.


def test_the_surface_is_orthonormal_over_the_space() -> None:
    """Squared coefficients are shares of the variance only then."""
    u = (np.arange(4000) + 0.5) / 4000
    drawn = terms(KEYS[1], [float(1e-4 * 100**at) for at in u])
    listed = terms(KEYS[0], [1, 4, 16, 64])
    words = terms(SweepKey(name="k", values=("a", "b", "c")), ["a", "b", "c"])
    for table in (drawn, listed, words):
        assert np.allclose(table.mean(axis=0), 0, atol=1e-6)
        assert np.allclose(table.T @ table / len(table), np.eye(table.shape[1]), atol=1e-5)


def test_importance_finds_the_key_that_matters() -> None:
    """Against the variance components of a known function, fully crossed."""
    rng = random.Random(1)
    points = [(rng.choice([1, 4, 16, 64]), 1e-4 * 100 ** rng.random()) for _ in range(40)]
    trials = [
        shown(f"{index}", {"adapter.rank": rank, "optim.lr": rate}, [abs(math.log(rate / 1e-3))])
        for index, (rank, rate) in enumerate(points)
    ]
    found = importance(KEYS, trials, seed=0)
    assert [one.key for one in found.keys] == ["optim.lr", "adapter.rank"]
    assert found.keys[0].low > 0.8 > 0.2 > found.keys[1].high
    assert found.predicts is not None
    assert found.predicts > 0.7
    assert found == importance(KEYS, trials, seed=0)


def test_importance_says_nothing_where_the_losses_follow_no_key() -> None:
    rng = random.Random(2)
    told = 0
    for _ in range(20):
        trials = [
            shown(
                f"{i}",
                {"adapter.rank": rng.choice([1, 4, 16, 64]), "optim.lr": 1e-4 * 100 ** rng.random()},
                [rng.random()],
            )
            for i in range(24)
        ]
        told += importance(KEYS, trials, seed=0).silent is None
    assert told <= 4, "more than 4 of 20 have a chance of 0.3 % at a level of 5 %"
    assert "too few" in (importance(KEYS, trials[:5], seed=0).silent or "")
    assert "one key" in (importance(KEYS[:1], trials, seed=0).silent or "")


# The claim on the user's own data.


@pytest.mark.parametrize(
    ("best_rate", "verdict"),
    [(lambda _: 0.003, "hardly moves"), (lambda rank: 0.0042 / rank**0.5, "moves"), (lambda _: 0.02, "can't be told")],
)
def test_whether_the_best_rate_moves_with_the_rank(best_rate: Any, verdict: str) -> None:
    trials = grid(lambda rank, rate: 1 + math.log(rate / best_rate(rank)) ** 2)
    record, page = page_of(spec({"adapter.rank": RANK, "optim.lr": RATE}), trials)
    assert record.heat is not None
    assert record.heat.rates is not None
    assert record.heat.rates.verdict == verdict
    assert f"{verdict}{'' if verdict.startswith('can') else ' with rank'} here" in page.text


def test_the_best_rate_is_a_parabolas_lowest_point() -> None:
    trials = [
        shown(f"{rank}-{rate}", {"adapter.rank": rank, "optim.lr": rate}, [math.log(rate / 0.0025) ** 2])
        for rank in (1, 4)
        for rate in (0.001, 0.002, 0.004, 0.008)
    ]
    keys = SweepKey(name="adapter.rank", values=(1, 4)), SweepKey(name="optim.lr", values=(0.001, 0.002, 0.004, 0.008))
    found = rates(trials, *keys)
    assert found is not None
    assert [row.vertex for row in found.rows] == [pytest.approx(0.0025), pytest.approx(0.0025)]
    assert [found.rows[0].low, found.rows[0].high] == pytest.approx([0.002 / 2**0.5, 0.002 * 2**0.5])
    assert (found.shared, found.shared_costs) == (0.002, 0.0)


# Early stops.


def test_what_early_stops_saved_and_may_have_lost() -> None:
    ends = [("best", 1.5, 1.0), ("a", 1.9, 1.1), ("b", 1.6, 1.4), ("c", 1.7, 1.5)]
    finished = [shown(name, {}, [2.0, at, end]) for name, at, end in ends]
    near, far = shown("near", {}, [2.0, 1.7], "stopped"), shown("far", {}, [2.0, 3.0], "stopped")
    found = stops([*finished, near, far], "best", steps=6)
    assert found is not None
    assert (found.stopped, found.saved_steps, found.all_steps) == (2, 4, 36)
    (rung,) = found.rungs
    assert (rung.step, rung.stopped, rung.finished, rung.pairs, rung.reversed_pairs) == (4, 2, 4, 6, 2)
    assert rung.tau == pytest.approx((4 - 2) / 6)
    # `a` came from 0.4 above the winner to 0.1: by 0.3, more than the 0.2 that `near` lacked.
    assert [(one.id, one.caught_up, one.n) for one in found.closest] == [("near", 1, 3), ("far", 0, 3)]
    assert found.regret == pytest.approx(0.1)
    assert "1 of 3 finished trials caught up" in stops_words(found)


def test_what_was_lost_is_not_guessed_from_too_few() -> None:
    trials = [shown("best", {}, [1.0, 0.5]), shown("other", {}, [1.1], "stopped")]
    found = stops(trials, "best", steps=4)
    assert found is not None
    assert found.regret is None
    assert "The loss by early stops is unknown" in stops_words(found)
    assert stops_words(found).startswith("1 trial was stopped before")


# The page.


def test_bars_share_a_lane_only_when_they_do_not_overlap() -> None:
    times = [(0.5, 10), (0.6, 4), (5, 3), (11, 2), (8.5, 9)]
    trials = [
        trial(f"{i}", {"optim.lr": 0.001}, [1.0], started_s=at, wall_s=took) for i, (at, took) in enumerate(times)
    ]
    record, _ = page_of(spec({"optim.lr": RATE}, steps=2), trials)
    found = timeline(record)
    assert found is not None
    assert found.lanes == 2
    assert found.idle == pytest.approx(1 - 28 / (2 * 17.5))


def test_a_trial_that_was_running_is_drawn_up_to_the_interruption() -> None:
    running = trial("a", {"optim.lr": 0.001}, [], "running", started_s=20.0, wall_s=0.01)
    record, page = page_of(spec({"optim.lr": RATE}), [running], SweepEnd("interrupted", 16, "grid", 60.0))
    found = timeline(record)
    assert found is not None
    assert found.idle == pytest.approx(20 / 60)
    assert "0.01 core hours" in page.text


STATES: tuple[State, ...] = ("finished", "stopped", "failed", "running", "pending")


@pytest.mark.parametrize("count", [0, 1, 3, 20, 200])
def test_a_page_of_any_number_of_trials_opens(count: int) -> None:
    rng = random.Random(count)
    kinds = {"kind": "choice", "values": [{"kind": "lora", "rank": 8}, {"kind": "ia3"}, {"kind": "prefix"}]}
    asked = spec({"adapter": kinds, "optim.lr": {"kind": "loguniform", "low": 1e-4, "high": 1e-2}})
    trials = []
    for index in range(count):
        state = rng.choice(STATES)
        values = {"adapter": rng.choice(kinds["values"]), "optim.lr": 1e-4 * 100 ** rng.random()}
        reports = {"finished": 4, "stopped": 2, "running": 1}.get(state, 0)
        trials.append(
            trial(
                f"{index:08x}",
                values,
                [rng.lognormvariate(0, 1) for _ in range(reports)],
                state,
                error="<b>lost</b>" if state == "failed" else None,
            )
        )
    ended = SweepEnd("interrupted", 16, "random", 60.0)
    if any(one.state == "finished" for one in trials):
        ended = SweepEnd("finished", 16, "random", 60.0, choose(asked, trials))
    _, page = page_of(asked, trials, ended)
    assert f"{count} trials" in page.text
    assert ("<b>lost</b>" in page.text) == any(one.state == "failed" for one in trials), "escaped, not an element"


def test_all_failed_is_said_with_the_error() -> None:
    trials = [trial(name, {"optim.lr": 0.001}, [], "failed", error="loss is nan") for name in "ab"]
    _, page = page_of(spec({"optim.lr": RATE}), trials, SweepEnd("failed", 16, "grid", 3.0, error="none ran to step 8"))
    assert "No trial was chosen: 2 failed." in page.text
    assert "none ran to step 8" in page.text


def test_the_settings_can_be_pasted() -> None:
    values: Values = {"optim.lr": 1e-05, "adapter": {"kind": "lora", "rank": 8}, "prompt.system": "It's: a"}
    words = shlex.split(settings(values))
    assert words[::2] == ["--set"] * 3
    read = {key: yaml.safe_load(text) for key, _, text in (word.partition("=") for word in words[1::2])}
    asked = spec({"optim.lr": RATE}).train
    assert asked.with_(read) == asked.with_(values)
    assert to_plain({"kind": "lora", "rank": 8}) == "lora rank=8"


def test_finals_are_shown_by_seed() -> None:
    asked = spec({"optim.lr": RATE}, finals={"finalists": 2, "repeats": 3}, steps=4)
    trials = [trial("a", {"optim.lr": 0.001}, [2.0, 1.0]), trial("b", {"optim.lr": 0.002}, [2.0, 1.2])]
    for seed in (1, 2):
        for name, rate, end in (("a", 0.001, 1.0), ("b", 0.002, 1.21)):
            trials.append(
                trial(f"{name}{seed}", {"optim.lr": rate, "seed": seed}, [2.0, end + 0.01 * seed], repeat_of=name)
            )
    record, page = page_of(asked, trials)
    assert record.finals is not None
    lowest, other = record.finals.finalists
    assert (lowest.losses, lowest.difference) == ((1.0, 1.01, 1.02), None)
    assert other.difference == pytest.approx(np.mean([0.2, 0.21, 0.21]))
    assert "told apart from 1 of 1 other finalists" in page.text
    assert "beats" in page.text
    assert record.importance is not None
    assert record.importance.n == 2, "repeats are no trials of the search"


def test_several_goals_have_a_front() -> None:
    asked = spec({"optim.lr": RATE}, objectives=["eval_loss", "step_s"], steps=2)
    figures = [(1.0, 3.0), (1.2, 2.0), (1.3, 2.5)]
    trials = [trial(f"{loss}", {"optim.lr": 0.001}, [loss], metrics={"step_s": took}) for loss, took in figures]
    record, page = page_of(asked, trials)
    assert record.front is not None
    assert [point.on_front for point in record.front.points] == [True, True, False]
    assert "2 of 3 trials are on the front" in page.text
