"""How trials share a machine: which of them are stopped and why, what each asks of the cluster, what is refused."""

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from ray.exceptions import WorkerCrashedError

from graftwork import config
from graftwork.base import load as base_model
from graftwork.base.model_shape import ModelShape
from graftwork.cluster.jobs.models import Demand
from graftwork.errors import ClusterError, ConfigError, DataError
from graftwork.planning.hardware import GIB, GPUS, Correction, Machine
from graftwork.planning.memory import RowSizes
from graftwork.storage.store import RunPaths, Store
from graftwork.training.autotune import machine_of
from graftwork.training.loop import run_steps
from graftwork.training.objectives.rows import prepare
from graftwork.training.planning.memory import kind_of, predict_training
from graftwork.training.worker_messages import NonFiniteLoss, StepReport, TrainJob
from graftwork.tuning.early_stopping import AshaSpec, HyperbandSpec, StoppingRule, stopping_rule
from graftwork.tuning.forkserver import train_in_fork
from graftwork.tuning.plan import expected_share
from graftwork.tuning.remote_trial import Elsewhere, trial_job
from graftwork.tuning.report import most_at_once
from graftwork.tuning.resources import Node, Request, TrialResources, at_once, fits, fits_one, max_concurrent, predicted
from graftwork.tuning.search import Values
from graftwork.tuning.spec import TuneSpec
from graftwork.tuning.trials import TrialRecord
from tests.families import write_family
from tests.training import task
from tests.waiting import until

LR = {"optim.lr": {"kind": "loguniform", "low": 1e-4, "high": 1e-2}}


def sweep(**keys: Any) -> TuneSpec:
    train = {"name": "t", "base": "b", "data": {"train": "t.jsonl", "eval": "e.jsonl"}, **keys.pop("train", {})}
    return config.validate(TuneSpec, {"name": "s", "train": train, "space": LR, **keys}, where="s.yaml")


# Who is stopped.


def stopped(judge: StoppingRule, curves: dict[str, list[float]]) -> dict[str, int]:
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
    found = stopped(stopping_rule(spec, []), WORSE_AND_WORSE)
    firsts = {step: list(found.values()).count(step) for step in (4, 8, 16)}
    assert set(found.values()) == set(firsts)
    assert firsts[4] > firsts[8] > firsts[16] > 0, "Ray gives a bracket of one rung more e times the trials"


def test_the_bracket_of_a_trial_follows_from_the_seed_alone() -> None:
    spec = sweep(scheduler=HYPERBAND, steps=24)
    np.random.seed(1)
    next_number = np.random.random()
    np.random.seed(1)
    first = stopped(stopping_rule(spec, []), WORSE_AND_WORSE)
    assert np.random.random() == next_number, "nobody else's numbers change"
    np.random.seed(2)
    backwards = dict(reversed(WORSE_AND_WORSE.items()))
    assert stopped(stopping_rule(spec, []), WORSE_AND_WORSE) == first
    assert stopped(stopping_rule(sweep(scheduler=HYPERBAND, steps=24, seed=1), []), WORSE_AND_WORSE) != first
    assert not stopped(stopping_rule(spec, []), backwards), "each better than all before it"


def test_a_stopped_trial_is_told_rung_loss_and_cut_off() -> None:
    judge = stopping_rule(sweep(scheduler={"grace_steps": 4, "reduction": 2}), [])
    assert [judge.reason_to_stop(name, 4, loss) for name, loss in (("a", 2.0), ("b", 1.0))] == [None, None]
    assert judge.reason_to_stop("c", 4, 1.75) == (
        "stopped at step 4: loss 1.7500 is above the cut-off 1.5000 of rung 4 (2 earlier trials; the best 1 of 2 go on)"
    )
    median = stopping_rule(sweep(scheduler={"kind": "median", "grace_steps": 4, "min_trials": 2}), [])
    assert [median.reason_to_stop(name, 4, loss) for name, loss in (("a", 2.0), ("b", 1.0))] == [None, None]
    assert median.reason_to_stop("c", 4, 1.75) == (
        "stopped at step 4: best loss 1.7500 is above 1.5000, the median of the running averages of 2 trials"
    )


@pytest.mark.parametrize("scheduler", [None, {"grace_steps": 4}, HYPERBAND, {"kind": "median", "min_trials": 1}])
@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_its_trial_and_no_other(scheduler: Any, loss: float) -> None:
    judge = stopping_rule(sweep(scheduler=scheduler, steps=24), [])
    assert judge.reason_to_stop("broken", 4, loss) == f"stopped at step 4: its held-out loss is {loss}"
    assert judge.reason_to_stop("fine", 4, 9.0) is None
    assert judge.reason_to_stop("better", 4, 8.0) is None


