"""What a sweep makes of a trial that fails, and of a ledger that is not as it was."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray import exceptions

from graftwork import config
from graftwork.errors import StorageError
from graftwork.storage.store import RunPaths, Store
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import NonFiniteLoss
from graftwork.tuning.retry import TrialFailure, after, failure_of, hopeless, kernel_kills, shrunk
from graftwork.tuning.run import warn_about_similar_sweeps
from graftwork.tuning.search import FixedPoints
from graftwork.tuning.spec import TuneSpec
from graftwork.tuning.trial_store import TRIALS_FILE, Ledger
from graftwork.tuning.trials import TrialRecord
from tests.process_races import die_at

LOST = TrialFailure("lost", "the machine went")
MEMORY = TrialFailure("memory", "no room")


def train(**optim: Any) -> TrainSpec:
    tree = {"name": "t", "base": "b", "data": {"train": "t.jsonl"}, "optim": {"rows_per_step": 12, **optim}}
    return config.validate(TrainSpec, tree, where="t.yaml")


def as_task_error(error: Exception) -> exceptions.RayTaskError:
    """As it comes out of a trial's process."""
    return exceptions.RayTaskError("run_trial", f"Traceback\n{error}", error)


class OutOfMemoryError(RuntimeError):
    """torch's, which has this name, without torch's import."""


# What kind of failure it was.


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (as_task_error(NonFiniteLoss("training t, step 3 of 8", "the loss is nan")), "diverged"),
        (as_task_error(OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")), "memory"),
        (as_task_error(MemoryError()), "memory"),
        (exceptions.OutOfMemoryError("Task was killed due to the node running low on memory."), "memory"),
        ("Failure # 1\nTask was killed due to the node running low on memory.", "memory"),
        (exceptions.ActorDiedError(), "lost"),
        (exceptions.NodeDiedError("the node died"), "lost"),
        ("Failure # 1\nThe actor died because its node has died.", "lost"),
        (as_task_error(ValueError("row 3 has no prompt")), "error"),
    ],
)
def test_failures_are_told_apart(error: Exception | str, kind: str) -> None:
    assert failure_of(error).kind == kind


def test_memory_that_torch_cannot_have_is_told_as_such() -> None:
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert failure_of(as_task_error(caught.value)).kind == "memory"


def test_a_worker_that_the_kernel_killed_for_memory_ran_out_of_it(tmp_path: Path) -> None:
    assert failure_of(exceptions.ActorDiedError(), kernel_kills=1).kind == "memory"
    assert failure_of(as_task_error(ValueError("bad")), kernel_kills=1).kind == "error"
    (tmp_path / "vmstat").write_text("nr_free_pages 5\noom_kill 7\noom_kill_x 9\n")
    assert kernel_kills(tmp_path / "vmstat") == 7
    assert kernel_kills(tmp_path / "missing") == 0


def test_a_failure_is_told_in_one_line() -> None:
    ours = NonFiniteLoss("training t, step 3 of 8", "the loss is nan", "a loss must be finite", "lower optim.lr")
    assert failure_of(as_task_error(ours)).message == "NonFiniteLoss: training t, step 3 of 8: the loss is nan"
    assert failure_of(as_task_error(ValueError("first\nlast"))).message == "last"


# Whether it is run again.


def test_memory_is_halved_until_gradient_checkpointing_is_all_that_is_left() -> None:
    spec: TrainSpec | None = train(micro_batch=12)
    seen = []
    while spec is not None:
        seen.append((spec.optim.micro_batch, spec.optim.gradient_checkpointing))
        spec = shrunk(spec, 1)
    assert seen == [(12, False), (6, False), (3, False), (1, False), (1, True)]
    assert shrunk(train(micro_batch=12), 2) == train(micro_batch=3)
    assert shrunk(train(micro_batch=5), 1) == train(micro_batch=2), "five rows a pass at most are four in truth"


