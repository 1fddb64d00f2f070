"""TensorBoard logs of a sweep, read back as TensorBoard does: records, then protocol buffers, then the hparams plugin's
data."""

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData
from tensorboardX.record_writer import masked_crc32c

from graftwork.storage.store import RunPaths, Store
from graftwork.tuning.tensorboard import EventLogs
from graftwork.tuning.trials import TrialRecord

BEGAN = 1_700_000_000.0
FIRST = TrialRecord(
    "aaaa1111", {"optim.lr": 0.004, "adapter": {"kind": "lora", "rank": 8}}, state="running", started_s=2.0
)
DONE = replace(FIRST, losses=((2, 1.5), (4, 1.25)), steps=4, state="finished", wall_s=8.0, metrics={"step_s": 1.5})
LOST = replace(FIRST, trial_id="bbbb2222", losses=((2, 3.0),), steps=2, state="failed", error="the loss is nan")


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    return RunPaths(Store(str(tmp_path)), "sweep", "0" * 64)


def events(run: RunPaths, trial_id: str) -> list[Any]:
    """Every event of a trial's only file; raises where a checksum is wrong."""
    (file,) = run.store.local_dir(*run.file("tensorboard", trial_id)).glob("*tfevents*")
    data, found = file.read_bytes(), []
    while data:
        (length, crc_of_length) = struct.unpack_from("<QI", data)
        body = data[12 : 12 + length]
        assert crc_of_length == masked_crc32c(data[:8])
        assert struct.unpack_from("<I", data, 12 + length)[0] == masked_crc32c(body)
        found.append(Event.FromString(body))
        data = data[16 + length :]
    return found


def scalars(run: RunPaths, trial_id: str) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for event in events(run, trial_id):
        for value in event.summary.value:
            if not value.metadata.plugin_data.plugin_name:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def plugin(run: RunPaths, trial_id: str) -> dict[str, Any]:
    values = [value for event in events(run, trial_id) for value in event.summary.value]
    return {
        value.tag.removeprefix("_hparams_/"): HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for value in values
        if value.metadata.plugin_data.plugin_name == "hparams"
    }


def test_losses_costs_and_values_are_there(run: RunPaths) -> None:
    logs = EventLogs(run, BEGAN)
    for trial in (FIRST, replace(FIRST, losses=DONE.losses[:1], steps=2, wall_s=5.0), DONE, DONE):
        logs.follow([trial])
    assert events(run, "aaaa1111")[0].file_version == "brain.Event:2"
    assert scalars(run, "aaaa1111") == {
        "eval_loss": [(2, 1.5), (4, 1.25)],
        "step_s": [(4, 1.5)],
        "wall_s": [(4, 8.0)],
        "peak_rss_bytes": [(4, 0.0)],
    }
    times = [event.wall_time - BEGAN for event in events(run, "aaaa1111") if event.step]
    assert times == [7.0, 10.0, 10.0, 10.0]
    found = plugin(run, "aaaa1111")
    values = found["session_start_info"].session_start_info.hparams
    assert values["optim.lr"].number_value == 0.004
    assert values["adapter"].string_value == "lora rank=8"
    assert [metric.name.tag for metric in found["experiment"].experiment.metric_infos] == ["eval_loss"]
    assert found["session_end_info"].session_end_info.status == 1


def test_a_failed_trial_is_marked(run: RunPaths) -> None:
    logs = EventLogs(run, BEGAN)
    logs.follow([DONE, LOST])
    assert scalars(run, "bbbb2222")["eval_loss"] == [(2, 3.0)]
    assert plugin(run, "bbbb2222")["session_end_info"].session_end_info.status == 2


def test_a_trial_that_is_run_again_has_no_event_twice(run: RunPaths) -> None:
    logs = EventLogs(run, BEGAN)
    for trial in (LOST, replace(FIRST, trial_id="bbbb2222"), replace(DONE, trial_id="bbbb2222")):
        logs.follow([trial])
    assert scalars(run, "bbbb2222")["eval_loss"] == list(DONE.losses)
    assert plugin(run, "bbbb2222")["session_end_info"].session_end_info.status == 1


def test_a_resumed_sweep_writes_each_event_once(run: RunPaths) -> None:
    before = EventLogs(run, BEGAN)
    before.follow([DONE, replace(FIRST, trial_id="bbbb2222", losses=((2, 1.0),), steps=2)])
    before.close()
    after = EventLogs(run, BEGAN)
    after.follow([DONE])
    after.follow([DONE, replace(FIRST, trial_id="bbbb2222")])
    after.follow([DONE, replace(DONE, trial_id="bbbb2222")])
    assert scalars(run, "aaaa1111")["eval_loss"] == scalars(run, "bbbb2222")["eval_loss"] == list(DONE.losses)


def test_what_a_driver_was_killed_in_can_be_read(run: RunPaths) -> None:
    """Every report is on disk when the trial goes on, without a close."""
    EventLogs(run, BEGAN).follow([replace(FIRST, losses=((2, 1.5),), steps=2)])
    assert scalars(run, "aaaa1111") == {"eval_loss": [(2, 1.5)]}
