"""What a run reads from S3: a base, its rows, its corpus."""

import json
from pathlib import Path

import pytest

from graftwork.base.load import resolve
from graftwork.base.source import BaseSpec
from graftwork.datasets.rows import read_rows
from graftwork.errors import BaseModelError, StorageError
from graftwork.prompts.render import Passage
from graftwork.retrieval import LexicalSpec, open_retriever
from graftwork.retrieval.corpus import ChunkSpec, SourceSpec, read_corpus
from graftwork.retrieval.index_store import IndexHome
from graftwork.storage.store import Store
from tests.tiny import write_tiny_base


def test_a_base_on_s3_is_copied_once_and_again_when_it_changes(s3_store: Store, tmp_path: Path) -> None:
    local = write_tiny_base(tmp_path / "base")
    s3_store.upload(local, "bases", "tiny")
    said: list[str] = []
    base = resolve(BaseSpec(uri=f"{s3_store.uri}/bases/tiny"), on_progress=lambda doing, _: said.append(doing))
    assert base.digest == resolve(BaseSpec(uri=str(local))).digest
    copied = {path: path.stat().st_mtime_ns for path in base.folder.iterdir()}
    again = resolve(BaseSpec(uri=f"{s3_store.uri}/bases/tiny"), on_progress=lambda doing, _: said.append(doing))
    assert again == base
    assert said == [f"copying {base.uri}"]
    assert {path: path.stat().st_mtime_ns for path in base.folder.iterdir()} == copied
    s3_store.upload(write_tiny_base(tmp_path / "other", seed=1), "bases", "tiny")
    assert (
        resolve(BaseSpec(uri=base.uri)).digest == resolve(BaseSpec(uri=str(tmp_path / "other"))).digest != base.digest
    )


def test_a_base_that_is_not_on_s3_is_said(s3_store: Store) -> None:
    with pytest.raises(BaseModelError, match="no config.json there"):
        resolve(BaseSpec(uri=f"{s3_store.uri}/bases/absent"))


def test_rows_and_corpus_are_read_from_s3(s3_store: Store) -> None:
    s3_store.write_bytes(json.dumps({"prompt": "q", "completion": "a"}).encode(), "rows.jsonl")
    s3_store.write_bytes(json.dumps({"id": "p", "text": "Kunming (ZPPP)"}).encode(), "corpus.jsonl")
    assert read_rows(f"{s3_store.uri}/rows.jsonl", need="train")[0].answer == "a"
    retriever = open_retriever(LexicalSpec(corpus=f"{s3_store.uri}/corpus.jsonl"))
    assert [hit.passage.id for hit in retriever.search("ZPPP", 1)] == ["p"]
    s3_store.write_bytes(b"# Port\nOpens at six.", "docs", "port.md")
    s3_store.write_bytes(b"<h1>Lake</h1><p>Swim at noon.", "docs", "sub", "lake.html")
    read = read_corpus([SourceSpec(uri=f"{s3_store.uri}/docs")], ChunkSpec())
    assert [passage.id for passage in read] == ["port.md#1", "sub/lake.html#1"]
    with pytest.raises(StorageError, match="absent.jsonl"):
        read_rows(f"{s3_store.uri}/absent.jsonl", need="train")


def test_an_index_on_s3_is_searched_from_a_copy_and_followed(s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftwork.retrieval.retriever.FRESH_S", 0.0)
    home = IndexHome.from_root(s3_store.uri, "docs")
    home.publish("docs", [Passage("1", "a port")], made_from="x", sources=["s"])
    retriever = open_retriever(LexicalSpec(corpus=f"{s3_store.uri}/indexes/docs"))
    assert [hit.passage.id for hit in retriever.search("port", 3)] == ["1"]
    done = home.publish("docs", [Passage("1", "a port"), Passage("2", "port at sea")], made_from="x", sources=["s"])
    assert (done.kept, done.added) == (1, 1)
    assert {hit.passage.id for hit in retriever.search("port", 3)} == {"1", "2"}