def test_a_trial_out_of_memory_is_run_again_with_less_and_says_so() -> None:
    record = TrialRecord("a", {}, ((4, 2.0),), "running", 4)
    changes = after(record, MEMORY, train(micro_batch=4), 2, smaller=True)
    assert (changes["state"], changes["smaller"], changes["retried"]) == ("pending", 1, 1)
    assert changes["notes"] == ("ran out of memory after step 4 (no room); run again with micro_batch=2 instead of 4",)
    for refused in (
        after(record, MEMORY, train(micro_batch=4), 2, smaller=False),
        after(record, MEMORY, train(micro_batch=4), 0, smaller=True),
        after(record, MEMORY, train(micro_batch=1, gradient_checkpointing=True), 2, smaller=True),
    ):
        assert refused == {"state": "failed", "error": "no room", "failure": "memory"}


def test_a_lost_trial_is_run_again_as_it_was_so_many_times() -> None:
    record = TrialRecord("a", {}, state="running")
    changes = after(record, LOST, train(), 2, smaller=True)
    assert (changes["state"], changes["smaller"], changes["retried"], changes["attempts"]) == ("pending", 0, 1, 2)
    assert "machine was lost after step 0" in changes["notes"][0]
    tired = TrialRecord("a", {}, state="running", retried=2)
    assert after(tired, LOST, train(), 2, smaller=True)["state"] == "failed"


@pytest.mark.parametrize("kind", ["diverged", "error"])
def test_what_would_fail_again_is_not_run_again(kind: Any) -> None:
    record = TrialRecord("a", {}, ((4, 2.0),), "running", 4)
    changes = after(record, TrialFailure(kind, "m"), train(), 9, smaller=True)
    assert changes == {"state": "failed", "error": "m", "failure": kind}, "its losses are kept"


def test_a_sweep_whose_first_trials_fail_alike_is_hopeless() -> None:
    def failed(name: str, error: str, **keys: Any) -> TrialRecord:
        return TrialRecord(name, {}, state="failed", error=error, **{"failure": "error", **keys})

    alike = [
        failed("a", "row 3 of 0xf3 is bad"),
        failed("b", "row 4 of 0xe5 is bad"),
        failed("c", "row 5 of a1 is bad"),
    ]
    error = hopeless(alike)
    assert error is not None
    assert "the first 3 failed alike: row 3 of 0xf3 is bad" in error.text()
    assert hopeless(alike[:2]) is None
    assert hopeless([*alike[:2], failed("c", "no such file")]) is None
    assert hopeless([*alike, TrialRecord("d", {}, ((4, 2.0),), "running", 4)]) is None, "one that works is enough"
    assert hopeless([failed(n, "nan", failure="diverged") for n in "abc"]) is None, "other values may not diverge"


# The ledger.


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    return RunPaths(Store(str(tmp_path)), "s", "0" * 64)


def written(run: RunPaths, *records: TrialRecord) -> Ledger:
    ledger = Ledger(run)
    ledger.records = {record.trial_id: record for record in records}
    ledger.write()
    return ledger


def test_a_rerun_keeps_what_diverged_and_what_is_known_of_the_others(run: RunPaths) -> None:
    diverged = TrialRecord("a", {"seed": 1}, ((4, 2.0),), "failed", 4, error="nan", failure="diverged")
    running = TrialRecord("b", {"seed": 2}, ((4, 2.0),), "running", 4, retried=2, smaller=1, notes=("less",))
    broken = TrialRecord("c", {"seed": 3}, state="failed", error="bad", failure="error", smaller=1)
    written(run, diverged, running, broken)
    again = Ledger(run)
    again.resume()
    assert again.trials[0] == diverged
    assert again.trials[1] == TrialRecord(
        "b",
        {"seed": 2},
        ((4, 2.0),),
        "pending",
        4,
        attempts=2,
        smaller=1,
        notes=("less", "the sweep ended while it was running, after step 4; run again"),
    )
    assert again.trials[2] == TrialRecord("c", {"seed": 3}, attempts=2)
    pending = again.next(FixedPoints((), ""))
    assert isinstance(pending, TrialRecord)
    assert pending.trial_id == "b"


