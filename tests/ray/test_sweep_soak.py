"""Sweeps whose driver, machines and storage are killed at random moments: `make soak`, in pieces."""

import os
import random
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from graftwork.storage.local import TMP_PREFIX
from graftwork.storage.store import Store
from graftwork.tuning.spec import TuneSpec
from tests.ray.test_tune import GOOD, rates, sweep, write_inputs
from tests.ray_cluster import Raylet, Raylets
from tests.s3.conftest import use
from tests.s3_server import S3Server, running
from tests.sweep_driver import Record, alive, folder_of, ledger_of, processes_of, start_sweep
from tests.train_driver import last_words
from tests.waiting import until

KILLS, PIECES = 20, 10
KINDS = ("anywhere", "report", "write", "anywhere")
WITHIN_S, END_S = 120.0, 240.0
ASHA = {"grace_steps": 2, "reduction": 2}
SPACE = rates(1e-3, GOOD, 1e-5, 1e38)
"""Two run to their end, one is stopped early, one diverges."""
LONGER: dict[str, Any] = {"steps": 24, "report_every": 2}
"""So that a second kill still finds trials at work."""

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]


def outcome(trials: list[Record]) -> list[tuple[Any, ...]]:
    """What a sweep found, without times."""
    return [(t["trial_id"], t["state"], t["steps"], [list(loss) for loss in t["losses"]]) for t in trials]


def ended(trials: list[Record]) -> dict[str, Record]:
    """Trials that no rerun may touch, whole."""
    return {t["trial_id"]: t for t in trials if t["state"] in ("finished", "stopped") or t["failure"] == "diverged"}


def require_kept(before: dict[str, Record], report: Record) -> None:
    now = {t["trial_id"]: t for t in report["trials"]}
    for trial_id, record in before.items():
        assert {key: value for key, value in now[trial_id].items() if value != record[key] and key != "losses"} == {}
        assert [list(loss) for loss in now[trial_id]["losses"]] == record["losses"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


# The driver.


@dataclass
class Killed:
    """A sweep whose driver is killed."""

    spec: TuneSpec
    rng: random.Random
    driver: "subprocess.Popen[str]" = field(init=False)
    kept: dict[str, Record] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)

    def start(self) -> None:
        self.driver = start_sweep(self.spec)

    def kill(self, kind: str) -> None:
        """Kill the driver some writes of the ledger further on: a moment after one, right after, or in the middle."""
        for _ in range(self.rng.randrange(4)):
            self._next_write()
        if kind == "anywhere":
            time.sleep(self.rng.uniform(0, 3))
        elif kind == "report":
            self._next_write()
            time.sleep(self.rng.uniform(0, 0.01))
        else:
            until(self._is_writing, "a write has begun", self.driver, pause_s=0.0, within_s=WITHIN_S)
        children = processes_of(self.driver)
        self.driver.kill()
        self.driver.wait()
        self.kept |= ended(ledger_of(self.spec))
        self.done.append(f"{kind} with {[t['state'] for t in ledger_of(self.spec)]}")
        end = time.monotonic() + WITHIN_S
        while left := [process for process in children if alive(process)]:
            assert time.monotonic() < end, f"left behind: {left}"
            time.sleep(0.1)

    def _next_write(self) -> None:
        before = self._stamp()
        until(
            lambda: self._stamp() != before,
            f"the ledger is written after {self.done}",
            self.driver,
            pause_s=0.0005,
            within_s=WITHIN_S,
        )

    def _stamp(self) -> int:
        folder = folder_of(self.spec)
        return (folder / "trials.json").stat().st_mtime_ns if folder and (folder / "trials.json").exists() else 0

    def _is_writing(self) -> bool:
        folder = folder_of(self.spec)
        return folder is not None and any(name.startswith(TMP_PREFIX) for name in os.listdir(folder))


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Record:
    spec = sweep(inputs, tmp_path_factory.mktemp("undisturbed"), SPACE, max_concurrent=1, num_trials=4, scheduler=ASHA)
    report = last_words(start_sweep(spec), END_S)
    assert "error" not in report, report
    return report


@pytest.mark.parametrize("piece", range(PIECES))
def test_a_driver_killed_at_random_points_repeats_nothing_and_finds_the_same(
    piece: int, inputs: Path, undisturbed: Record, tmp_path: Path
) -> None:
    """Nor does it leave a process behind."""
    rng = random.Random(piece)
    kinds = [KINDS[(piece + number) % len(KINDS)] for number in range(KILLS // PIECES)]
    spec = sweep(inputs, tmp_path, SPACE, max_concurrent=1, num_trials=4, scheduler=ASHA)
    killed = Killed(spec, rng)
    killed.start()
    try:
        for kind in kinds:
            killed.kill(kind)
            killed.start()
        report = last_words(killed.driver, END_S)
    finally:
        killed.driver.kill()
    print(f"piece {piece}: killed {killed.done}; attempts {[t['attempts'] for t in report['trials']]}")
    assert outcome(report["trials"]) == outcome(undisturbed["trials"])
    assert report["best_id"] == undisturbed["best_id"]
    require_kept(killed.kept, report)
    assert sum(t["attempts"] - 1 for t in report["trials"]) <= len(kinds), "one trial was running at each kill"


# Machines.


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Raylets, list[Raylet]]]:
    raylets = Raylets()
    try:
        yield raylets, [raylets.add(), raylets.add()]
    finally:
        raylets.close()