def test_the_median_rule_is_told_again_of_trials_in_another_order() -> None:
    """`late` ended before the others began. Told step by step it would have been stopped at 4, and reported again."""
    past = [TrialRecord("late", {}, ((4, 3.0), (8, 2.9)), "finished")]
    past = [*[TrialRecord(name, {}, ((4, 1.0), (8, 1.0)), "finished") for name in "abc"], *past]
    judge = stopping_rule(sweep(scheduler={"kind": "median", "grace_steps": 4}), past)
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


# What has room.


def gpu(share: float, **more: float) -> Request:
    return Request({"CPU": 1.0, "GPU": share, **more})


def test_small_trials_share_a_gpu_and_none_is_split_over_two() -> None:
    node = {"CPU": 16.0, "GPU": 2.0, "memory": 64.0 * GIB}
    assert max_concurrent([node], gpu(0.3), 100) == 6, "three a GPU"
    assert max_concurrent([node], gpu(0.6), 100) == 2, "0.4 + 0.2 of two GPUs is no place"
    assert fits([node], [gpu(0.4), gpu(0.6), gpu(0.4), gpu(0.6)])
    assert not fits([node], [gpu(0.6), gpu(0.6), gpu(0.6)])
    assert max_concurrent([node], gpu(1.0), 100) == 2
    assert max_concurrent([node], gpu(2.0), 100) == 1


def test_a_node_holds_no_more_than_it_has_of_anything() -> None:
    small, large = {"CPU": 2.0, "memory": 2.0 * GIB}, {"CPU": 8.0, "memory": 8.0 * GIB}
    one = Request({"CPU": 1.0, "memory": 1.5 * GIB})
    assert max_concurrent([small, large], one, 100) == 6
    assert max_concurrent([small, large], one, 4) == 4
    assert not fits([small, small], [Request({"CPU": 1.0, "memory": 3.0 * GIB})]), "a process lies on one node"
    assert fits([small, small], [Request({"CPU": 2.0, "memory": 1.5 * GIB}, 2, {"memory": 0.3 * GIB})])
    assert not fits([small], [Request({"CPU": 2.0, "memory": 0.5 * GIB}, 2, {"memory": 0.3 * GIB})])


def test_as_many_run_at_a_time_as_have_room() -> None:
    node, one = {"CPU": 4.0, "memory": 3.0 * GIB}, Request({"CPU": 1.0, "memory": 1.0 * GIB})
    assert at_once(sweep(), one, [node], 50) == 3
    assert at_once(sweep(), one, [node], 2) == 2
    assert at_once(sweep(max_concurrent=2), one, [node], 50) == 2
    assert at_once(sweep(max_concurrent=9), one, [node], 3) == 9, "three trials never are nine at a time"
    with pytest.raises(ClusterError) as refused:
        at_once(sweep(max_concurrent=4), one, [node], 50)
    assert str(refused.value).startswith(
        "ClusterError: max_concurrent=4: there is room for 3 at a time: the one node has 4 CPU, 3.00 GiB of memory; "
        "the smallest trial asks for 1 CPU, 1.00 GiB of memory"
    )


# What is asked for.