def test_a_driver_that_dies_in_a_write_leaves_the_old_ledger_or_the_new(run: RunPaths) -> None:
    """A fork kills itself before each call that changes a file, from the first to the last."""
    before = TrialRecord("a", {"seed": 1}, ((4, 2.5),), "stopped", 4)
    found, moment, died = [], 0, True
    while died:
        moment += 1
        ledger = written(run, before)
        died = die_at(moment, lambda ledger=ledger: ledger.update("a", state="finished"))  # type: ignore[misc]
        again = Ledger(run)
        again.resume()
        found.append(again.records["a"])
    assert moment > 3
    assert found[0] == before
    assert found[-1] == replace(before, state="finished")
    assert set(map(repr, found)) == {repr(found[0]), repr(found[-1])}


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda text: text[: len(text) // 2], "not as a sweep writes it"),
        (lambda text: text.replace('"trials"', '"trails"'), "'trials' is missing"),
        (lambda text: text.replace('"finished"', '"done"'), "state: .* found 'done'"),
        (lambda text: text.replace("2.5", '"low"'), "losses.0.1: .* found 'low'"),
        (lambda text: text.replace('"steps"', '"step"'), "step is no field of a trial"),
        (lambda text: json.dumps({"trials": json.loads(text)["trials"] * 2}), "trial a is there twice"),
        (lambda text: text.replace("8,", "4,"), r"in the order of their steps, found \[4, 4\]"),
    ],
)
def test_a_torn_or_edited_ledger_is_refused(run: RunPaths, edit: Any, said: str) -> None:
    written(run, TrialRecord("a", {"seed": 1}, ((4, 2.5), (8, 1.5)), "finished", 8))
    text = run.store.read_text(*run.file(TRIALS_FILE))
    run.store.write_bytes(edit(text).encode(), *run.file(TRIALS_FILE))
    with pytest.raises(StorageError, match=said):
        Ledger(run).resume()


# Sweeps of the same name.


def sweep(root: Path, ranks: list[int], **keys: Any) -> TuneSpec:
    tree = train().model_dump(mode="json", exclude_defaults=True) | {"data": {"train": "t.jsonl", "eval": "e.jsonl"}}
    space = {"adapter.rank": {"kind": "choice", "values": ranks}}
    return config.validate(
        TuneSpec, {"name": "s", "root": str(root), "train": tree, "space": space, **keys}, where="s.yaml"
    )


def begun(spec: TuneSpec, digest: str, time: str, **status: Any) -> RunPaths:
    run = RunPaths(Store(spec.root), spec.name, digest)
    run.store.write_json(spec.model_dump(mode="json"), *run.spec())  # JSON is YAML
    run.store.write_json({"time": time}, *run.provenance())
    run.store.write_json(status, *run.status())
    return run


def test_a_sweep_with_another_space_says_that_it_begins_anew(tmp_path: Path) -> None:
    begun(sweep(tmp_path, [2]), "1" * 64, "2026-01-01T00:00:00", state="finished")
    run = begun(sweep(tmp_path, [4, 8], steps=20), "2" * 64, "2026-01-02T00:00:00", state="interrupted")
    written(run, TrialRecord("a", {}, ((4, 2.5),), "finished", 4), TrialRecord("b", {}))
    spec = sweep(tmp_path, [4, 16])
    here = RunPaths(Store(spec.root), spec.name, "3" * 64)
    (note,) = warn_about_similar_sweeps(spec, here)
    assert note == (
        "this begins a new sweep, s-33333333, and takes over no trial: s-22222222 (interrupted, 1 of 2 trials ended) "
        "differs in space.adapter.rank.values ([4, 8] there, [4, 16] here), steps (20 there, 12 here). "
        "With the same values the same command goes on with it"
    )
    begun(spec, "3" * 64, "2026-01-03T00:00:00", state="running")
    assert warn_about_similar_sweeps(spec, here) == [], "it goes on with its own"