@pytest.fixture(scope="module")
def on_nodes(cluster: tuple[Raylets, list[Raylet]], inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Record:
    spec = sweep(inputs, tmp_path_factory.mktemp("on-nodes"), SPACE, num_trials=4, **LONGER)
    report = last_words(start_sweep(spec, address=cluster[0].address), END_S)
    assert "error" not in report, report
    return report


@pytest.mark.parametrize("piece", range(PIECES))
def test_trials_of_machines_killed_at_random_points_run_again_elsewhere(
    piece: int, cluster: tuple[Raylets, list[Raylet]], on_nodes: Record, inputs: Path, tmp_path: Path
) -> None:
    """Two machines of one CPU, two trials at a time; a new machine comes for each that was killed."""
    rng, (raylets, nodes) = random.Random(100 + piece), cluster
    spec = sweep(inputs, tmp_path, SPACE, num_trials=4, retries=KILLS, **LONGER)
    driver = start_sweep(spec, address=raylets.address)
    kept: dict[str, Record] = {}
    done: list[str] = []
    try:
        for _ in range(KILLS // PIECES):
            before = sum(len(t["losses"]) for t in ledger_of(spec))
            running = lambda: any(t["state"] == "running" for t in ledger_of(spec))  # noqa: E731
            until(running, f"a trial runs after {done}", driver, within_s=WITHIN_S)
            time.sleep(rng.uniform(0, 3))
            assert driver.poll() is None, f"the sweep ended before the kill after {done}"
            nodes.pop(rng.randrange(len(nodes))).kill()
            nodes.append(raylets.add())
            kept |= ended(ledger_of(spec))
            done.append(f"with {before} reports, {[t['state'] for t in ledger_of(spec)]}")
        report = last_words(driver, END_S)
    finally:
        driver.kill()
    notes = [note for t in report["trials"] for note in t["notes"] if "lost" in note]
    print(f"piece {piece}: killed {done}; run again: {notes}")
    assert outcome(report["trials"]) == outcome(on_nodes["trials"])
    assert report["best_id"] == on_nodes["best_id"]
    require_kept(kept, report)
    assert len(notes) == sum(t["retried"] for t in report["trials"])


# Storage.


@pytest.fixture(scope="module")
def s3_server() -> Iterator[S3Server]:
    with running() as server:
        yield server


def test_storage_that_comes_back_only_delays_and_one_that_does_not_ends_the_sweep(
    s3_server: S3Server, undisturbed: Record, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rerun goes on where the second outage ended it."""
    use(s3_server, monkeypatch, tmp_path)
    root = Store(f"s3://{s3_server.bucket}/{tmp_path.name}")
    spec = sweep(inputs, tmp_path, SPACE, max_concurrent=1, num_trials=4, scheduler=ASHA).with_({"root": root.uri})
    driver = start_sweep(spec.with_({"train.checkpoints.outage_s": 60}), s3_server.environment())
    try:
        until(lambda: len(ended(ledger_of(spec))) == 1, "one trial has ended", driver, pause_s=0.2, within_s=WITHIN_S)
        s3_server.kill()
        assert driver.stdout is not None
        assert "storage is out of reach" in driver.stdout.readline()
        s3_server.start()
        until(
            lambda: len(ended(ledger_of(spec))) == 3, "three trials have ended", driver, pause_s=0.2, within_s=WITHIN_S
        )
    finally:
        driver.kill()
        driver.wait()
    driver = start_sweep(spec.with_({"train.checkpoints.outage_s": 1}), s3_server.environment())
    try:
        until(
            lambda: len(ended(ledger_of(spec))) == 4, "four trials have ended", driver, pause_s=0.2, within_s=WITHIN_S
        )
        kept = ended(ledger_of(spec))
        s3_server.kill()
        error = last_words(driver, WITHIN_S)
    finally:
        driver.kill()
    assert error["error"] == "StoreUnreachable"
    assert "not written for 1 s" in error["text"]
    assert "run the same command when it is back" in error["text"]
    s3_server.start()
    report = last_words(start_sweep(spec, s3_server.environment()), END_S)
    assert outcome(report["trials"]) == outcome(undisturbed["trials"])
    require_kept(kept, report)