POINT: Values = {"optim.lr": 1e-3}
FSDP2: dict[str, Any] = {"num_workers": 2, "strategy": {"kind": "fsdp2"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base and its rows."""
    return tmp_path_factory.mktemp("asking")


def asking(folder: Path, nodes: Sequence[Node], **keys: Any) -> TrialResources:
    train = {**task(folder).model_dump(mode="json", exclude={"eval_every"}), **keys.pop("train", {})}
    return TrialResources(sweep(**{**keys, "train": train}), {"{}": RowSizes.at_most(64, 48)}, nodes)


def test_a_trial_asks_for_the_memory_that_is_predicted_for_it(folder: Path) -> None:
    found = asking(folder, [{"CPU": 2.0, "memory": 4.0 * GIB}])
    trial = found.resolve_trial(POINT)
    shape = ModelShape.from_config(base_model.resolve(trial.base).config)
    machine = machine_of(trial)
    peak = predict_training(trial, shape, RowSizes.at_most(64, 48), value_bytes=machine.value_bytes).peak_bytes
    memory = found.request([trial], POINT).worker["memory"]
    assert set(found.request([trial], POINT).worker) == {"CPU", "memory"}
    assert 0 <= memory - (machine.peaks.get(kind_of(trial), Correction()).ratio * peak + 250 * 2**20) <= 128 * 2**20, (
        "beside it lies Tune's own process"
    )
    longer = replace(found, rows={"{}": RowSizes.at_most(4096, 48)})
    assert longer.request([trial], POINT).worker["memory"] > memory
    assert found.request([trial, trial], POINT).worker["memory"] < 2 * memory, "one base for both"
    plain = asking(folder, [{"CPU": 2.0}], reserve_memory=False)
    assert plain.request([trial], POINT) == Request({"CPU": 1.0})


def test_a_trial_on_a_gpu_asks_for_its_share_rounded_up(folder: Path) -> None:
    at = Machine.with_gpus(GPUS["t4"].model_copy(update={"memory_gib": 4.0}))
    trial = task(folder, num_workers=1, gpus_per_worker=1)
    shape, rows = ModelShape.from_config(base_model.resolve(trial.base).config), RowSizes.at_most(64, 48)
    found = predicted([trial], shape, at, rows)
    peak = predict_training(trial, shape, rows, value_bytes=at.value_bytes).peak_bytes
    assert 0 <= found["GPU"] - peak / (0.95 * 4 * GIB) <= 0.011
    assert found["memory"] > 0.5 * GIB, "its process takes some of the machine's own"
    whole = Machine.with_gpus(GPUS["t4"].model_copy(update={"memory_gib": 0.3}))
    assert not fits_one(
        Request(predicted([trial], shape, whole, rows)), [{"CPU": 2.0, "GPU": 8.0, "memory": 99.0 * GIB}]
    )
    assert "GPU" not in predicted([trial.with_(FSDP2)], shape, at, rows), "a worker of a gang has it whole"


def test_a_gang_is_for_what_does_not_fit_one_process_and_shards(folder: Path) -> None:
    roomy = asking(folder, [{"CPU": 2.0, "memory": 4.0 * GIB}], train=FSDP2)
    assert roomy.resolve_trial(POINT).num_workers == 1
    alone = roomy.request([roomy.resolve_trial(POINT)], POINT).worker["memory"]
    tight = asking(folder, [{"CPU": 2.0, "memory": alone - 2**20}] * 3, train=FSDP2)
    gang = tight.resolve_trial(POINT)
    assert (gang.num_workers, gang.strategy.kind) == (2, "fsdp2")
    assert tight.request([gang], POINT).workers == 2
    why = tight.explain_placement(gang, POINT)
    assert why is not None
    assert why.startswith("distributed over 2 workers (fsdp2): one process would ask for 1 CPU, ")
    never = asking(folder, tight.nodes, train=FSDP2, distributed="never")
    assert never.resolve_trial(POINT).num_workers == 1
    assert asking(folder, roomy.nodes, train=FSDP2, distributed="always").resolve_trial(POINT).num_workers == 2
    ddp = asking(folder, tight.nodes, train={"num_workers": 2})
    assert ddp.resolve_trial(POINT).num_workers == 1, "copies of the weights save no memory"


def test_a_trial_that_fits_nowhere_is_refused_with_the_numbers(folder: Path) -> None:
    tight = asking(folder, [{"CPU": 2.0, "memory": 0.5 * GIB}], train={"optim": {"micro_batch": 8, "rows_per_step": 8}})
    with pytest.raises(ClusterError) as refused:
        tight.check_capacity([POINT])
    text = str(refused.value)
    assert text.startswith("ClusterError: the trial optim.lr=0.001: its prediction asks for 1 CPU, 1.")
    assert "the one node has 2 CPU, 0.50 GiB of memory" in text
    assert "take a smaller base, or nodes that have (or declare) more memory" in text
    with pytest.raises(ClusterError, match="train.gpus_per_worker=1: the largest node has 0 GPU"):
        asking(folder, tight.nodes, train={"gpus_per_worker": 1}).check_capacity([POINT])
    with pytest.raises(ClusterError, match="train.cpus_per_worker=3: the largest node has 2 CPU"):
        asking(folder, tight.nodes, train={"cpus_per_worker": 3}).check_capacity([POINT])


def test_a_gang_that_cannot_be_trained_is_refused_before_it_starts(folder: Path) -> None:
    roomy = [{"CPU": 8.0, "memory": 32.0 * GIB}]
    zero3 = {"num_workers": 4, "strategy": {"kind": "zero3"}}
    few = asking(folder, roomy, train=zero3, distributed="always", eval_rows=2)
    with pytest.raises(DataError, match="2 rows for num_workers=4"):
        few.check_capacity([POINT])


def test_the_page_counts_what_ran_at_the_same_time() -> None:
    spans = ((0.0, 5.0), (1.0, 4.0), (5.0, 3.0), (5.5, 1.0))
    trials = [TrialRecord(str(n), {}, state="finished", started_s=a, wall_s=b) for n, (a, b) in enumerate(spans)]
    assert most_at_once(trials) == 2
    assert most_at_once([]) == 1


# What trains it on CPUs.


def fork_servers() -> list[psutil.Process]:
    """Fork servers of this process."""
    return [child for child in psutil.Process().children() if "multiprocessing.forkserver" in " ".join(child.cmdline())]


def forks() -> list[psutil.Process]:
    """Processes that train for this one."""
    return [fork for server in fork_servers() for fork in server.children()]


@pytest.mark.long
def test_a_fork_trains_as_this_process_does_and_takes_its_memory_with_it(folder: Path) -> None:
    spec = task(folder, num_workers=1)
    job = TrainJob(spec, prepare(spec), max_steps=3, eval_every=3)
    seen: list[tuple[float, float | None, int]] = []

    def note(step: StepReport, peak: int) -> bool:
        seen.append((step.loss, step.eval_loss, peak))
        return True

    train_in_fork(job, note)
    [server] = fork_servers()
    train_in_fork(job, note)
    stopped = train_in_fork(job, lambda step, peak: False)
    with pytest.raises(NonFiniteLoss):
        train_in_fork(replace(job, spec=spec.with_({"optim.lr": 1e38})), lambda step, peak: True)
    assert fork_servers() == [server], "one server for all trials of a process"
    assert not server.children(), "each fork is gone"
    alone = run_steps(job, lambda step: True)
    first, second = seen[:3], seen[3:]
    assert [one[:2] for one in first] == [one[:2] for one in second]
    assert [one[0] for one in first] == [loss for _, loss in alone.train_loss]
    assert (stopped.steps, stopped.stopped) == (1, True)
    assert abs(first[-1][2] - second[-1][2]) < 32 * 2**20, "a fork's peak is its own"


def test_a_fork_ends_with_the_process_that_asked_for_it(folder: Path) -> None:
    spec = task(folder, num_workers=1)
    job = TrainJob(spec, prepare(spec), max_steps=2, eval_every=2)
    seen: list[psutil.Process] = []

    def killed(step: StepReport, peak: int) -> bool:
        [fork] = forks()
        fork.kill()
        return True

    with pytest.raises(WorkerCrashedError, match="ended with signal 9"):
        train_in_fork(job, killed)

    def leave(step: StepReport, peak: int) -> bool:
        seen.extend(forks())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_in_fork(job, leave)
    assert len(seen) == 1
    assert not psutil.pid_exists(seen[0].pid)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that no parent has waited for yet does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.long
def test_a_fork_ends_when_its_trials_process_is_killed(folder: Path) -> None:
    """As Ray kills an actor: SIGKILL, while the fork waits for the answer to a report."""
    program = f"""
import os, pathlib, psutil
from graftwork.training.objectives.rows import prepare
from graftwork.training.worker_messages import TrainJob
from graftwork.tuning.forkserver import train_in_fork
from tests.training import task

def report(step, peak):
    [server] = [c for c in psutil.Process().children() if "multiprocessing.forkserver" in " ".join(c.cmdline())]
    pids = " ".join(str(one.pid) for one in [server, *server.children()])
    pathlib.Path({str(folder / "pids")!r}).write_text(pids)
    os.kill(os.getpid(), 9)

if __name__ == "__main__":
    spec = task(pathlib.Path({str(folder)!r}), num_workers=1)
    train_in_fork(TrainJob(spec, prepare(spec), max_steps=2, eval_every=2), report)
"""
    script = folder / "trial.py"
    script.write_text(program)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, str(script)], env=environment, check=False)
    assert done.returncode == -9
    pids = [int(pid) for pid in (folder / "pids").read_text().split()]
    assert len(pids) == 2, "a server and a fork"
    until(lambda: not any(is_alive(pid) for pid in pids), f"{pids} have ended", within_s=20)


def test_a_trial_elsewhere_whose_memory_no_formula_predicts_is_a_job_without_it(tmp_path: Path) -> None:
    spec = task(tmp_path).with_({"gpus_per_worker": 0})
    write_family(tmp_path / "gpt2", "gpt2")
    spec = spec.with_({"base.uri": str(tmp_path / "gpt2")})
    job = TrainJob(spec, prepare(spec), max_steps=2, eval_every=1)
    paths = RunPaths(Store(str(tmp_path / "root")), "sweep", "0" * 64)
    assert trial_job(Elsewhere("local", {}), job, "a", paths).demand == Demand(
        spec.num_workers, spec.cpus_per_worker, 0.0
    )
