"""What every kind of root promises, on a disk and on S3 alike. A test module gives the fixture `store`."""

import pickle
import time
from pathlib import Path

import pytest

from graftwork.errors import StorageError
from graftwork.storage.store import RunPaths, Store
from tests.process_races import race


class StoreContract:
    """Subclassed by the tests of each kind of root."""

    def test_what_is_written_is_read_back(self, store: Store) -> None:
        store.write_bytes(b"\x00\xff", "a", "b.bin")
        store.write_json({"name": "Kōchi", "n": [1, None]}, "a", "c.json")
        assert store.read_bytes("a", "b.bin") == b"\x00\xff"
        assert store.read_json("a", "c.json") == {"name": "Kōchi", "n": [1, None]}
        assert "Kōchi" in store.read_text("a", "c.json")
        store.write_bytes(b"new", "a", "b.bin")
        assert store.read_bytes("a", "b.bin") == b"new"

    def test_names_with_spaces_and_accents_are_kept(self, store: Store) -> None:
        for name in ("two words", "é-ß-京", "100%", "a+b=c&d", "#1", "plus+", "~tilde"):
            store.write_bytes(name.encode(), "odd", name)
            assert store.read_bytes("odd", name) == name.encode()
        assert store.list("odd") == sorted(["two words", "é-ß-京", "100%", "a+b=c&d", "#1", "plus+", "~tilde"])

    def test_folders_list_their_children_and_their_sizes(self, store: Store) -> None:
        store.write_bytes(b"123", "top", "file")
        store.write_bytes(b"", "top", "folder", "deep", "empty")
        assert store.list("top") == ["file", "folder"]
        assert store.children("top") == {"file": 3, "folder": None}
        assert store.list("top", "file") == []
        assert store.list("nowhere") == []

    def test_a_tree_lists_every_file_below_with_a_stamp_of_its_content(self, store: Store) -> None:
        assert store.tree("top") == {}
        for key in (("file",), ("folder", "file"), ("folder", "deep", "file")):
            store.write_bytes(b"123", "top", *key)
        store.write_bytes(b"x", "topmost", "file")
        before = store.tree("top")
        assert sorted(before) == [("file",), ("folder", "deep", "file"), ("folder", "file")]
        assert store.tree("top") == before
        store.write_bytes(b"456", "top", "folder", "file")
        after = store.tree("top")
        assert {key for key in before if after[key] != before[key]} == {("folder", "file")}

    def test_a_file_and_a_folder_exist_and_a_prefix_of_a_name_does_not(self, store: Store) -> None:
        store.write_bytes(b"1", "runs", "support-1", "status.json")
        assert store.exists("runs", "support-1", "status.json")
        assert store.exists("runs", "support-1")
        assert store.exists("runs")
        assert not store.exists("runs", "support")
        assert not store.exists("runs", "support-1", "status.json", "below-a-file")

    def test_reading_what_is_missing_names_it_and_gives_a_hint(self, store: Store) -> None:
        with pytest.raises(StorageError) as caught:
            store.read_bytes("no", "such")
        assert store.path("no", "such") in str(caught.value)
        assert "does not exist" in str(caught.value)
        assert "Hint:" in str(caught.value)

    def test_text_that_is_no_json_or_no_utf8_is_refused_by_name(self, store: Store) -> None:
        store.write_bytes(b"{", "half.json")
        store.write_bytes(b"\xff\xfe", "latin.txt")
        with pytest.raises(StorageError, match=r"half\.json: it is not JSON"):
            store.read_json("half.json")
        with pytest.raises(StorageError, match=r"latin\.txt: it is not UTF-8"):
            store.read_text("latin.txt")

    def test_delete_takes_a_folder_with_all_in_it_and_minds_nothing_absent(self, store: Store) -> None:
        for index in range(3):
            store.write_bytes(b"x", "gone", str(index), "file")
        store.write_bytes(b"x", "gone-not")
        store.delete("gone")
        store.delete("gone")
        assert not store.exists("gone")
        assert not store.exists("gone", "1", "file")
        assert store.exists("gone-not")

    def test_a_folder_goes_up_and_comes_down_the_same(self, store: Store, tmp_path: Path) -> None:
        source = tmp_path / "source"
        content = {"a.txt": b"a", "deep/er/b.bin": bytes(range(256)) * 999, "deep/empty": b""}
        for name, data in content.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(data)
        store.upload(source, "up")
        target = store.download(tmp_path / "target", "up")
        assert {str(p.relative_to(target)): p.read_bytes() for p in target.rglob("*") if p.is_file()} == content

    def test_one_file_goes_up_and_comes_down(self, store: Store, tmp_path: Path) -> None:
        (tmp_path / "one").write_bytes(b"1")
        store.upload(tmp_path / "one", "files", "one")
        assert store.download(tmp_path / "new" / "copy", "files", "one").read_bytes() == b"1"
        with pytest.raises(StorageError, match="does not exist"):
            store.upload(tmp_path / "none", "files", "none")
        with pytest.raises(StorageError, match="does not exist"):
            store.download(tmp_path / "none", "files", "none")
        assert not (tmp_path / "none").exists()

    def test_a_linked_folder_is_refused_rather_than_skipped(self, store: Store, tmp_path: Path) -> None:
        (tmp_path / "source").mkdir()
        (tmp_path / "source" / "link").symlink_to(tmp_path)
        with pytest.raises(StorageError, match="link to a folder"):
            store.upload(tmp_path / "source", "up")

    @pytest.mark.parametrize(
        "part", ["", ".", "..", "a/b", "../x", "/etc", "a\\b", "a\0b", "a\nb", "x" * 256, "é" * 128]
    )
    def test_a_part_that_is_no_plain_name_is_refused(self, store: Store, part: str) -> None:
        with pytest.raises(StorageError, match="plain name"):
            store.write_bytes(b"x", "ok", part)
        assert store.list() == []

    def test_create_succeeds_once(self, store: Store) -> None:
        assert store.create_bytes(b"first", "locks", "one")
        assert not store.create_bytes(b"second", "locks", "one")
        assert store.read_bytes("locks", "one") == b"first"

    def test_of_racing_processes_one_creates_and_its_content_stands(self, store: Store) -> None:
        outcomes = [outcome["done"] for outcome in race([("create", store.uri, "locks", "raced")] * 6)]
        winners = [pid for created, pid in outcomes if created]
        assert len(winners) == 1
        assert store.read_bytes("locks", "raced") == str(winners[0]).encode() * 1000

    def test_a_pickled_store_is_the_same_root(self, store: Store) -> None:
        store.write_bytes(b"x", "key")
        copy = pickle.loads(pickle.dumps(store))
        assert (copy.uri, copy.is_local) == (store.uri, store.is_local)
        assert copy.read_bytes("key") == b"x"

    def test_a_run_keeps_its_files_in_one_folder(self, store: Store) -> None:
        run = RunPaths(store, "support", "0123456789abcdef")
        for key in (run.spec(), run.provenance(), run.metrics(), run.status(), run.checkpoints("20", "state.json")):
            store.write_bytes(b"{}", *key)
        assert store.list("runs") == ["support-01234567"]
        assert store.list(*run.file()) == [
            "checkpoints",
            "metrics.jsonl",
            "provenance.json",
            "spec.yaml",
            "status.json",
        ]

    def test_ages_are_by_the_storages_own_clock(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        store.write_bytes(b"old", "folder", "a", "one")
        assert store.ages("elsewhere") == {}
        first = store.ages("folder")
        assert set(first) == {("a", "one")}
        assert 0 <= first["a", "one"] < 30
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 3600)  # the reader's clock is an hour ahead
        assert store.ages("folder")["a", "one"] < 60
