"""Adapters on a real S3 server: atomic without rename, whoever races, whenever a publisher is killed."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from graftwork.artifacts import publish as artifact
from graftwork.artifacts.manifest import aliases
from graftwork.artifacts.registry import Listing, UnknownAdapter, open_adapter, resolve, verify_adapter
from graftwork.errors import ArtifactError
from graftwork.storage.store import Store
from tests.adapters import facts, list_adapters, write_adapter
from tests.process_races import outcome, race, start
from tests.s3_server import S3Server

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "out")


def test_a_listing_tells_the_store_as_it_is_now(s3_store: Store, folder: Path) -> None:
    listing = Listing(s3_store)
    assert listing.read() == []
    one = artifact.publish(s3_store, "support", folder, **facts(), alias="latest")
    assert listing.read() == [(one, ["latest"])]
    assert listing.read() == [(one, ["latest"])]
    two = artifact.publish(s3_store, "agent", write_adapter(folder.parent / "2", seed=2), **facts())
    artifact.promote(s3_store, "agent", "prod", two.version)
    assert listing.read() == [(two, ["prod"]), (one, ["latest"])]
    s3_store.write_bytes(b"{", "adapters", "support", one.version, "manifest.json")
    assert listing.read() == [(two, ["prod"])]


def test_an_adapter_is_published_found_promoted_fetched_and_removed(s3_store: Store, folder: Path) -> None:
    made = artifact.publish(s3_store, "support", folder, **facts(), alias="latest")
    assert artifact.publish(s3_store, "support", folder, **facts(run="again"), alias="latest") == made
    assert list_adapters(s3_store) == [made]
    assert resolve(s3_store, "support@latest") == made
    assert verify_adapter(s3_store, "support", made.version) == []
    fetched = artifact.fetch(s3_store, "support", made.version)
    assert (fetched / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    with pytest.raises(ArtifactError, match="latest points at it"):
        artifact.remove(s3_store, "support", made.version)
    other = artifact.publish(s3_store, "support", write_adapter(folder.parent / "2", seed=2), **facts(), alias="latest")
    artifact.remove(s3_store, "support", made.version)
    assert list_adapters(s3_store) == [other]
    with pytest.raises(UnknownAdapter, match=f"latest \\({other.version}\\)"):
        open_adapter(s3_store, "support", made.version)


def test_equal_content_has_one_version_on_a_disk_and_on_s3(s3_store: Store, folder: Path, tmp_path: Path) -> None:
    here = artifact.publish(Store(str(tmp_path / "root")), "support", folder, **facts())
    assert artifact.publish(s3_store, "support", folder, **facts()).version == here.version


def test_a_fetched_adapter_is_kept_and_a_damaged_copy_is_fetched_again(s3_store: Store, folder: Path) -> None:
    version = artifact.publish(s3_store, "support", folder, **facts()).version
    copy = artifact.fetch(s3_store, "support", version) / WEIGHTS
    stamp = copy.stat().st_mtime_ns
    assert artifact.fetch(s3_store, "support", version) / WEIGHTS == copy
    assert copy.stat().st_mtime_ns == stamp
    sound = copy.read_bytes()
    copy.write_bytes(sound[:-1] + b"\x00")
    (copy.parent / "junk.bin").write_bytes(b"x")
    artifact.fetch(s3_store, "support", version)
    assert copy.read_bytes() == sound
    assert not (copy.parent / "junk.bin").exists()


def test_bytes_that_changed_on_the_server_are_not_served(s3_store: Store, folder: Path) -> None:
    version = artifact.publish(s3_store, "support", folder, **facts()).version
    sound = (folder / WEIGHTS).read_bytes()
    s3_store.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]), "adapters", "support", version, WEIGHTS)
    with pytest.raises(ArtifactError, match="sha256 differs"):
        artifact.fetch(s3_store, "support", version)
    s3_store.write_bytes(sound[:-1], "adapters", "support", version, WEIGHTS)
    with pytest.raises(ArtifactError, match="the manifest has"):
        open_adapter(s3_store, "support", version)


def test_racing_publishers_and_promoters_leave_one_valid_state(s3_store: Store, tmp_path: Path) -> None:
    folders = [write_adapter(tmp_path / str(seed), seed=seed) for seed in range(3)]
    old = [artifact.publish(s3_store, "support", folder, **facts(), alias="latest").version for folder in folders[:2]]
    publish = ("publish", s3_store.uri, "support", str(folders[2]), "latest")
    promote = ("promote", s3_store.uri, "support", "latest", *(old * 5))
    outcomes = race([publish, publish, promote, promote])
    assert outcomes[0] == outcomes[1]
    published = {*old, outcomes[0]["done"]}
    assert {m.version for m in list_adapters(s3_store)} == published
    assert resolve(s3_store, "support@latest").version in published
    assert all(verify_adapter(s3_store, "support", version) == [] for version in published)


def test_a_promoter_and_a_remover_of_one_version_never_leave_a_dangling_alias(s3_store: Store, folder: Path) -> None:
    for number in range(2):
        task = f"task{number}"
        version = artifact.publish(s3_store, task, folder, **facts()).version
        outcomes = race([("promote", s3_store.uri, task, "prod", version), ("remove", s3_store.uri, task, version)])
        assert {outcome.get("error") for outcome in outcomes} <= {None, "ArtifactError", "UnknownAdapter"}
        there = {m.version for m in list_adapters(s3_store) if m.task == task}
        assert set(aliases(s3_store, task).values()) <= there


@pytest.mark.long
def test_a_publisher_killed_at_any_byte_leaves_nothing_visible_and_a_rerun_completes(
    s3_store: Store, s3_env: S3Server, tmp_path: Path
) -> None:
    """A proxy on the wire kills the publisher -9 once it has sent so many bytes, inside a PUT or between two."""
    folder = write_adapter(tmp_path / "out", hidden=512)
    sent = publish_through_proxy(s3_env, f"{s3_store.uri}/whole", folder, kill_after=None)
    assert sent > (folder / WEIGHTS).stat().st_size
    version = resolve(Store(f"{s3_store.uri}/whole"), "support@latest").version
    visible = []
    for step in range(1, 12):
        store = Store(f"{s3_store.uri}/cut{step}")
        publish_through_proxy(s3_env, store.uri, folder, kill_after=sent * step // 12)
        seen = list_adapters(store)
        assert all(verify_adapter(store, "support", manifest.version) == [] for manifest in seen)
        assert set(aliases(store, "support").values()) <= {manifest.version for manifest in seen}
        if not seen:
            with pytest.raises(UnknownAdapter):
                verify_adapter(store, "support", version)
        visible.append(bool(seen))
        made = artifact.publish(store, "support", folder, **facts(), alias="latest")
        assert verify_adapter(store, "support", made.version) == []
        assert aliases(store, "support") == {"latest": made.version}
    assert visible[:6] == [False] * 6


def publish_through_proxy(server: S3Server, root: str, folder: Path, kill_after: int | None) -> int:
    """Publish in a process whose requests pass a proxy that kills it after so many bytes. Bytes that it sent."""
    with listening() as (listener, endpoint):
        process = start(
            ("publish", root, "support", str(folder), "latest"), {**os.environ, "AWS_ENDPOINT_URL": endpoint}
        )
        wire = Wire(listener, server.endpoint, process.pid, kill_after)
        threading.Thread(target=wire.accept, daemon=True).start()
        if kill_after is None:
            assert "done" in outcome(process)
        else:
            process.communicate("go\n")
            assert process.returncode == -signal.SIGKILL
    return wire.sent


@contextmanager
def listening() -> Iterator[tuple[socket.socket, str]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener, f"http://127.0.0.1:{listener.getsockname()[1]}"


class Wire:
    """A TCP proxy to the server that counts what the client sends and kills it at a given byte."""

    def __init__(self, listener: socket.socket, target: str, pid: int, kill_after: int | None) -> None:
        self.listener, self.target, self.pid, self.kill_after = listener, urlsplit(target), pid, kill_after
        self.sent = 0
        self.lock = threading.Lock()

    def accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return  # the test is over
            server = socket.create_connection((self.target.hostname, self.target.port))
            threading.Thread(target=self.pump, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self.pump, args=(server, client, False), daemon=True).start()

    def pump(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        try:
            while data := source.recv(4096):
                target.sendall(self.count(data) if counted else data)
        except OSError:
            pass  # one side is gone
        finally:
            for end in (source, target):
                end.close()

    def count(self, data: bytes) -> bytes:
        """What of `data` still passes. At the limit the client is killed and the wire is dead."""
        with self.lock:
            left = len(data) if self.kill_after is None else self.kill_after - self.sent
            self.sent += len(data)
        if left < len(data):
            os.kill(self.pid, signal.SIGKILL)
            if left <= 0:
                raise OSError("cut")
        return data[:left]
