"""ZeRO runs that go on with another number of workers: the curve is that of a run that was left alone."""

from pathlib import Path

import pytest

from graftwork.storage.store import RunPaths, Store
from graftwork.training.checkpoint_resume import universal_of
from graftwork.training.loop import run_steps
from graftwork.training.objectives.rows import prepare
from graftwork.training.worker_messages import TrainJob
from tests.ranks import Task, train_on
from tests.training import task

FULL: dict[str, object] = {"adapter": {"kind": "full"}, "optim.lr": 1e-3, "optim.weight_decay": 0.1}
FEWER: dict[str, dict[str, object]] = {"zero1": {}, "zero2": {}, "zero3": {}, "zero2 full": FULL, "zero3 full": FULL}
MORE: dict[str, dict[str, object]] = {"zero2": {}, "zero3": {}}


def job(folder: Path, name: str, changes: dict[str, object]) -> TrainJob:
    """Twelve steps on rows of one folder, checkpoints in a folder of the case's own."""
    usual = {"quant.kind": "none", "optim.micro_batch": 2, "strategy.kind": name.split()[0]}
    spec = task(folder, **{**usual, **changes})
    return TrainJob(spec, prepare(spec), RunPaths(Store(str(folder / name.replace(" ", "-"))), "colours", "0" * 64))


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_zero_goes_on_with_fewer_and_with_more_workers(tmp_path: Path) -> None:
    """Two ranks to one and one to two, from the checkpoint of step 4 (every four) to the end, step 12."""
    fewer = {name: job(tmp_path / "fewer", name, changes) for name, changes in FEWER.items()}
    more = {name: job(tmp_path / "more", name, changes) for name, changes in MORE.items()}
    train_on(2, {name: Task(one, stop_at=4) for name, one in fewer.items()}, tmp_path / "two")
    begun = {f"begin {name}": Task(one, stop_at=4) for name, one in more.items()}
    one_rank = train_on(1, {**{name: Task(one) for name, one in fewer.items()}, **begun}, tmp_path / "one")
    two_ranks = train_on(2, {name: Task(one) for name, one in more.items()}, tmp_path / "two again")
    for jobs, ended in ((fewer, one_rank), (more, two_ranks)):
        for name, one in jobs.items():
            assert ended[name].steps == tuple(range(5, 13)), name
            plain = TrainJob(one.spec.with_({"strategy": {"kind": "ddp"}}), one.data)
            alone = run_steps(plain, lambda _: True)
            assert ended[name].losses == pytest.approx([loss for _, loss in alone.train_loss], rel=1e-4), name
            assert one.run is not None
            left = universal_of(one.run.store.local_dir(*one.run.checkpoints("checkpoint-4")))
            assert not left.exists(), "made to be loaded, and of no use afterwards"
