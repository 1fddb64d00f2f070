"""A folder as a root: what any root promises, and what a disk adds. The same on S3: tests/s3/test_storage_s3.py."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftwork.errors import ConfigError, StorageError
from graftwork.storage import store as storage
from graftwork.storage.store import Store
from tests.process_races import die_at
from tests.store_contract import StoreContract

ROOT = Path(__file__).parents[3]


class TestFolder(StoreContract):
    """Contract of a store, on a folder."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return Store(str(tmp_path / "root"))


def test_equal_places_have_one_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    uris = {Store(root).uri for root in ("x", "./x", "x/", f"{tmp_path}/x", f"file://{tmp_path}/y/../x", "y/../x")}
    assert uris == {str(tmp_path / "x")}
    assert Store(f"file://localhost{tmp_path}/a%20b").uri == str(tmp_path / "a b")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Store("~/x").uri == str(tmp_path / "x")
    assert Store("s3://bucket/a/b/").uri == "s3://bucket/a/b"


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "\0",
        "s3://",
        "s3:///key",
        "s3://b",
        "s3://bucket/../x",
        "s3://bucket//x",
        "s3:/bucket/x",
        "s3:bucket",
        "file:/x",
        "file://host/x",
        "file://",
        "gs://bucket/x",
        "http://host/x",
        "pypi://package/file",
    ],
)
def test_a_uri_that_names_no_place_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="Rule: write a path"):
        Store(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://KEYID:hunt3r2@bucket/x",
        "s3://KEYID:hunt/3r2@bucket/x",
        "s3://bucket/x?aws_secret=hunt3r2",
        "s3://bucket/x#hunt3r2",
        "https://user:hunt3r2@host/bucket",
        "file:///x?key=hunt3r2",
    ],
)
def test_a_uri_that_carries_credentials_is_refused_without_showing_them(uri: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Store(uri)
    assert "AWS_SECRET_ACCESS_KEY" in caught.value.hint
    for shown in (str(caught.value), repr(caught.value)):
        assert "hunt" not in shown
        assert "3r2" not in shown
        assert "KEYID" not in shown


@given(st.lists(st.text(), min_size=1, max_size=4))
def test_no_key_leaves_its_root(parts: list[str]) -> None:
    for root in ("/srv/root", "s3://bucket/root"):
        store = Store(root)
        try:
            path = store.path(*parts)
        except StorageError:
            continue
        below = os.path.normpath(path.removeprefix("s3:/"))
        assert below.startswith(os.path.normpath(root.removeprefix("s3:/")) + "/")
        assert below.count("/") == root.removeprefix("s3:/").count("/") + len(parts)


@given(st.lists(st.text(), min_size=1, max_size=3), st.lists(st.text(), min_size=1, max_size=3))
def test_different_keys_have_different_paths(one: list[str], other: list[str]) -> None:
    store = Store("/srv/root")
    try:
        same = store.path(*one) == store.path(*other)
    except StorageError:
        return
    assert same == (one == other)


def test_a_data_uri_is_the_store_of_its_folder_and_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows 1.jsonl").write_bytes(b"{}\n")
    monkeypatch.chdir(tmp_path)
    for uri in ("rows 1.jsonl", str(tmp_path / "rows 1.jsonl"), f"file://{tmp_path}/rows%201.jsonl"):
        store, key = storage.open_uri(uri)
        assert (store.uri, key) == (str(tmp_path), "rows 1.jsonl")
        assert storage.read_uri(uri) == b"{}\n"
    store, key = storage.open_uri("s3://bucket/data/rows.jsonl")
    assert (store.uri, key) == ("s3://bucket/data", "rows.jsonl")
    for uri in ("s3://bucket", "s3://bucket/", "/"):
        with pytest.raises(ConfigError, match="names no file"):
            storage.open_uri(uri)


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path))
    assert storage.cache_root() == tmp_path
    monkeypatch.delenv("GRAFTWORK_CACHE")
    assert storage.cache_root() == Path.home() / ".cache" / "graftwork"


def test_lines_of_many_writers_stay_whole(tmp_path: Path) -> None:
    store = Store(str(tmp_path))

    def write(writer: int) -> None:
        for step in range(50):
            store.append_jsonl({"writer": writer, "step": step, "pad": "x" * 500}, "metrics.jsonl")

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = store.read_text("metrics.jsonl").splitlines()
    assert len(lines) == 400
    assert all(line.startswith('{"writer":') and line.endswith('"}') for line in lines)


def test_a_line_after_half_a_line_stays_readable(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step":1}\n{"st')
    store.append_jsonl({"step": 2}, "metrics.jsonl")
    assert store.read_text("metrics.jsonl").splitlines() == ['{"step":1}', '{"st', '{"step":2}']


def test_a_writer_killed_at_any_moment_leaves_the_old_content_or_the_new(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "root"))
    store.write_bytes(b"old", "folder", "key")
    seen = []
    for moment in range(1, 100):
        killed = die_at(moment, lambda: store.write_bytes(b"new" * 100_000, "folder", "key"))
        seen.append(store.read_bytes("folder", "key"))
        assert store.list("folder") == ["key"]
        if not killed:
            break
    assert set(seen) == {b"old", b"new" * 100_000}
    assert len(seen) >= 4


def test_a_full_disk_is_named_and_leaves_the_old_content(tmp_path: Path) -> None:
    code = (
        "import resource; from graftwork.storage.store import Store\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"Store({str(tmp_path)!r}).write_bytes(b'x' * 5000, 'key')"
    )
    Store(str(tmp_path)).write_bytes(b"old", "key")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert f"StorageError: write {tmp_path}/key: no space ({os.strerror(errno.EFBIG)})" in done.stderr
    assert "Hint: free space on the disk of" in done.stderr
    assert os.listdir(tmp_path) == ["key"]
    assert (tmp_path / "key").read_bytes() == b"old"


def test_a_root_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "root").write_bytes(b"")
    with pytest.raises(StorageError, match="a file is in the place of a folder"):
        Store(str(tmp_path / "root")).write_bytes(b"x", "a", "b")


def test_a_root_without_rights_is_named(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir(mode=0o500)
    code = (
        "import os; from graftwork.storage.store import Store\n"
        "os.geteuid() or os.setuid(65534)  # root may write anywhere\n"
        f"Store({str(tmp_path / 'root')!r}).write_bytes(b'x', 'a')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "/root/a: not allowed (Permission denied)" in done.stderr
    assert "Hint: give your user write and read rights" in done.stderr


def test_reading_a_folder_as_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="it is a folder"):
        Store(str(tmp_path.parent)).read_bytes(tmp_path.name)


def test_new_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        Store(str(tmp_path)).write_bytes(b"x", "key")
    finally:
        os.umask(before)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o640


def test_importing_storage_opens_no_filesystem_library() -> None:
    heavy = "('fsspec', 's3fs', 'botocore', 'torch')"
    code = f"import graftwork.storage.store, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
