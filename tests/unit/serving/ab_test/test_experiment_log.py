"""The log of an experiment: whole segments, duplicates once, damage told, order by writing."""

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from graftwork.errors import StorageError
from graftwork.serving.ab_test.log import Assignment, LogRow, LogSegment, Recorder, Segments, SegmentWriter, parse_name
from graftwork.serving.ab_test.log_reader import ExperimentLog, columns_of_batch, merged_parquet, read_log
from graftwork.storage.store import Store

FOLDER = ("experiments", "x-1", "log")


def answer(number: int, **changed: Any) -> LogRow:
    usual: dict[str, Any] = {
        "kind": "answer",
        "experiment": "x-1",
        "at": 1000.0 + number,
        "request_id": f"r{number}",
        "unit": f"u{number}",
        "arm": "ab"[number % 2],
        "probability": 0.5,
        "output": "so, „quoted“\n",
        "scores": {"form": float(number % 2)},
        "retrieved_ids": ("p1", "p2"),
        "prompt_tokens": 9,
        "latency_ms": 12.5,
    }
    return LogRow(**{**usual, **changed})


def given(number: int, metric: str, value: float) -> LogRow:
    return LogRow(
        kind="score", experiment="x-1", at=5.0, request_id=f"r{number}", scores={metric: value}, detail=metric
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def write(store: Store, *batches: Sequence[LogRow]) -> SegmentWriter:
    writer = SegmentWriter(Segments(store, FOLDER), merge_at=4)
    for batch in batches:
        writer.publish(batch)
    return writer


def read(store: Store) -> tuple[list[LogRow], ExperimentLog]:
    log = ExperimentLog(store, FOLDER)
    return list(log.rows()), log


def test_what_was_written_is_read_back_in_the_order_of_writing(store: Store) -> None:
    rows = [answer(n, at=10_000.0 - n) for n in range(7)]  # a clock that runs backwards changes nothing
    event = LogRow(kind="event", experiment="x-1", at=1.0, event="start", detail=json.dumps({"weights": {"a": 1.0}}))
    write(store, [event, *rows[:3]], rows[3:])
    write(store, [answer(8, error="engine_lost", output=None, scores={}), given(1, "thumbs", 1.0)])
    found, log = read(store)
    assert found == [
        event,
        *rows,
        answer(8, error="engine_lost", output=None, scores={}),
        given(1, "thumbs", 1.0),
    ]
    assert (log.health.rows, log.health.segments, log.health.duplicates) == (10, 3, 0)


def test_a_row_that_stands_twice_counts_once(store: Store) -> None:
    write(store, [answer(1), answer(2), given(1, "thumbs", 1.0)], [answer(1, at=9e9), answer(1, arm="c")])
    write(store, [given(1, "thumbs", 0.0), given(1, "stars", 3.0), answer(2)])
    found, log = read(store)
    assert [(r.request_id, r.arm, r.detail) for r in found] == [
        ("r1", "b", None),
        ("r2", "a", None),
        ("r1", "", "thumbs"),
        ("r1", "c", None),
        ("r1", "", "stars"),
    ]
    assert found[2].scores == {"thumbs": 1.0}, "the first one counts"
    assert log.health.duplicates == 3


@pytest.mark.parametrize("cut", [1, 40, 700, -1])
def test_a_half_written_segment_counts_for_nothing_and_takes_no_other_along(store: Store, cut: int) -> None:
    write(store, [answer(n) for n in range(5)], [answer(n) for n in range(5, 9)], [answer(9)])
    second = Segments(store, FOLDER).listed()[1]
    path = Path(store.path(*FOLDER, second.name))
    os.truncate(path, cut if cut > 0 else path.stat().st_size - 1)
    found, log = read(store)
    assert [row.request_id for row in found] == ["r0", "r1", "r2", "r3", "r4", "r9"]
    assert len(log.health.damaged) == 1
    assert second.name in log.health.damaged[0]


def test_lines_that_are_missing_are_noticed_by_the_name(store: Store) -> None:
    write(store, [answer(n) for n in range(5)])
    path = Path(store.path(*FOLDER, Segments(store, FOLDER).listed()[0].name))
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    found, log = read(store)
    assert found == []
    assert "3 rows, its name says 5" in log.health.damaged[0]


def test_small_segments_become_one_parquet_with_the_same_rows(store: Store) -> None:
    batches = [[answer(n), given(n, "thumbs", 1.0)] for n in range(3)] + [[answer(5, scores={"other": 0.25})]]
    writer = write(store, *batches)
    before, _ = read(store)
    writer.merge(merged_parquet)
    names = store.list(*FOLDER)
    assert [parse_name(name).kind for name in names if parse_name(name)] == ["parquet"]  # type: ignore[union-attr]
    after, log = read(store)
    assert after == before
    assert log.health.segments == 1
    writer.publish([answer(6)])
    assert read(store)[0] == [*before, answer(6)]


def test_a_parquet_whose_parts_were_not_removed_yet_counts_once(store: Store) -> None:
    writer = write(store, *[[answer(n)] for n in range(4)])
    parts = {name: store.read_bytes(*FOLDER, name) for name in store.list(*FOLDER)}
    writer.merge(merged_parquet)
    for name, data in parts.items():  # killed between the Parquet and the removal
        store.write_bytes(data, *FOLDER, name)
    found, log = read(store)
    assert [row.request_id for row in found] == ["r0", "r1", "r2", "r3"]
    assert (log.health.duplicates, log.health.segments) == (0, 1)
    write(store).merge(merged_parquet)
    assert len(store.list(*FOLDER)) == 1


@pytest.mark.parametrize("keep", [0, 4, 300, -4])
def test_a_half_written_parquet_counts_for_nothing_and_takes_no_other_along(store: Store, keep: int) -> None:
    writer = write(store, *[[answer(n)] for n in range(4)])
    writer.merge(merged_parquet)
    writer.publish([answer(7)])
    merged = Segments(store, FOLDER).listed()[0]
    path = Path(store.path(*FOLDER, merged.name))
    os.truncate(path, keep if keep >= 0 else path.stat().st_size + keep)
    found, log = read(store)
    assert [row.request_id for row in found] == ["r7"]
    assert merged.name in log.health.damaged[0]


def test_another_writers_parquet_is_read(store: Store) -> None:
    """Files that others wrote by the same names: pyarrow alone, no code of ours."""
    columns = {
        "kind": ["answer"] * 2,
        "experiment": ["x-1"] * 2,
        "at": [1.0, 2.0],
        "request_id": ["r1", "r2"],
        "unit": ["u", "v"],
        "arm": ["a", "b"],
        "scores": [{"form": 1.0}, {"form": None}],
    }
    table = pa.table(columns)
    path = Path(store.path(*FOLDER)) / "000001-00000001-00000002-2.parquet"
    path.parent.mkdir(parents=True)
    parquet.write_table(table, path)
    found, log = read(store)
    assert [(row.request_id, row.role, row.scores) for row in found] == [
        ("r1", "primary", {"form": 1.0}),
        ("r2", "primary", {}),
    ]
    parquet.write_table(table.drop_columns(["kind"]), path)
    found, log = read(store)
    assert (found, log.health.damaged) == ([], [f"{path.name}: cannot be read (it has no column 'kind')"])


def test_batches_have_a_column_for_each_metric(store: Store) -> None:
    write(store, [answer(0), answer(1, scores={})], [answer(2, scores={"other": 2.0})])
    batches = list(ExperimentLog(store, FOLDER).batches())
    numbers = [columns_of_batch(batch, ["form", "other"]).numbers for batch in batches]
    np.testing.assert_array_equal([values for one in numbers for values in one["form"]], [0.0, np.nan, np.nan])
    np.testing.assert_array_equal([values for one in numbers for values in one["other"]], [np.nan, np.nan, 2.0])
    assert [batch.column("role").to_pylist() for batch in batches] == [["primary"] * 2, ["primary"]]


def test_a_folder_without_a_log_says_so(store: Store) -> None:
    with pytest.raises(StorageError, match="no segment"):
        read_log(store, ("nowhere",))


def test_a_restarted_writer_never_takes_a_name_that_is_there(store: Store) -> None:
    first = write(store, [answer(1)])
    second = write(store, [answer(2)])
    first.publish([answer(3)])
    second.publish([answer(4)])
    assert {row.request_id for row in read(store)[0]} == {"r1", "r2", "r3", "r4"}


def recorder(store: Store, **changed: Any) -> Recorder:
    usual: dict[str, Any] = {"buffer": 1000, "every_s": 3600.0}
    return Recorder(Segments(store, FOLDER), list, **{**usual, **changed})


def assignment(number: int) -> Assignment:
    return Assignment("x-1", 1.0, f"r{number}", f"u{number}", "a", "primary", 0.5)


def test_requests_beyond_the_buffer_take_no_part_and_admitted_ones_keep_their_answer(store: Store) -> None:
    one = recorder(store, buffer=5)
    admitted = [number for number in range(8) if one.admit(assignment(number))]
    assert (admitted, one.waiting, one.dropped, one.full) == ([0, 1, 2], 3, 5, True)
    for number in reversed(admitted):
        one.add(answer(number))
    asyncio.run(one.step(last=True))
    assert (one.waiting, one.written, one.full) == (0, 6, False)
    assert [(row.kind, row.request_id) for row in read(store)[0]] == [
        ("assignment", "r0"),
        ("assignment", "r1"),
        ("assignment", "r2"),
        ("answer", "r2"),
        ("answer", "r1"),
        ("answer", "r0"),
    ]
    assert one.admit(assignment(9)), "room again"


def test_a_log_that_cannot_be_written_keeps_its_rows_until_it_can(store: Store) -> None:
    """A file stands where the folder would be; then it is taken away."""
    blocked = Path(store.path(FOLDER[0]))
    blocked.write_text("")

    async def run() -> Recorder:
        one = recorder(store)
        one.add(answer(1))
        await one.step(last=True)
        assert (one.written, one.waiting) == (0, 1)
        assert one.problem is not None
        one.add(answer(2))
        blocked.unlink()
        await one.step(last=True)
        return one

    one = asyncio.run(run())
    assert (one.written, one.problem, one.dropped) == (2, None, 0)
    assert [row.request_id for row in read(store)[0]] == ["r1", "r2"]


def test_rows_are_published_in_time_and_not_one_by_one(store: Store) -> None:
    async def run(every_s: float) -> int:
        one = recorder(store, every_s=every_s)
        for number in range(20):
            one.add(answer(number))
            await one.step()
        return len(store.list(*FOLDER))

    assert asyncio.run(run(3600.0)) == 0
    assert asyncio.run(run(1e-9)) == 20


def stop_in_a_step(make: Callable[[], Recorder], begun: threading.Event) -> None:
    """Cancel a step of three rows once `begun` is set, then take the last step, as an endpoint does that stops."""

    async def play() -> None:
        recorder = make()
        for number in range(3):
            recorder.add(answer(number))
        running = asyncio.create_task(recorder.step())
        assert await asyncio.to_thread(begun.wait, 10)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await recorder.step(last=True)

    asyncio.run(play())


def test_rows_in_digestion_when_the_endpoint_stops_are_in_the_log(store: Store) -> None:
    begun = threading.Event()

    def slow(rows: Sequence[LogRow]) -> list[LogRow]:
        begun.set()
        time.sleep(0.2)
        return list(rows)

    stop_in_a_step(lambda: Recorder(Segments(store, FOLDER), slow, buffer=1000, every_s=3600.0), begun)
    assert [row.request_id for row in read(store)[0]] == ["r0", "r1", "r2"]


def test_rows_being_written_when_the_endpoint_stops_are_in_the_log_once(store: Store) -> None:
    begun = threading.Event()

    class SlowSegments(Segments):
        """A store that takes a while for each segment."""

        def create(self, segment: LogSegment, data: bytes) -> bool:
            begun.set()
            time.sleep(0.2)
            return super().create(segment, data)

    stop_in_a_step(lambda: Recorder(SlowSegments(store, FOLDER), list, buffer=1000, every_s=0.0), begun)
    found, log = read(store)
    assert [row.request_id for row in found] == ["r0", "r1", "r2"]
    assert log.health.duplicates == 0
