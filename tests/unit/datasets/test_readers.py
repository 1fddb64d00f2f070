"""Datasets in every form and place, read record by record, with the keys of their rows; rendered rows cached."""

import csv
import gzip
import json
import os
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graftwork.datasets import rows as data
from graftwork.datasets.keys import RENAMED_ROW_KEYS, KeyCheck
from graftwork.datasets.readers import read_records
from graftwork.datasets.rows import is_same_place, read_rows, resolve_prompt
from graftwork.errors import ConfigError, DataError, StorageError
from graftwork.prompts.render import PromptSpec
from graftwork.retrieval.corpus import ChunkSpec, SourceSpec, read_corpus
from graftwork.serving.rag.questions import question_keys, read_questions
from graftwork.storage import store
from graftwork.storage.store import Store
from graftwork.training.objectives.rows import (
    FOLDER,
    CachedRows,
    PreparedData,
    RowWriter,
    cached_rows,
    open_rows,
    prepare,
)
from graftwork.training.run import check, run_paths
from graftwork.training.spec import TrainSpec
from tests.training import pair_task, task, write_rows

RECORDS: list[dict[str, Any]] = [{"id": f"r{n}", "prompt": f'q{n}, "or"', "completion": f"a{n}\nb"} for n in range(5)]


def jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def as_csv(path: Path, delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(RECORDS[0]), delimiter=delimiter)
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


def zst(path: Path) -> Path:
    packed = path.with_name(path.name + ".zst")
    with pa.CompressedOutputStream(str(packed), "zstd") as out:
        out.write(path.read_bytes())
    return packed


def with_separator(path: Path, delimiter: str, quote: str = "") -> Path:
    path.write_text(f"{quote}sep={delimiter}{quote}\r\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    return path


def as_json(path: Path) -> Path:
    path.write_text(json.dumps(RECORDS, indent=2), encoding="utf-8")
    return path


def saved(folder: Path) -> Path:
    import datasets

    datasets.Dataset.from_list(RECORDS).save_to_disk(str(folder))
    return folder


FORMS: dict[str, Callable[[Path], Path]] = {
    "jsonl": lambda folder: jsonl(folder / "rows.jsonl", RECORDS),
    "jsonl.gz": lambda folder: zipped(jsonl(folder / "rows.jsonl", RECORDS)),
    "json array": lambda folder: as_json(folder / "rows.json"),
    "json.gz": lambda folder: zipped(as_json(folder / "rows.json")),
    "json, an object a line": lambda folder: jsonl(folder / "rows.json", RECORDS),
    "csv": lambda folder: as_csv(folder / "rows.csv"),
    "csv of semicolons": lambda folder: as_csv(folder / "rows.csv", ";"),
    "csv of tabs": lambda folder: as_csv(folder / "rows.csv", "\t"),
    "csv of bars": lambda folder: as_csv(folder / "rows.csv", "|"),
    "tsv": lambda folder: as_csv(folder / "rows.tsv", "\t"),
    "csv.gz": lambda folder: zipped(as_csv(folder / "rows.csv")),
    "jsonl.zst": lambda folder: zst(jsonl(folder / "rows.jsonl", RECORDS)),
    "tsv.zst": lambda folder: zst(as_csv(folder / "rows.tsv", "\t")),
    "csv with Excel's sep": lambda folder: with_separator(as_csv(folder / "rows.csv", ";"), ";"),
    "csv with Excel's sep of tabs": lambda folder: with_separator(as_csv(folder / "rows.csv", "\t"), "\t"),
    "csv with Excel's sep in quotes": lambda folder: with_separator(as_csv(folder / "rows.csv", ";"), ";", '"'),
    "csv of another separator": lambda folder: with_separator(as_csv(folder / "rows.csv", "^"), "^"),
    "parquet": lambda folder: as_parquet(folder / "rows.parquet"),
    "folder": a_folder,
    "save_to_disk": saved,
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


def test_a_saved_dataset_dict_is_read_by_split(tmp_path: Path) -> None:
    import datasets

    parts = {"train": datasets.Dataset.from_list(RECORDS[:3]), "test": datasets.Dataset.from_list(RECORDS[3:])}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path))
    assert list(read_records(f"hf://{tmp_path}/train")) == list(enumerate(RECORDS[:3], start=1))
    for uri in (str(tmp_path), f"hf://{tmp_path}/dev"):
        with pytest.raises(DataError, match="splits of the folder: train, test"):
            list(read_records(uri))


