"""Sweeps whose trials keep checkpoints: populations, and long trials that go on after a kill."""

import json
from pathlib import Path

import pytest

from graftwork.training.loop import run_steps
from graftwork.training.objectives.rows import prepare
from graftwork.training.worker_messages import TrainJob
from graftwork.tuning.spec import TuneSpec
from tests.ray.test_sweep_soak import END_S, WITHIN_S, outcome, require_kept
from tests.ray.test_tune import rates, sweep, write_inputs
from tests.sweep_driver import Record, folder_of, ledger_of, start_sweep
from tests.train_driver import last_words
from tests.waiting import until

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]
PBT = {"kind": "pbt", "population": 3, "every": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def population(inputs: Path, root: Path) -> TuneSpec:
    spec = sweep(inputs, root, rates(0.01, 1e-4, 0.02), search=PBT)
    return spec.with_({"train.optim.schedule": "constant"})


def ended_with(spec: TuneSpec) -> Record:
    report = last_words(start_sweep(spec), END_S)
    assert "error" not in report, report
    return report


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TuneSpec, Record]:
    spec = population(inputs, tmp_path_factory.mktemp("population"))
    return spec, ended_with(spec)


def test_the_schedule_found_trained_in_one_go_gives_the_losses_of_its_segments(
    undisturbed: tuple[TuneSpec, Record],
) -> None:
    spec, report = undisturbed
    trials = {trial["trial_id"]: trial for trial in report["trials"]}
    second = report["trials"][3:]
    assert [trial["until"] for trial in report["trials"]] == [2] * 3 + [4] * 3
    assert second[1]["parent"] != report["trials"][1]["trial_id"], (
        "the member at 1e-4 learned nothing, and was replaced"
    )
    replaced = second[1]
    assert replaced["values"]["optim.factors"][0][0] == 0.5
    whole = spec.train.with_({**replaced["values"], "num_workers": 1, "data.eval_rows": spec.eval_rows})
    result = run_steps(TrainJob(whole, prepare(whole), max_steps=4, eval_every=2), lambda _: True)
    chain = [*trials[replaced["parent"]]["losses"], *replaced["losses"]]
    assert [list(loss) for loss in result.eval_loss] == chain
    assert not list(Path(spec.root).glob("runs/*/trials")), "checkpoints are removed at the end"


def test_a_population_whose_driver_is_killed_goes_on_alike(
    undisturbed: tuple[TuneSpec, Record], inputs: Path, tmp_path: Path
) -> None:
    spec = population(inputs, tmp_path)
    driver = start_sweep(spec)
    try:
        until(lambda: len(ledger_of(spec)) == 5, "the second generation has begun", driver, within_s=WITHIN_S)
    finally:
        driver.kill()
        driver.wait()
    kept = {trial["trial_id"]: trial for trial in ledger_of(spec) if trial["state"] in ("stopped", "finished")}
    assert len(kept) >= 3
    report = ended_with(spec)
    assert outcome(report["trials"]) == outcome(undisturbed[1]["trials"])
    require_kept(kept, report)


def test_a_trial_goes_on_from_its_checkpoint(inputs: Path, tmp_path: Path) -> None:
    keys = {"steps": 8, "report_every": 2, "checkpoint_every": 2}
    undisturbed = ended_with(sweep(inputs, tmp_path / "undisturbed", rates(0.01), **keys))
    spec = sweep(inputs, tmp_path / "killed", rates(0.01), **keys)
    driver = start_sweep(spec)
    try:
        until(
            lambda: any(trial["steps"] >= 6 for trial in ledger_of(spec)),
            "step 6 is reported",
            driver,
            pause_s=0.001,
            within_s=WITHIN_S,
        )
    finally:
        driver.kill()
        driver.wait()
    driver = start_sweep(spec)
    started: list[int] = []

    def went_on() -> bool:
        folder = folder_of(spec)
        found = list(folder.glob("trials/*/starts.json")) if folder is not None else []
        started[:] = [start["step"] for start in json.loads(found[0].read_text())] if found else []
        return len(started) > 1

    try:
        until(went_on, "the second attempt has begun", driver, within_s=WITHIN_S)
        report = last_words(driver, END_S)
    finally:
        driver.kill()
    assert started[0] == 0
    assert started[1] in (2, 4, 6)
    assert report["trials"][0]["losses"] == undisturbed["trials"][0]["losses"]
    assert not list(Path(spec.root).glob("runs/*/trials"))
