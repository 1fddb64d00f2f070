"""The log of an experiment on a real S3 server: written while an endpoint answers, merged, damaged, read."""

from collections import Counter
from pathlib import Path

import httpx

from graftwork.serving.ab_test.log import LogRow, Segments, SegmentWriter
from graftwork.serving.ab_test.log_reader import ExperimentLog, merged_parquet
from graftwork.serving.spec import ServeSpec
from graftwork.storage.store import Store
from tests.local_endpoint import local_endpoint
from tests.tiny import write_tiny_base


def row(number: int) -> LogRow:
    return LogRow(kind="answer", experiment="x-1", at=1.0, request_id=f"r{number}", unit="u", arm="a", probability=0.5)


def test_segments_merge_and_a_cut_object_is_told(s3_store: Store) -> None:
    writer = SegmentWriter(Segments(s3_store, ("x-1",)), merge_at=4)
    for number in range(4):
        writer.publish([row(number)])
    writer.merge(merged_parquet)
    writer.publish([row(4)])
    writer.publish([row(5), row(1)])
    assert len(s3_store.list("x-1")) == 3
    log = ExperimentLog(Store(f"{s3_store.uri}/x-1"), ())
    assert [one.request_id for one in log.rows()] == [f"r{number}" for number in range(6)]
    assert log.health.duplicates == 1
    merged, *_ = log.segments.listed()
    s3_store.write_bytes(s3_store.read_bytes("x-1", merged.name)[:-9], "x-1", merged.name)
    again = ExperimentLog(Store(f"{s3_store.uri}/x-1"), ())
    assert [one.request_id for one in again.rows()] == ["r4", "r5", "r1"]
    assert merged.name in again.health.damaged[0]


def test_an_endpoint_logs_to_s3_and_goes_on_there_after_a_restart(s3_store: Store, tmp_path: Path) -> None:
    base = write_tiny_base(tmp_path / "base")
    spec = ServeSpec.model_validate(
        {
            "base": str(base),
            "root": f"{s3_store.uri}/root",
            "quant": {"kind": "none"},
            "engine": {"max_seq_len": 128, "num_threads": 1},
            "arms": [{"name": "plain"}, {"name": "again"}],
        }
    )
    arms = [{"name": "plain", "weight": 0.5}, {"name": "again", "weight": 0.5}]
    tree = {
        "kind": "experiment",
        "name": "cards",
        "arms": arms,
        "control": "plain",
        "primary": "thumbs",
        "log": f"{s3_store.uri}/log",
    }
    asked: list[str] = []
    for _ in range(2):
        with local_endpoint(spec) as url:
            begun = httpx.post(f"{url}/v1/admin/experiments/start", json={"spec": tree}, timeout=60).json()["data"][0]
            for number in range(4):
                body = {
                    "model": "experiment/cards",
                    "user": f"u{number}",
                    "max_tokens": 1,
                    "messages": [{"role": "user", "content": "Hello"}],
                }
                answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
                assert answer.status_code == 200, answer.text
                asked.append(answer.json()["id"])
    log = ExperimentLog(Store(f"{s3_store.uri}/log/{begun['id']}"), ())
    rows = list(log.rows())
    assert Counter(one.request_id for one in rows if one.kind == "answer") == Counter(asked)
    assert [one.event for one in rows if one.kind == "event"] == ["start", "resume"]
    assert log.health.damaged == []
