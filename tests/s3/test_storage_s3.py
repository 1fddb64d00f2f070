"""A real S3 server as a root: what any root promises, and what a network adds."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from graftwork.errors import StorageError
from graftwork.storage import store as storage
from graftwork.storage.store import Store
from tests.s3_server import S3Server
from tests.store_contract import StoreContract

ENDS_S = 60
"""A call that waits for what never comes takes longer, however slow the machine is."""
SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


class TestS3(StoreContract):
    """Contract of a store, on a bucket."""

    @pytest.fixture
    def store(self, s3_store: Store) -> Store:
        return s3_store


def refused(store: Store) -> list[StorageError]:
    """The error of every kind of call, each of which has to come, with a hint, without a secret."""
    calls = (
        lambda: store.read_bytes("key"),
        lambda: store.write_bytes(b"x", "key"),
        lambda: store.create_bytes(b"x", "key"),
        lambda: store.exists("key"),
        lambda: store.list(),
        lambda: store.delete("key"),
    )
    errors = []
    for call in calls:
        began = time.monotonic()
        with pytest.raises(StorageError) as caught:
            call()
        assert time.monotonic() - began < ENDS_S
        assert caught.value.hint
        secrets = [os.environ[name] for name in SECRETS if os.environ.get(name)]
        assert not [secret for secret in secrets if secret in f"{caught.value}{caught.value!r}"]
        errors.append(caught.value)
    return errors


def test_an_object_on_s3_cannot_grow(s3_store: Store) -> None:
    with pytest.raises(StorageError, match="objects on S3 cannot grow"):
        s3_store.append_jsonl({"step": 1}, "metrics.jsonl")


def test_a_large_object_goes_up_in_parts_and_comes_down_whole(s3_store: Store, tmp_path: Path) -> None:
    """101 MiB: above the size from which s3fs uploads in parts."""
    data = os.urandom(1 << 20) * 101
    s3_store.write_bytes(data, "large")
    assert s3_store.children() == {"large": len(data)}
    assert s3_store.download(tmp_path / "large", "large").read_bytes() == data


def test_a_folder_of_more_than_a_page_is_listed_and_deleted_whole(s3_store: Store) -> None:
    from concurrent.futures import ThreadPoolExecutor

    names = [f"{number:04d}" for number in range(1005)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: s3_store.write_bytes(b"x", "many", name), names))
    assert s3_store.list("many") == names
    s3_store.delete("many")
    assert s3_store.list("many") == []


def test_data_is_read_from_an_s3_uri(s3_store: Store) -> None:
    s3_store.write_bytes(b'{"id":1}\n', "data", "rows.jsonl")
    assert storage.read_uri(f"{s3_store.uri}/data/rows.jsonl") == b'{"id":1}\n'


def test_the_local_mirror_of_a_key_differs_by_server_and_root(
    s3_store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here = s3_store.local_dir("adapters", "support")
    assert here.is_relative_to(tmp_path / "cache")
    assert here.parts[-2:] == ("adapters", "support")
    assert Store(s3_store.uri + "/deeper").local_dir("adapters", "support") != here
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert s3_store.local_dir("adapters", "support") != here


def test_a_missing_bucket_is_named(s3_env: S3Server) -> None:
    for error in refused(Store("s3://no-such-bucket/root")):
        assert "there is no bucket 'no-such-bucket'" in str(error)
        assert "create it" in error.hint


def test_a_wrong_secret_is_refused(s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-Secret-0123456789")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "wrong-Token-0123456789")
    for error in refused(Store(s3_store.uri)):
        assert "the server refuses these credentials" in error.problem
        assert "AWS_SECRET_ACCESS_KEY" in error.hint


def test_an_unknown_key_id_is_refused(s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "NOBODY")
    for error in refused(Store(s3_store.uri)):
        assert "the server refuses these credentials" in error.problem


def test_without_credentials_the_error_comes_at_once_and_says_what_to_set(
    s3_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for error in refused(Store(s3_store.uri)):
        assert "none in the environment" in error.problem
        assert "AWS_ACCESS_KEY_ID" in error.hint


def test_half_of_the_credentials_is_named_as_such(s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for error in refused(Store(s3_store.uri)):
        assert "credentials are incomplete" in error.problem


def test_a_closed_port_is_named_with_the_endpoint(s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound but not listening: nobody else can answer there
        endpoint = f"http://127.0.0.1:{held.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        for error in refused(Store(s3_store.uri)):
            assert "the server cannot be reached" in error.problem
            assert endpoint in error.subject


def test_an_endpoint_that_carries_credentials_is_refused_without_showing_them(
    s3_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", os.environ["AWS_ENDPOINT_URL"].replace("//", "//user:hunt3r2@"))
    for error in refused(Store(s3_store.uri)):
        assert "it carries credentials" in error.problem
        assert "hunt3r2" not in str(error)


def test_the_endpoint_variable_of_s3_alone_is_enough(s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    store = Store(s3_store.uri)
    store.write_bytes(b"x", "key")
    assert store.read_bytes("key") == b"x"


def test_a_command_that_meets_s3_ends_without_a_traceback(s3_store: Store) -> None:
    """The client's connections are closed quietly when the process ends."""
    code = f"from graftwork.storage.store import Store\nprint(Store({s3_store.uri!r}).exists('no'))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert (done.returncode, done.stdout.strip(), done.stderr.strip()) == (0, "False", "")