BAD_FILES = {
    # name: (content, what the error says)
    "rows.csv": (b"prompt,completion\rq,a\r", r"line 1: it is not CSV .*lines end as on Unix or Windows"),
    "quote.csv": (b'prompt,completion\nq,a\n"say \\"hi\\"",a\n', r"line 3: it is not CSV"),
    "twice.csv": (b"prompt,completion,completion\nq,a,b\n", r"two columns are named 'completion'"),
    "blank.csv": (b"\nprompt,completion\nq,a\n", r"its first line is blank"),
    "utf16.csv": ("prompt,completion\nq,a\n".encode("utf-16"), r"not UTF-8.*save the file as UTF-8"),
    "plain.jsonl.gz": (b'{"prompt": "q", "completion": "a"}\n', r"it cannot be read .*copy or compress"),
    "cut.jsonl.gz": (gzip.compress(b'{"prompt": "q"}\n' * 9)[:-9], r"it cannot be read .*copy or compress"),
    "cut.jsonl.zst": (b"\x28\xb5\x2f\xfd" + bytes(40), r"it cannot be read .*copy or compress"),
    "two.csv": (b"sep=;;\na;;b\n", r"its first line is sep=;;.*a separator is one character"),
    "array.jsonl": (b'[\n{"prompt": "q"}\n]\n', r"not JSON.*name a file that is one array \.json"),
    "object.json": (b'{\n "data": []\n}', r"it is an object of several lines.*one array"),
    "rows.xlsx": (b"PK\x03\x04", r"not JSON.*the form follows from the name, .* others are read as JSONL"),
    "rows.arrow": (b"\xff\xff\xff\xff", r"not UTF-8.*the form follows from the name"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_in_another_form_is_refused_with_what_to_do(tmp_path: Path, name: str) -> None:
    content, says = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as found:
        list(read_records(str(tmp_path / name)))
    assert re.search(says, " ".join(str(found.value).split())), found.value


def test_a_column_without_a_name_has_its_number(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(",prompt,completion,\n0,q,a,\n")
    [(_, record)] = read_records(str(tmp_path / "rows.csv"))
    assert record == {"column 1": "0", "prompt": "q", "completion": "a", "column 4": ""}


def test_a_folder_is_one_dataset_without_hidden_files(tmp_path: Path) -> None:
    jsonl(tmp_path / "train-00000.jsonl", RECORDS[:2])
    jsonl(tmp_path / "train-00001.jsonl", RECORDS[2:])
    (tmp_path / "._train-00000.jsonl").write_bytes(b"\x00\x05\x16\x07")
    assert [record for _, record in read_records(str(tmp_path))] == RECORDS
    jsonl(tmp_path / "test.jsonl", RECORDS)
    with pytest.raises(DataError, match=r"several splits \(test, train\)[\s\S]*hf:///.*/train"):
        list(read_records(str(tmp_path)))


SPLITS = {
    ("train.jsonl", "test.jsonl"): True,
    ("my-train.jsonl", "my-test.jsonl"): True,
    ("data_train.jsonl", "data_val.jsonl"): True,
    ("train-v2.0.jsonl", "dev-v2.0.jsonl"): True,
    ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"): False,
    ("train-00000-of-00002.jsonl", "test.jsonl"): True,
    ("train_sft-00000-of-00003.jsonl", "test_sft-00000-of-00001.jsonl"): True,
    ("train-tickets.jsonl", "test-cases.jsonl"): False,
    ("trainers.jsonl", "tests.jsonl"): False,
    ("constrain.jsonl", "contest.jsonl"): False,
}


@pytest.mark.parametrize("names", SPLITS)
def test_splits_are_known_by_the_words_of_names_and_subjects_are_not(tmp_path: Path, names: tuple[str, str]) -> None:
    for number, name in enumerate(names):
        jsonl(tmp_path / name, RECORDS[number : number + 1])
    if not SPLITS[names]:
        assert len(list(read_records(str(tmp_path)))) == 2
        return
    with pytest.raises(DataError, match="its files are of several splits"):
        list(read_records(str(tmp_path)))


def test_a_hint_of_splits_never_leads_to_rows_of_both(tmp_path: Path) -> None:
    """`datasets` finds splits by names in lower case alone; it takes all other files for the training ones."""
    for name in ("Train.csv", "Test.csv"):
        as_csv(tmp_path / name)
    with pytest.raises(DataError) as caught:
        list(read_records(str(tmp_path)))
    assert "(test: Test.csv; train: Train.csv)" in caught.value.hint
    assert "hf://" not in caught.value.hint
    other = tmp_path / "other"
    other.mkdir()
    jsonl(other / "my-train.jsonl", RECORDS[:1])
    jsonl(other / "my-test.jsonl", RECORDS[1:])
    with pytest.raises(DataError) as caught:
        list(read_records(str(other)))
    uri = f"hf://{other}/train"
    assert caught.value.hint.endswith(uri)
    assert [record for _, record in read_records(uri)] == RECORDS[:1]


def test_an_empty_shard_has_no_rows(tmp_path: Path) -> None:
    as_csv(tmp_path / "part-0.csv")
    (tmp_path / "part-1.csv").touch()
    (tmp_path / "part-2.csv").write_text("sep=;\n")
    assert [record for _, record in read_records(str(tmp_path))] == RECORDS
    with pytest.raises(DataError, match="it has no rows"):
        read_rows(str(tmp_path / "part-1.csv"), need="train")


def test_hidden_folders_are_not_named(tmp_path: Path) -> None:
    for folder in (".cache/x", "data"):
        (tmp_path / folder).mkdir(parents=True)
        jsonl(tmp_path / folder / "Rows.jsonl", RECORDS)
    with pytest.raises(DataError) as caught:
        list(read_records(str(tmp_path)))
    assert caught.value.hint == f"name {tmp_path}/data"


def test_a_local_folder_as_a_hub_dataset_says_to_check_its_files(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text('{"prompt": "q"\n')
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "train.csv").write_text('a,b\n"1,2\n3,4,5,6\n')
    for name in ("rows", "table", "absent"):
        with pytest.raises(DataError) as caught:
            list(read_records(f"hf://{tmp_path / name}/train"))
        assert caught.value.hint == "check the folder and its files", name
    with pytest.raises(DataError, match="end the URI with one of the splits"):
        list(read_records(f"hf://{write_split(tmp_path / 'good')}/dev"))


def write_split(folder: Path) -> Path:
    folder.mkdir()
    jsonl(folder / "train.jsonl", RECORDS)
    return folder


def test_a_map_of_parquet_with_a_key_twice_is_named(tmp_path: Path) -> None:
    maps = pa.array([[("a", 1)], [("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int64()))
    pq.write_table(pa.table({"prompt": ["q", "r"], "facts": maps}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet row 2: facts: a map has the key 'a' twice"):
        list(read_records(str(tmp_path / "rows.parquet")))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_an_error_of_the_disk_is_not_one_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").symlink_to("/proc/self/mem")  # reading address 0 is an I/O error
    (tmp_path / "rows.jsonl.gz").symlink_to("/proc/self/mem")
    for name in ("rows.jsonl", "rows.jsonl.gz"):
        with pytest.raises(StorageError, match="Input/output error") as caught:
            list(read_records(str(tmp_path / name)))
        assert "compress" not in caught.value.hint


def test_a_folder_of_a_hub_repository_names_the_folder_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    as_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    with pytest.raises(DataError, match=rf"no data files[\s\S]*name {tmp_path}/data, or a split as hf://"):
        list(read_records(str(tmp_path)))


def test_a_map_of_parquet_is_an_object(tmp_path: Path) -> None:
    kwargs = pa.array([[("enable_thinking", False)]], pa.map_(pa.string(), pa.bool_()))
    table = pa.table({"prompt": ["q"], "completion": ["a"], "chat_template_kwargs": kwargs})
    pq.write_table(table, tmp_path / "rows.parquet")
    [row] = read_rows(str(tmp_path / "rows.parquet"), need="train")
    assert row.template_kwargs == {"enable_thinking": False}


def test_a_field_of_a_csv_may_be_long(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text\n" + "x" * 200_000 + "\n")
    assert [len(record["text"]) for _, record in read_records(str(path))] == [200_000]


def test_a_json_file_is_an_array_of_objects(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for text, found in (
        ("[1]", "row 1: found a number"),
        ("[{}", "rows.json: it is not JSON"),
        ("{}x", "row 1: it is"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=found):
            list(read_records(str(path)))


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
    assert isinstance(large.train, CachedRows)
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

    rows, about = cached_rows("pieces", build)
    assert about == {"count": 50}
    for n in range(50):
        ids, trained = open_rows("pieces", None).row(n)
        assert ids.tolist() == list(range(n, n + n % 5 + 1))
        assert trained.tolist() == [token % 2 == 0 for token in range(n % 5 + 1)]
    assert rows.scored_N.tolist() == [n % 5 // 2 + 1 for n in range(50)]


# Keys of rows: each is read, rejected with its row, or counted and reported once; held-out rows are held out.

USER: dict[str, Any] = {"role": "user", "content": "u"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "a"}


def write(path: Path, *records: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def row(*turns: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(turns or (USER, ANSWER)), **more}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(scope="module")
def spec(folder: Path) -> TrainSpec:
    held_out = write_rows(folder / "longer.jsonl", 8, answer_repeats=5)
    return task(folder, num_workers=1, **{"data.eval": str(held_out)})


REJECTED = [
    (row(reasoning_content="because"), "reasoning_content", "into the assistant's turn"),
    (row(images=["x.png"]), "images", "remove the key"),
    (row(documents=[{"text": "t"}]), "documents", "remove the key"),
    (row(history=[["q", "a"]]), "history", "remove the key"),
    (
        row({**USER, "content": [{"type": "image_url", "image_url": "u"}]}, ANSWER),
        r"messages\[0\].content\[0\].type",
        "leave the row out",
    ),
    (row(USER, {**ANSWER, "refusal": "no"}), r"messages\[1\].refusal", "remove the key"),
    (row({"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}), r"messages\[0\].role", "conversations"),
]
LOSS_KEYS = [
    (row(USER, {**ANSWER, "weight": 0.5}), r"messages\[1\].weight", "leave the row out"),
    (row(USER, {**ANSWER, "train": False}), "messages", "give one turn"),
    (row({**USER, "weight": 2}, ANSWER), r"messages\[0\].weight", "leave the row out"),
    (row({**USER, "train": True}, ANSWER), r"messages\[0\].train", "turns of other roles"),
    (row(USER, {**ANSWER, "train_detail": [{"begin_offset": 0}]}), r"messages\[1\].train_detail", "remove the key"),
    (row(weight=0.1), "weight", "leave the row out"),
    (row(loss_mask=[0, 1]), "loss_mask", "remove the key"),
    (row(input_ids=[1, 2]), "input_ids", "remove the key"),
    (row(label=False), "label", "objective.kind=kto"),
]
"""Keys, beside those of REJECTED, that change the loss alone."""


@pytest.mark.parametrize(("record", "at", "move"), [*REJECTED, *LOSS_KEYS])
def test_a_key_that_changes_prompt_or_loss_is_rejected_by_row_and_key(
    tmp_path: Path, record: Any, at: str, move: str
) -> None:
    uri = write(tmp_path / "rows.jsonl", row(id="fine"), record)
    with pytest.raises(DataError, match=f"rows.jsonl row 2: {at}: ") as caught:
        read_rows(uri, need="train")
    assert caught.value.rule
    assert move in caught.value.hint


@pytest.mark.parametrize("need", ["eval", "prompt"])
def test_questions_are_rejected_for_what_changes_the_prompt_alone(tmp_path: Path, need: data.Need) -> None:
    for record, at, _ in REJECTED:
        with pytest.raises(DataError, match=f"row 1: {at}: "):
            read_rows(write(tmp_path / "q.jsonl", {**record, "gold": {"x": 1}}), need=need)
    keys = data.key_check(need)
    read_rows(
        write(tmp_path / "q.jsonl", row(USER, {**ANSWER, "weight": 0}, USER, weight=0.1, gold={"x": 1})),
        need=need,
        keys=keys,
    )
    assert keys.note("eval") == ("eval: ignored keys: messages[].weight (in 1 row), weight (in 1 row)",)


@pytest.mark.parametrize(
    "record",
    [
        row({**USER, "weight": 0}, {**ANSWER, "weight": 1}),
        row({**USER, "weight": 1}, {**ANSWER, "weight": 1.0, "train": True}),
        row(USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}),
        row(USER, {**ANSWER, "tool_calls": None, "reasoning_content": "", "refusal": None}, tools=[], images=None),
        row(label=True),
    ],
)
def test_values_that_take_effect_here_or_nowhere_are_accepted(tmp_path: Path, record: Any) -> None:
    keys = data.key_check("train")
    [read] = read_rows(write(tmp_path / "rows.jsonl", record), need="train", keys=keys)
    assert read.answer in ("a", "c")
    assert not keys.ignored


def test_a_csv_says_numbers_and_truth_by_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion,label,weight,tools,lang\np,c,True,1,,en\np,d,False,1,,en\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"row 2: label: found 'False'"):
        read_rows(str(path), need="train")
    path.write_text("prompt,completion,weight,tools,lang\np,c,1,,en\np,d,0,,en\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"row 2: weight: found '0'"):
        read_rows(str(path), need="train")
    keys = data.key_check("train")
    read_rows(str(path), need="train", limit=1, keys=keys)
    assert keys.note("data.train") == ("data.train: ignored keys: lang (in 1 row)",)


def test_other_keys_are_counted_by_row(tmp_path: Path) -> None:
    rows = [row({**USER, "at": "x"}, {**ANSWER, "at": "y"}, source="web", lang="en") for _ in range(119)]
    uri = write(tmp_path / "rows.jsonl", *rows, row(source="web", label=3))
    keys = data.key_check("train", ["lang"])
    read_rows(uri, need="train", keys=keys)
    assert keys.note("data.train") == (
        "data.train: ignored keys: source (in 120 rows), messages[].at (in 119 rows), label (in 1 row)",
    )
    many = KeyCheck(())
    many.check({f"k{n:02}": 1 for n in range(23)}, "row 1")
    assert many.note("x")[0].endswith("k19 (in 1 row) and 3 more")


def test_a_run_reports_ignored_keys_once_and_not_in_its_identity(spec: TrainSpec, tmp_path: Path) -> None:
    def changed(path: Path, source: str) -> str:
        records = [json.loads(line) for line in Path(source).read_text().splitlines()]
        return write(path, *({**record, "source": "web"} for record in records))

    train, held_out = (
        changed(tmp_path / "t.jsonl", str(spec.data.train)),
        changed(tmp_path / "e.jsonl", str(spec.data.eval)),
    )
    shots = write(tmp_path / "shots.jsonl", row(topic="x"))
    same = spec.with_({"data.train": train, "data.eval": held_out})
    assert run_paths(same).run_id == run_paths(spec).run_id
    asked = same.with_({"prompt": {"shots": 1, "few_shot_file": shots}})
    assert prepare(asked).warnings == (
        "data.train: ignored keys: source (in 48 rows)",
        "prompt.few_shot_file: ignored keys: topic (in 1 row)",
        "data.eval: ignored keys: source (in 8 rows)",
    )
    assert check(asked) == list(prepare(asked).warnings), "said before the start"
    assert not prepare(spec).warnings


@pytest.mark.parametrize(
    ("more", "at"),
    [
        ({"margin": 0.7}, "margin"),
        ({"ref_chosen_logps": -3.1}, "ref_chosen_logps"),
        ({"weight": 0}, "weight"),
        ({"images": ["x.png"]}, "images"),
        ({"chosen": {**ANSWER, "content": "x", "weight": 0}}, "chosen.weight"),
        ({"prompt": [{**USER, "thinking": "y"}]}, r"prompt\[0\].thinking"),
    ],
)
@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_pairs_are_checked_alike(folder: Path, tmp_path: Path, kind: str, more: Any, at: str) -> None:
    pair = {"prompt": "p", "chosen": "x", "rejected": "z"}
    uri = write(tmp_path / "pairs.jsonl", pair, {**pair, **more})
    spec = pair_task(folder / kind, **{"objective.kind": kind, "data.train": uri, "num_workers": 1})
    with pytest.raises(DataError, match=f"pairs.jsonl row 2: {at}: "):
        prepare(spec)


def test_pairs_and_plain_text_count_other_keys(folder: Path, tmp_path: Path) -> None:
    pairs = write(
        tmp_path / "pairs.jsonl",
        *({"prompt": f"p{n}", "chosen": "x", "rejected": "z", "score_chosen": 7} for n in range(3)),
    )
    held_out = write(tmp_path / "held-out.jsonl", {"prompt": "p", "chosen": "y", "rejected": "z"})
    of_pairs = pair_task(folder / "dpo", **{"data.train": pairs, "data.eval": held_out, "num_workers": 1})
    assert prepare(of_pairs).warnings == ("data.train: ignored keys: score_chosen (in 3 rows)",)
    text = write(tmp_path / "text.jsonl", *({"text": f"words {n}", "url": "u", "tools": [1]} for n in range(3)))
    held_out = write(tmp_path / "held-out-text.jsonl", {"text": "other words"})
    of_text = task(folder, objective={"kind": "cpt"}, **{"data.train": text, "data.eval": held_out, "num_workers": 1})
    assert prepare(of_text).warnings == ("data.train: ignored keys: tools (in 3 rows), url (in 3 rows)",)
    weighted = write(tmp_path / "weighted.jsonl", {"text": "words"}, {"text": "more", "weight": 3})
    with pytest.raises(DataError, match="row 2: weight: found 3"):
        prepare(of_text.with_({"data.train": weighted}))


def test_passages_and_questions_count_other_keys(tmp_path: Path) -> None:
    table = write(tmp_path / "corpus.jsonl", {"id": "a", "text": "one", "title": "t", "tools": [1]})
    named = tmp_path / "corpus.csv"
    named.write_text("key,title,body,date\na,t,b,d\n", encoding="utf-8")
    ignored: list[str] = []
    read_corpus([SourceSpec(uri=table)], ChunkSpec(), ignored)
    read_corpus([SourceSpec(uri=str(named), id="key", text=("title", "body"))], ChunkSpec(), ignored)
    assert ignored == [
        f"{table}: ignored keys: title (in 1 row), tools (in 1 row)",
        f"{named}: ignored keys: date (in 1 row)",
    ]
    keys = question_keys()
    read_questions(write(tmp_path / "q.jsonl", {"question": "q", "doc_id": "a", "level": 3}), keys=keys)
    assert keys.note("questions") == ("questions: ignored keys: level (in 1 row)",)


@pytest.mark.parametrize(("old", "new"), RENAMED_ROW_KEYS.items())
def test_a_renamed_key_of_a_row_is_refused_with_its_new_name(tmp_path: Path, old: str, new: str) -> None:
    uri = write(tmp_path / "rows.jsonl", row(gold={"x": 1}, **{new: ["x"]}), row(gold={"x": 1}, **{old: ["x"]}))
    assert read_rows(uri, limit=1, need="train")[0].given_fields == ("x",)
    with pytest.raises(DataError, match=f"row 2: {old}: unknown key") as caught:
        read_rows(uri, need="train")
    assert caught.value.hint == f"{old} was renamed to {new}"
    passages = write(tmp_path / "corpus.jsonl", {"id": "a", "text": "one", old: ["x"]})
    ignored: list[str] = []
    read_corpus([SourceSpec(uri=passages)], ChunkSpec(), ignored)
    assert ignored == [f"{passages}: ignored keys: {old} (in 1 row)"], "passages never had the key"


def test_shots_are_checked_as_rows_to_learn_from(tmp_path: Path) -> None:
    uri = write(tmp_path / "shots.jsonl", row(USER, {**ANSWER, "weight": 0}))
    with pytest.raises(DataError, match="row 1: messages: every turn of the assistant has weight 0"):
        resolve_prompt(PromptSpec(shots=1, few_shot_file=uri))


def test_held_out_rows_are_other_rows_by_name(spec: TrainSpec, folder: Path) -> None:
    train = str(spec.data.train)
    (folder / "link.jsonl").symlink_to(train)
    for same in (train, f"file://{train}", f"{folder}/../{folder.name}/train.jsonl", str(folder / "link.jsonl")):
        with pytest.raises(ConfigError, match=r"data.eval=.*: it is data.train; held-out rows are not trained on"):
            spec.with_({"data.eval": same})
    assert is_same_place("s3://b/rows/", "s3://b/rows")
    assert not is_same_place("s3://b/rows", "s3://b/other")


@pytest.mark.parametrize("make", [task, pair_task])
def test_held_out_rows_are_other_rows_by_content(make: Any, folder: Path, tmp_path: Path) -> None:
    spec = make(folder / make.__name__, num_workers=1)
    records = [json.loads(line) for line in Path(spec.data.train).read_text().splitlines()]
    others = [{**record, "id": f"other {record['id']}", "doc_id": "x"} for record in records]
    copy = write(tmp_path / "copy.jsonl", *reversed(others))
    with pytest.raises(DataError, match=rf"data.eval=.*: its {len(records)} rows are the rows of data.train"):
        prepare(spec.with_({"data.eval": copy}))
    new = {**others[0], "id": "new"}
    new["messages"] = [{"role": "user", "content": "Something else"}, *new["messages"][1:]] if "messages" in new else []
    if not new["messages"]:
        new = {**others[0], "prompt": "Something else"}
    part = write(tmp_path / "part.jsonl", new, *others[3:5])
    assert prepare(spec.with_({"data.eval": part})).warnings[-1] == (
        "data.eval: 2 of 3 rows also in data.train, so its loss is too low"
    )


def test_one_row_to_train_on_is_warned_of(spec: TrainSpec) -> None:
    [warning] = prepare(spec.with_({"data.train_rows": 1})).warnings
    assert warning.startswith("data.train: 1 row: every step repeats it")


def test_a_key_that_groups_held_out_answers_is_read_whatever_its_name(spec: TrainSpec, tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "completion": f"a{n}", "label": n % 2} for n in range(4)]
    held_out = write(tmp_path / "grouped.jsonl", *rows)
    grouped = spec.with_({"data.eval": held_out, "objective": {"kind": "sft", "answers": {"by": ["label"]}}})
    found = prepare(grouped)
    assert found.eval is not None
    assert len(found.eval) == 4


def test_fillers_of_arrow_are_left_out_of_turns_in_objects_and_of_gold(tmp_path: Path) -> None:
    def call(name: str, key: str) -> dict[str, Any]:
        return {"id": "c1", "type": "function", "function": {"name": name, "arguments": {key: "1"}}}

    rows = [
        {
            "prompt": "q",
            "completion": {"role": "assistant", "content": None, "tool_calls": [call(name, key)]},
            "gold": {"tool_calls": [{"name": name, "arguments": {key: "1"}}], "note": None},
        }
        for name, key in (("f", "x"), ("g", "y"))
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = [record for _, record in read_records(str(tmp_path / "rows.parquet"))]
    for record, key in zip(found, "xy", strict=True):
        assert record["completion"]["tool_calls"][0]["function"]["arguments"] == {key: "1"}
        assert record["gold"] == {
            "tool_calls": [{"name": {"x": "f", "y": "g"}[key], "arguments": {key: "1"}}],
            "note": None,
        }


def test_a_comma_parts_a_header_whatever_stands_in_its_names(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,completion (short; clear; kind)\na,b\n")
    [(_, record)] = read_records(str(tmp_path / "rows.csv"))
    assert record == {"prompt": "a", "completion (short; clear; kind)": "b"}


def test_the_description_of_a_folder_is_no_part_of_its_rows(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "dataset_infos.json").write_text('{"default": {}}')
    assert len(list(read_records(str(tmp_path)))) == 1
