"""How trials share a machine: which of them are stopped and why, what each asks of the cluster, what is refused."""

import math
from typing import Any

import numpy as np
import pytest

from graftwork import config
from graftwork.errors import ConfigError
from graftwork.tuning.judge import Judge, judge_of
from graftwork.tuning.plan import expected_share
from graftwork.tuning.records import TrialRecord
from graftwork.tuning.spec import AshaSpec, HyperbandSpec, TuneSpec

LR = {"optim.lr": {"kind": "loguniform", "low": 1e-4, "high": 1e-2}}


def sweep(**keys: Any) -> TuneSpec:
    train = {"name": "t", "base": "b", "data": {"train": "t.jsonl", "eval": "e.jsonl"}, **keys.pop("train", {})}
    return config.validate(TuneSpec, {"name": "s", "train": train, "space": LR, **keys}, where="s.yaml")


# Who is stopped.


def stopped(judge: Judge, curves: dict[str, list[float]]) -> dict[str, int]:
    """The step at which each trial was stopped, run one after the other, a report every four steps."""
    found = {}
    for name, losses in curves.items():
        for place, loss in enumerate(losses):
            if judge.reason_to_stop(name, 4 * (place + 1), loss):
                found[name] = 4 * (place + 1)
                break
    return found


HYPERBAND = {"kind": "hyperband", "grace_steps": 4, "reduction": 2, "brackets": 3}
WORSE_AND_WORSE = {f"t{n}": [2.0 + n / 10 - step / 100 for step in range(6)] for n in range(40)}


def test_hyperband_lets_some_trials_live_to_a_later_first_rung() -> None:
    """Each trial is worse than all before it: it is stopped at the first rung of its bracket, where it has one."""
    spec = sweep(scheduler=HYPERBAND, steps=24)
    found = stopped(judge_of(spec, []), WORSE_AND_WORSE)
    firsts = {step: list(found.values()).count(step) for step in (4, 8, 16)}
    assert set(found.values()) == set(firsts)
    assert firsts[4] > firsts[8] > firsts[16] > 0, "Ray gives a bracket of one rung more e times the trials"


def test_the_bracket_of_a_trial_follows_from_the_seed_alone() -> None:
    spec = sweep(scheduler=HYPERBAND, steps=24)
    np.random.seed(1)
    next_number = np.random.random()
    np.random.seed(1)
    first = stopped(judge_of(spec, []), WORSE_AND_WORSE)
    assert np.random.random() == next_number, "nobody else's numbers change"
    np.random.seed(2)
    backwards = dict(reversed(WORSE_AND_WORSE.items()))
    assert stopped(judge_of(spec, []), WORSE_AND_WORSE) == first
    assert stopped(judge_of(sweep(scheduler=HYPERBAND, steps=24, seed=1), []), WORSE_AND_WORSE) != first
    assert not stopped(judge_of(spec, []), backwards), "each better than all before it"


def test_a_stopped_trial_is_told_rung_loss_and_cut_off() -> None:
    judge = judge_of(sweep(scheduler={"grace_steps": 4, "reduction": 2}), [])
    assert [judge.reason_to_stop(name, 4, loss) for name, loss in (("a", 2.0), ("b", 1.0))] == [None, None]
    assert judge.reason_to_stop("c", 4, 1.75) == (
        "stopped at step 4: loss 1.7500 is above the cut-off 1.5000 of rung 4 (2 earlier trials; the best 1 of 2 go on)"
    )
    median = judge_of(sweep(scheduler={"kind": "median", "grace_steps": 4, "min_trials": 2}), [])
    assert [median.reason_to_stop(name, 4, loss) for name, loss in (("a", 2.0), ("b", 1.0))] == [None, None]
    assert median.reason_to_stop("c", 4, 1.75) == (
        "stopped at step 4: best loss 1.7500 is above 1.5000, the median of the running averages of 2 trials"
    )


@pytest.mark.parametrize("scheduler", [None, {"grace_steps": 4}, HYPERBAND, {"kind": "median", "min_trials": 1}])
@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_its_trial_and_no_other(scheduler: Any, loss: float) -> None:
    judge = judge_of(sweep(scheduler=scheduler, steps=24), [])
    assert judge.reason_to_stop("broken", 4, loss) == f"stopped at step 4: its held-out loss is {loss}"
    assert judge.reason_to_stop("fine", 4, 9.0) is None
    assert judge.reason_to_stop("better", 4, 8.0) is None


def test_the_median_rule_is_told_again_of_trials_in_another_order() -> None:
    """`late` ended before the others began. Told step by step it would have been stopped at 4, and reported again."""
    past = [TrialRecord("late", {}, ((4, 3.0), (8, 2.9)), "finished")]
    past = [*[TrialRecord(name, {}, ((4, 1.0), (8, 1.0)), "finished") for name in "abc"], *past]
    judge = judge_of(sweep(scheduler={"kind": "median", "grace_steps": 4}), past)
    assert judge.reason_to_stop("new", 4, 5.0) is not None


# Where the rungs lie.


@pytest.mark.parametrize(
    ("steps", "every", "rungs"),
    [(12, 4, (4,)), (100, 10, (10, 30, 90)), (90, 5, (10, 30)), (8, 1, (1, 3)), (6, 5, (5,))],
)
def test_rungs_that_nobody_gave_lie_on_reports(steps: int, every: int, rungs: tuple[int, ...]) -> None:
    spec = sweep(steps=steps, report_every=every)
    assert isinstance(spec.scheduler, AshaSpec)
    assert spec.scheduler.rungs(steps) == rungs
    assert sweep(**spec.model_dump(include={"steps", "report_every", "scheduler"})).scheduler == spec.scheduler


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scheduler": {"grace_steps": 3}}, "rung 3 would be judged at step 4. Set grace_steps=4"),
        ({"scheduler": {"kind": "hyperband", "brackets": 3}}, "bracket 2 stops no trial .* Set brackets=2"),
        ({"scheduler": {"kind": "hyperband", "brackets": 1}}, "greater than or equal to 2"),
        ({"scheduler": {"kind": "hyperband", "grace_steps": 12}}, "grace_steps=12 must be less than steps=12"),
    ],
)
def test_a_scheduler_that_cannot_do_what_it_says_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sweep(**change)


def test_the_plan_counts_the_steps_of_each_bracket() -> None:
    spec = sweep(scheduler={"kind": "hyperband", "grace_steps": 4, "brackets": 2})
    assert isinstance(spec.scheduler, HyperbandSpec)
    (first, rungs), (last, none) = spec.scheduler.ladders(12)
    assert (rungs, none) == ((4,), ())
    assert first / last == pytest.approx(math.e)
    assert expected_share(spec, 30) == pytest.approx(first * (4 + 8 / 3) / 12 + last)
