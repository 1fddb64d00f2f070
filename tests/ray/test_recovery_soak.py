"""Kills of runs on two raylets whose root is on S3: one of S3 in CI, fifty at random moments in `make soak`."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from graftwork.artifacts.registry import open_adapter, verify_adapter
from graftwork.storage.store import RunPaths, Store
from graftwork.training.checkpoint import Checkpoints
from graftwork.training.checkpoint_resume import read_starts
from graftwork.training.loop import run_steps
from graftwork.training.objectives.rows import prepare
from graftwork.training.run import run_paths
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import TrainJob
from tests.ray.test_recovery import (
    AHEAD,
    PER_STEP,
    ROWS,
    WITHIN_S,
    noted_lines,
    require_each_row_once_an_epoch,
    rows_of_steps,
    steps_taken_again,
)
from tests.ray_cluster import Raylet, Raylets
from tests.s3.conftest import use
from tests.s3_server import S3Server, running
from tests.train_driver import last_words, start_driver
from tests.training import task
from tests.waiting import until

KILLS, PIECES = 50, 10
KINDS = ("worker", "raylet", "driver", "s3", "told")
STEPS, EVERY = 600, 20
END_S = 240.0


@dataclass
class Disturbed:
    """A run whose parts are killed at random."""

    raylets: Raylets
    s3_server: S3Server
    spec: TrainSpec
    run: RunPaths
    noted: Path
    rng: random.Random
    nodes: list[Raylet] = field(default_factory=list)
    driver: "subprocess.Popen[str] | None" = None
    done: list[str] = field(default_factory=list)
    killed_at: list[float] = field(default_factory=list)

    def start(self) -> None:
        """(Re)start the driver."""
        self.driver = start_driver(self.spec, self.raylets.address, self.noted, self.s3_server.environment())

    def passes(self) -> int:
        """Forward passes of the run's newest workers, counted without asking S3."""
        return sum(len(lines) for lines in noted_lines(self.noted)) if self.noted.exists() else 0

    def kill(self, kind: str) -> None:
        """Kill one part, at a random moment while steps are taken. What was killed comes back."""
        before = self.passes()
        until(lambda: self.passes() > before + 8, f"steps are taken after {self.done}", self.driver, within_s=WITHIN_S)
        time.sleep(self.rng.uniform(0.0, 2.0))
        self.killed_at.append(time.time())
        {
            "worker": lambda: self.end_worker(signal.SIGKILL),
            "told": lambda: self.end_worker(signal.SIGTERM),
            "raylet": self.kill_raylet,
            "driver": self.kill_driver,
            "s3": self.kill_s3,
        }[kind]()
        self.done.append(kind)

    def end_worker(self, number: signal.Signals) -> None:
        until(
            lambda: bool(workers_of(self.nodes)),
            f"a worker is at work after {self.done}",
            self.driver,
            within_s=WITHIN_S,
        )
        self.rng.choice(workers_of(self.nodes)).send_signal(number)

    def kill_raylet(self) -> None:
        self.nodes.pop(self.rng.randrange(len(self.nodes))).kill()
        self.nodes.append(self.raylets.add())

    def kill_driver(self) -> None:
        assert self.driver is not None, "started"
        self.driver.kill()
        self.driver.wait()
        self.start()

    def kill_s3(self) -> None:
        """In an upload: a checkpoint lies in this machine's cache until it is sent."""
        cache = Checkpoints(self.run)
        here = set(os.listdir(cache.work_dir()))
        until(
            lambda: bool(set(os.listdir(cache.work_dir())) - here),
            "a checkpoint is written",
            self.driver,
            within_s=WITHIN_S,
        )
        time.sleep(self.rng.uniform(0.0, 0.2))
        self.s3_server.kill()
        time.sleep(self.rng.uniform(0.0, 2.0))
        self.s3_server.start()

    def end(self) -> dict[str, Any]:
        assert self.driver is not None, "started"
        report = last_words(self.driver, END_S)
        assert "error" not in report, f"after {self.done}: {report}"
        return report


def seconds_to_next_pass(disturbed: Disturbed) -> list[float]:
    """From each kill to the first forward pass of new workers; S3's deaths need none."""
    births = sorted(lines[0]["at"] for lines in noted_lines(disturbed.noted))
    pairs = zip(disturbed.done, disturbed.killed_at, strict=True)
    return [
        round(min((born for born in births if born > at), default=at) - at, 1) for kind, at in pairs if kind != "s3"
    ]


def workers_of(nodes: list[Raylet]) -> list[psutil.Process]:
    below = [child for node in nodes for child in psutil.Process(node.pid).children(recursive=True)]
    return [process for process in below if "TrainWorker" in " ".join(process.cmdline())]


