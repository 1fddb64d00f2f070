"""This machine's way to a place and to its store: versions, tokens, the client of Kubernetes, credentials."""

import importlib.metadata
import importlib.util
import os
import platform
import stat
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import graftwork
from graftwork.cluster.backend import Finding
from graftwork.cluster.spec import ClusterSpec

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def versions() -> dict[str, str]:
    """Of what must be alike here and there. Imports none of them."""
    found = {"graftwork": graftwork.__version__, "python": platform.python_version()}
    for name in ("ray", "torch", "kubernetes"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def surroundings(on: str, root: str, cluster: ClusterSpec) -> Iterator[Finding]:
    """What is lacking on this machine."""
    ray = versions()["ray"]
    if on != "local" and ray != cluster.ray_version:
        yield Finding("W-RAY-VERSION", "warning", "ray_version", f"{cluster.ray_version} there, {ray} here",
                      "jobs are made for one Ray", f"pip install 'ray=={cluster.ray_version}'")  # fmt: skip
    if on.startswith("http"):
        yield from _token(on)
    if on.startswith("k8s:"):
        yield from _kubernetes()
        if not root.startswith("s3://") and cluster.storage.claim is None:
            yield Finding("E-STORE-LOCAL", "error", "storage.uri", root, "pods reach s3://, or a claim",
                          "set storage.uri in cluster.yaml, or --root s3://BUCKET/PREFIX")  # fmt: skip
    if root.startswith("s3://"):
        yield from _credentials()


def _token(on: str) -> Iterator[Finding]:
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(path) if path else Path.home() / ".ray" / "auth_token"
    if path and not file.is_file():
        yield Finding("E-TOKEN-FILE", "error", "RAY_AUTH_TOKEN_PATH", f"no file {path}", "it holds the cluster's token",
                      "write the token there with mode 0600, or unset it")  # fmt: skip
    elif not os.environ.get("RAY_AUTH_TOKEN") and not file.is_file() and urlsplit(on).hostname not in LOOPBACK:
        yield Finding("W-NO-TOKEN", "warning", "RAY_AUTH_TOKEN", "not set",
                      "a Ray that takes anybody's jobs runs anybody's code",
                      "start the cluster with RAY_AUTH_MODE=token and set RAY_AUTH_TOKEN here")  # fmt: skip
    if file.is_file() and stat.S_IMODE(file.stat().st_mode) & 0o077:
        yield Finding("W-TOKEN-FILE-OPEN", "warning", str(file), "others on this machine can read it",
                      "a token is its owner's alone", f"chmod 600 {file}")  # fmt: skip


def _kubernetes() -> Iterator[Finding]:
    if importlib.util.find_spec("kubernetes") is None:
        yield Finding("E-NO-KUBERNETES-CLIENT", "error", "kubernetes", "the Python package is not installed",
                      "k8s: needs it", "pip install 'kubernetes>=35,<37' 'kubernetes-validate>=1.34'")  # fmt: skip


def _credentials() -> Iterator[Finding]:
    """None is no error: the machine may have an identity of its own."""
    named = any(os.environ.get(key) for key in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE"))
    if not named and not (Path.home() / ".aws" / "credentials").is_file():
        yield Finding("W-NO-S3-CREDENTIALS", "warning", "AWS_ACCESS_KEY_ID", "no credentials in the environment",
                      "this command reads and writes the store as well as the pods do",
                      "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE")  # fmt: skip
