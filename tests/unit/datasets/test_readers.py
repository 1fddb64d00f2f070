"""Datasets in every form and place, read record by record; rendered rows kept and found again."""

import csv
import gzip
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graftwork.datasets.readers import read_records
from graftwork.datasets.rows import read_rows
from graftwork.errors import DataError, StorageError
from graftwork.storage import store
from graftwork.storage.store import Store
from graftwork.training.objectives.rows import FOLDER, KeptRows, PreparedData, RowWriter, kept_rows, open_rows, prepare
from tests.training import task

RECORDS: list[dict[str, Any]] = [{"id": f"r{n}", "prompt": f'q{n}, "or"', "completion": f"a{n}\nb"} for n in range(5)]


def jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def as_csv(path: Path) -> Path:
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(RECORDS[0]))
        writer.writeheader()
        writer.writerows(RECORDS)
    return path


def as_parquet(path: Path, records: list[dict[str, Any]] = RECORDS) -> Path:
    pq.write_table(pa.Table.from_pylist(records), path)
    return path


def zipped(path: Path) -> Path:
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    return packed


def a_folder(folder: Path) -> Path:
    jsonl(folder / "part-0.jsonl", RECORDS[:2])
    as_parquet(folder / "part-1.parquet", RECORDS[2:])
    (folder / "README.md").write_text("not data")
    return folder


FORMS: dict[str, Callable[[Path], Path]] = {
    "jsonl": lambda folder: jsonl(folder / "rows.jsonl", RECORDS),
    "jsonl.gz": lambda folder: zipped(jsonl(folder / "rows.jsonl", RECORDS)),
    "csv": lambda folder: as_csv(folder / "rows.csv"),
    "csv.gz": lambda folder: zipped(as_csv(folder / "rows.csv")),
    "parquet": lambda folder: as_parquet(folder / "rows.parquet"),
    "folder": a_folder,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(tmp_path: Path, form: str) -> None:
    uri = str(FORMS[form](tmp_path))
    assert list(read_records(uri)) == list(enumerate(RECORDS, start=1))
    assert [row.id for row in read_rows(uri, need="train", limit=3)] == ["r0", "r1", "r2"]


def test_a_hub_dataset_on_disk_is_read_as_it_comes(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    as_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", RECORDS[:3])
    as_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", RECORDS[3:])
    assert list(read_records(f"hf://{tmp_path}/train")) == list(enumerate(RECORDS[:3], start=1))
    assert [record["id"] for _, record in read_records(f"hf://{tmp_path}/test")] == ["r3", "r4"]
    with pytest.raises(DataError, match=r"hf://.*nosplit: it cannot be read"):
        list(read_records(f"hf://{tmp_path}/nosplit"))


@pytest.mark.parametrize("uri", ["hf://owner/name", "hf://owner", "hf://a/b/c/d/e", "hf://a//train"])
def test_a_hub_address_names_owner_name_and_split(uri: str) -> None:
    with pytest.raises(DataError, match="hf://OWNER/NAME"):
        list(read_records(uri))


def test_a_bad_row_of_a_folder_is_named_with_its_file(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", RECORDS[:2])
    (tmp_path / "b.jsonl").write_bytes(b'{"prompt": "q", "completion": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match=r"b\.jsonl row 2: it is not UTF-8"):
        list(read_records(str(tmp_path)))


def test_what_is_not_there_or_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"rows\.parquet: it does not exist"):
        list(read_records(str(tmp_path / "rows.parquet")))
    with pytest.raises(DataError, match="no data files"):
        list(read_records(str(tmp_path)))
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="it is not Parquet"):
        list(read_records(str(tmp_path / "rows.parquet")))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    return store.cache_root()


def same(one: PreparedData, other: PreparedData) -> bool:
    return one.digest() == other.digest() and one.train.lengths_N.tolist() == other.train.lengths_N.tolist()


def test_rows_are_rendered_once_until_something_changes(tmp_path: Path, cache: Path) -> None:
    spec = task(tmp_path / "task")
    first = prepare(spec)
    folders = sorted((cache / FOLDER).iterdir())
    rendered = {folder / "ids.bin": os.stat(folder / "ids.bin").st_mtime_ns for folder in folders if folder.is_dir()}
    assert len(rendered) == 2, "training and held-out rows"
    assert same(prepare(spec.with_({"optim.lr": 1.0, "num_workers": 1})), first)
    assert {path: os.stat(path).st_mtime_ns for path in rendered} == rendered
    shorter = prepare(spec.with_({"max_length": int(first.train.lengths_N.max()) - 1}))
    assert shorter.dropped > 0
    assert len(shorter.train) == len(first.train) - shorter.dropped
    other = prepare(spec.with_({"prompt.system": "Be brief."}))
    assert other.train.digest() != first.train.digest()


def test_a_large_set_travels_by_name_and_is_taken_from_the_root(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare(task(tmp_path / "task"))
    monkeypatch.setattr("graftwork.training.objectives.rows.INLINE_BYTES", 100)
    large = prepare(task(tmp_path / "task")).shared(Store(str(tmp_path / "root")))
    assert isinstance(large.train, KeptRows)
    sent = pickle.dumps(large)
    assert len(sent) < 1500 < len(pickle.dumps(whole))
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "elsewhere"))  # another machine
    arrived: PreparedData = pickle.loads(sent)
    assert same(arrived, whole)
    assert [part.tolist() for part in arrived.train.row(3)] == [part.tolist() for part in whole.train.row(3)]  # type: ignore[attr-defined]


def test_rows_are_written_in_pieces(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftwork.training.objectives.rows.FLUSH_TOKENS", 7)

    def build(writer: RowWriter) -> dict[str, Any]:
        for n in range(50):
            writer.add(range(n, n + n % 5 + 1), [token % 2 == 0 for token in range(n % 5 + 1)])
        return {"count": len(writer)}

    rows, about = kept_rows("pieces", build)
    assert about == {"count": 50}
    for n in range(50):
        ids, trained = open_rows("pieces", None).row(n)
        assert ids.tolist() == list(range(n, n + n % 5 + 1))
        assert trained.tolist() == [token % 2 == 0 for token in range(n % 5 + 1)]
    assert rows.scored_N.tolist() == [n % 5 // 2 + 1 for n in range(50)]