@pytest.fixture(scope="module")
def s3_server() -> Iterator[S3Server]:
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GRAFTWORK_CACHE of all processes of the soak."""
    return tmp_path_factory.mktemp("soak") / "cache"


@pytest.fixture(scope="module")
def cluster(s3_server: S3Server, cache: Path) -> Iterator[tuple[Raylets, list[Raylet]]]:
    raylets = Raylets({**s3_server.environment(), "GRAFTWORK_CACHE": str(cache)})
    try:
        yield raylets, [raylets.add(), raylets.add()]
    finally:
        raylets.close()


def spec_of(folder: Path, root: str, steps: int = STEPS) -> TrainSpec:
    optim = {"lr": 5e-3, "epochs": steps * PER_STEP / ROWS, "micro_batch": 4}
    return task(folder, **{"root": root, "optim": optim, "checkpoint_every": EVERY, "eval_every": 150})


@pytest.fixture(scope="module")
def undisturbed(
    s3_server: S3Server, cluster: tuple[Raylets, list[Raylet]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The same run on two workers, left alone; its root is a folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    spec = spec_of(folder, str(folder / "root"))
    driver = start_driver(spec, cluster[0].address, folder / "noted")
    report = last_words(driver, END_S)
    return {**report, "weights": weights_of(spec, report)}


def weights_of(spec: TrainSpec, report: dict[str, Any]) -> str:
    """sha256 of the published weights."""
    return open_adapter(Store(spec.root), spec.name, report["version"]).files["adapter_model.safetensors"].sha256


def run_with_kills(
    kinds: list[str], spec: TrainSpec, s3_server: S3Server, cluster: tuple[Raylets, list[Raylet]], rng: random.Random
) -> dict[str, Any]:
    """Return the run's report: every row is seen once an epoch, no start is behind a commit, the adapter is whole."""
    run = run_paths(spec)
    disturbed = Disturbed(
        cluster[0], s3_server, spec, run, Path(str(spec.data.train)).parent / "noted", rng, cluster[1]
    )
    disturbed.start()
    try:
        for kind in kinds:
            disturbed.kill(kind)
        report = disturbed.end()
    finally:
        assert disturbed.driver is not None
        disturbed.driver.kill()
    begun = read_starts(run)
    print(f"killed {disturbed.done}; went on from {[start['step'] for start in begun]}")
    print(f"seconds from kill to the next forward pass: {seconds_to_next_pass(disturbed)}")
    assert verify_adapter(Store(spec.root), spec.name, report["version"]) == []
    again = steps_taken_again(disturbed.noted, begun)
    print(f"steps taken again: {again}")
    assert max(again, default=0) <= 2 * EVERY + AHEAD, "one interval, and what was being sent"
    assert not [note for note in report["notes"] if "damaged" in note]
    steps = len(report["train_loss"])
    require_each_row_once_an_epoch(rows_of_steps(disturbed.noted, begun, steps), steps)
    return report


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_run_outlives_its_store_in_an_upload(
    s3_server: S3Server,
    cluster: tuple[Raylets, list[Raylet]],
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The soak in short: one kill in a run of 120 steps. Source of the curve: the loop on one worker, undisturbed.

    Deaths of workers, drivers and raylets are tested in test_train.py and test_recovery.py.
    """
    use(s3_server, monkeypatch, cache.parent)
    spec = spec_of(tmp_path, f"s3://{s3_server.bucket}/short", steps=120)
    report = run_with_kills(["s3"], spec, s3_server, cluster, random.Random(0))
    alone = spec.with_({"root": str(tmp_path / "alone")})
    undisturbed = run_steps(TrainJob(alone, prepare(alone)), lambda _: True)
    assert dict(map(tuple, report["train_loss"])) == pytest.approx(dict(undisturbed.train_loss), rel=1e-2, abs=5e-3)


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("piece", range(PIECES))
def test_killed_at_random_the_run_is_that_of_an_undisturbed_one(
    piece: int,
    s3_server: S3Server,
    cluster: tuple[Raylets, list[Raylet]],
    undisturbed: dict[str, Any],
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Losses and the adapter's bytes are equal."""
    use(s3_server, monkeypatch, cache.parent)
    rng = random.Random(piece)
    kinds = [KINDS[(piece * (KILLS // PIECES) + number) % len(KINDS)] for number in range(KILLS // PIECES)]
    rng.shuffle(kinds)
    print(f"piece {piece}: kills {kinds}")
    spec = spec_of(tmp_path, f"s3://{s3_server.bucket}/piece{piece}-{rng.randrange(10**9)}")
    report = run_with_kills(kinds, spec, s3_server, cluster, rng)
    assert report["train_loss"] == undisturbed["train_loss"]
    assert report["eval_loss"] == undisturbed["eval_loss"]
    assert weights_of(spec, report) == undisturbed["weights"]
