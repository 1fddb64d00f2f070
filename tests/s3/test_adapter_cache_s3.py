"""Adapters from a real S3 server on their way to an engine: kept, healed, no trouble to others when it stalls."""

import asyncio
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from graftwork.artifacts import publish as artifact
from graftwork.artifacts import publish as artifact_local
from graftwork.artifacts import publish as artifact_register
from graftwork.artifacts.manifest import AdapterManifest
from graftwork.artifacts.registry import resolve, verify_adapter
from graftwork.errors import ArtifactError, StorageError
from graftwork.serving.adapter_cache import AdapterCache
from graftwork.serving.engine.engine import NativeEngine
from graftwork.serving.models import AdapterSource
from graftwork.storage.store import Store
from tests.adapters import facts, list_adapters
from tests.engines import load_model, spec, write_lora
from tests.s3_server import S3Server
from tests.tiny import write_tiny_base

BASE, WEIGHTS = "b" * 64, "adapter_model.safetensors"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[NativeEngine, list[Path]]:
    tmp = tmp_path_factory.mktemp("residency-s3")
    base = write_tiny_base(tmp / "base")
    folders = [write_lora(base, tmp / str(n), n, r=16, target_modules=["q_proj"]) for n in range(2)]
    return NativeEngine(load_model(base), spec(), "cpu"), folders


def publish(store: Store, task: str, folder: Path) -> str:
    return artifact.publish(store, task, folder, **facts(base_digest=BASE, prompt={}), alias="latest").version


def run(
    engine: NativeEngine, store: Store, play: Callable[[AdapterCache], Coroutine[Any, Any, None]], **settings: Any
) -> None:
    async def main() -> None:
        residency = AdapterCache(engine, AdapterSource(Store(store.uri), BASE), max_bytes=1 << 24, **settings)
        try:
            async with asyncio.timeout(60):
                await play(residency)
        finally:
            residency.close()

    asyncio.run(main())


async def once(residency: AdapterCache, ref: str) -> str:
    """Load it and let it go again."""
    pin = await residency.pin(ref)
    residency.release(pin)
    await residency.unload(ref)
    return pin.manifest.version


def test_what_was_brought_here_stays_and_is_healed(parts: tuple[NativeEngine, list[Path]], s3_store: Store) -> None:
    engine, folders = parts
    version = publish(s3_store, "card", folders[0])
    copy = s3_store.local_dir("adapters", "card", version) / WEIGHTS
    sound = (folders[0] / WEIGHTS).read_bytes()

    async def play(residency: AdapterCache) -> None:
        assert await once(residency, "card@latest") == version
        stamp = copy.stat().st_mtime_ns
        assert await once(residency, "card@latest") == version
        assert copy.stat().st_mtime_ns == stamp, "it was downloaded twice"
        copy.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        with pytest.raises(ArtifactError, match="sha256 differs"):
            await once(residency, "card@latest")
        assert await once(residency, "card@latest") == version
        assert copy.read_bytes() == sound

    run(engine, s3_store, play)
    assert [path.name for path in copy.parent.iterdir() if path.name.startswith(".tmp")] == []


def test_bytes_that_changed_on_the_server_never_get_a_name_here(
    parts: tuple[NativeEngine, list[Path]], s3_store: Store
) -> None:
    version = publish(s3_store, "card", parts[1][0])
    manifest = resolve(s3_store, "card@latest")
    sound = (parts[1][0] / WEIGHTS).read_bytes()
    s3_store.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]), "adapters", "card", version, WEIGHTS)
    with pytest.raises(ArtifactError, match="sha256 differs"):
        artifact_local.bring(s3_store, manifest)
    folder = s3_store.local_dir("adapters", "card", version)
    assert [path.name for path in folder.iterdir() if "safetensors" in path.name or path.name.startswith(".tmp")] == []


def test_a_full_disk_here_leaves_nothing_and_is_told(parts: tuple[NativeEngine, list[Path]], s3_store: Store) -> None:
    """A limit on file sizes, which ends a write as a full disk does."""
    publish(s3_store, "card", parts[1][0])
    manifest = resolve(s3_store, "card@latest")
    script = (
        "import resource, signal, sys\n"
        "from graftwork.artifacts.publish import bring\nfrom graftwork.artifacts.registry import resolve\n"
        "from graftwork.storage.store import Store\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
        "store = Store(sys.argv[1])\n"
        "bring(store, resolve(store, 'card@latest'))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, s3_store.uri], capture_output=True, text=True, timeout=200)
    assert "StorageError: download" in done.stderr
    assert "no space on this machine" in done.stderr
    folder = s3_store.local_dir("adapters", "card", manifest.version)
    assert not (folder / WEIGHTS).exists()
    assert [path.name for path in folder.iterdir() if path.name.startswith(".tmp")] == []
    assert (artifact_local.bring(s3_store, manifest) / WEIGHTS).exists()


@pytest.mark.long
def test_a_server_that_stalls_fails_only_who_waits_for_it(
    parts: tuple[NativeEngine, list[Path]], s3_env: S3Server, s3_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, folders = parts
    here = publish(s3_store, "here", folders[0])
    publish(s3_store, "away", folders[1])
    with stalling_proxy(s3_env.endpoint) as (url, stall):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)

        async def play(residency: AdapterCache) -> None:
            first = await residency.pin("here@latest")
            stall.set()
            waiting = asyncio.create_task(residency.pin("away@latest"))
            again = await residency.pin("here@latest")
            assert again.manifest.version == here
            with pytest.raises(StorageError, match="fetch_timeout_s"):
                await waiting
            for pin in (first, again):
                residency.release(pin)
            stall.clear()

        run(engine, s3_store, play, fetch_timeout_s=10.0)  # a first call opens a client: over 1 s on a busy machine


@contextmanager
def stalling_proxy(endpoint: str) -> Iterator[tuple[str, threading.Event]]:
    """Passes bytes on to the server until the event is set; then it takes them and says nothing."""
    target = urlsplit(endpoint)
    stall = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                if not stall.is_set():
                    sink.sendall(data)
        except OSError:
            pass  # the other side has gone
        finally:
            for end in (source, sink):
                end.close()

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.create_connection((target.hostname or "", target.port or 0))
            for pair in ((client, server), (server, client)):
                threading.Thread(target=pump, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", stall
    finally:
        listener.close()


def test_a_version_on_s3_is_registered_from_an_allowed_prefix_alone(
    parts: tuple[NativeEngine, list[Path]], s3_env: S3Server, s3_store: Store, tmp_path: Path
) -> None:
    other = Store(f"s3://{s3_env.bucket}/{secrets.token_hex(8)}")
    version = publish(other, "card", parts[1][0])
    target, place = Store(str(tmp_path / "root")), other.path("adapters", "card", version)
    checked: list[str] = []

    def take(uri: str, roots: tuple[str, ...]) -> AdapterManifest:
        return artifact_register.take(
            target, uri, roots, base_digest=BASE, max_bytes=1 << 20, check=lambda _, files: checked.extend(files)
        )

    for uri in (place, place.replace("/adapters/", "/../x/adapters/"), f"{other.uri}x/adapters/card/{version}"):
        with pytest.raises(ArtifactError, match="none of the allowed roots"):
            take(uri, (s3_store.uri,))
    assert (list_adapters(target), checked) == ([], [])
    assert take(place, (s3_store.uri, other.uri)).version == version
    assert verify_adapter(target, "card", version) == []
    assert WEIGHTS in checked
