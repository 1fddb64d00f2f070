"""A real S3 server for the tests of this folder."""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from graftwork.storage.store import Store
from tests.s3_server import S3Server, running


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """One server for all tests of a session; each test takes its own prefix."""
    with running() as server:
        yield server


@pytest.fixture
def s3_env(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> S3Server:
    """The environment of a person who has set up this server, and a cache of its own."""
    use(s3_server, monkeypatch, tmp_path)
    return s3_server


@pytest.fixture
def s3_store(s3_env: S3Server) -> Store:
    """A fresh root on the server."""
    return Store(f"s3://{s3_env.bucket}/{secrets.token_hex(8)}")


def use(server: S3Server, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let this process use the server, and a cache in `folder`."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GRAFTWORK_CACHE", str(folder / "cache"))
