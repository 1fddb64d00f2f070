"""Machines that die, that are taken away and that come back: the same rows, the same curve, the same adapter."""

import json
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from graftwork.storage.store import RunPaths
from graftwork.training.checkpoint_resume import read_starts
from graftwork.training.loop import run_steps
from graftwork.training.objectives.rows import prepare
from graftwork.training.run import run_paths
from graftwork.training.worker_messages import TrainJob, read_steps
from tests.ray_cluster import Raylets
from tests.train_driver import last_words, start_driver
from tests.training import task
from tests.waiting import until

WITHIN_S = 200.0
ROWS, PER_STEP = 48, 8


def last_step(run: RunPaths) -> int:
    steps = read_steps(run)
    return steps[-1].step if steps else 0


def noted_lines(noted: Path) -> list[list[dict[str, Any]]]:
    """What each worker process wrote; a last line that a kill left half is left out."""
    texts = [path.read_text().splitlines() for path in noted.iterdir()]
    return [[json.loads(line) for line in lines if line.endswith("}")] for lines in texts if lines]


def rows_of_steps(noted: Path, begun: list[dict[str, Any]], steps: int) -> dict[int, list[int]]:
    """Rows that each step took, in the attempt whose result counts: the last that came to it.

    A worker is a new process after each start, so a file belongs to the start before its first line. The data loader
    reads ahead, so what lies past the last step of an attempt is dropped by the next start, and at the end.
    """
    taken: dict[int, list[int]] = {}
    ends = [float(attempt["at"]) for attempt in begun[1:]] + [time.time()]
    for attempt, end in zip(begun, ends, strict=True):
        taken = {step: rows for step, rows in taken.items() if step <= attempt["step"]}
        for lines in noted_lines(noted):
            if attempt["at"] <= lines[0]["at"] < end:
                passes = PER_STEP // attempt["workers"] // len(lines[0]["rows"])
                for number, line in enumerate(lines):
                    taken.setdefault(attempt["step"] + number // passes + 1, []).extend(line["rows"])
    return {step: rows for step, rows in taken.items() if step <= steps}


def steps_taken_again(noted: Path, begun: list[dict[str, Any]]) -> list[int]:
    """For each start after the first: steps that the attempt before had begun, past what was gone on from."""
    found = []
    for attempt, following in pairwise(begun):
        batches = [
            len(lines) * len(lines[0]["rows"]) * attempt["workers"] // PER_STEP
            for lines in noted_lines(noted)
            if attempt["at"] <= lines[0]["at"] < following["at"]
        ]
        found.append(attempt["step"] + max(batches, default=0) - following["step"])
    return found


def require_each_row_once_an_epoch(taken: dict[int, list[int]], steps: int) -> None:
    per_epoch = ROWS // PER_STEP
    assert sorted(taken) == list(range(1, steps + 1))
    for first in range(1, steps + 1, per_epoch):
        seen = Counter(row for step in range(first, first + per_epoch) for row in taken[step])
        assert seen == Counter(range(ROWS)), f"steps {first} to {first + per_epoch - 1}"


@pytest.fixture
def raylets() -> Iterator[Raylets]:
    cluster = Raylets()
    try:
        yield cluster
    finally:
        cluster.close()


STEPS, EVERY = 300, 25
AHEAD = 10
"""Steps that a commit takes, and batches that the data loader reads ahead."""


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_lost_and_a_drained_machine_cost_no_row_and_change_no_loss(raylets: Raylets, tmp_path: Path) -> None:
    """Two workers; a raylet is killed and one worker goes on; its machine is drained and it moves to a new one."""
    spec = task(
        tmp_path,
        **{
            "optim": {"lr": 2e-3, "epochs": STEPS * PER_STEP / ROWS, "micro_batch": 2},
            "checkpoint_every": EVERY,
            "eval_every": 100,
            "recovery": {"min_workers": 1, "wait_s": 4.0},
        },
    )
    first, second = raylets.add(), raylets.add()
    run, noted = run_paths(spec), tmp_path / "noted"
    driver = start_driver(spec, raylets.address, noted)
    try:
        until(lambda: last_step(run) > EVERY + 5, "the first checkpoint is passed", driver, within_s=WITHIN_S)
        second.kill()
        until(lambda: len(read_starts(run)) == 2, "one worker goes on", driver, within_s=WITHIN_S)
        third = raylets.add()
        until(
            lambda: last_step(run) > int(str(read_starts(run)[1]["step"])) + 10,
            "it takes steps",
            driver,
            within_s=WITHIN_S,
        )
        raylets.drain(first)
        until(lambda: len(read_starts(run)) == 3, "it moves", driver, within_s=WITHIN_S)
        first.kill()
        report = last_words(driver, WITHIN_S)
    finally:
        driver.kill()
    assert third.pid, "the machine that it moved to"
    begun = read_starts(run)
    assert [start["workers"] for start in begun] == [2, 1, 1]
    assert int(str(begun[1]["step"])) % EVERY == 0
    assert "was reached by 2 workers, 1 go on" in str(begun[1]["notes"])
    killed, moved = steps_taken_again(noted, begun)
    assert 0 <= killed <= EVERY + AHEAD
    assert 0 <= moved <= AHEAD, "saved when the notice came, not at the next interval"
    require_each_row_once_an_epoch(rows_of_steps(noted, begun, STEPS), STEPS)
    undisturbed = run_steps(TrainJob(spec, prepare(spec)), lambda _: True)
    assert dict(map(tuple, report["train_loss"])) == pytest.approx(dict(undisturbed.train_loss), rel=1e-2, abs=5e-3)
