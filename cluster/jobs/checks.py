"""Checks of a job that all targets share: secrets in its spec, this machine's environment, GPU memory and disks.

A finding on a secret gives the reason and never the value.
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import graftwork
from graftwork.cluster.jobs.models import Findings, Job, refuse, warn
from graftwork.cluster.spec import ClusterSpec
from graftwork.planning.hardware import GIB
from graftwork.planning.memory import HEADROOM

_NAME = re.compile(
    r"(^|[_.-])(secret|token|password|passwd|passphrase|credentials?|api[_-]?key|access[_-]?key([_-]?id)?"
    r"|private[_-]?key|secret[_-]?key|auth[_-]?key)([_.-]|$)",
    re.IGNORECASE,
)
_REFERENCE = re.compile(r"([_.-](file|path|env|name|secret|mode|url|id|ttl|limit|type)|_IN|_DIR)$", re.IGNORECASE)
"""A name with such an end says where a secret is, not its value."""
_KEY_ID = re.compile(r"access[_-]?key[_-]?id$", re.IGNORECASE)
_PLAIN = re.compile(r"(|true|false|yes|no|on|off|none|null|[01]|disabled)", re.IGNORECASE)
_VALUES = {
    "an access key of AWS": r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    "a token of Hugging Face": r"\bhf_[A-Za-z0-9]{20,}",
    "a token of GitHub": r"\b(gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})",
    "an API key": r"\b(sk|pk|rk)-[A-Za-z0-9_-]{20,}",
    "a key of Google": r"\bAIza[0-9A-Za-z_-]{35}",
    "a token of Slack": r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "a signed token": r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in a URL": r"://[^\s/:@]*:[^\s/@]+@",
    "a password in a URL's query": r"(?i)[?&](password|passwd|token|secret|api[-_]?key|x-amz-signature|sig)=[^\s&]+",
    "a password among arguments": r"(?i)--?(password|passwd|token|secret|api[-_]key)[= ]\S+",
    "a bearer token": r"(?i)\bbearer\s+[A-Za-z0-9._~+/-]{16,}",
}
_KNOWN = {what: re.compile(pattern) for what, pattern in _VALUES.items()}
_AWS_SECRET = re.compile(
    r"(?<![A-Za-z0-9/+])(?=[A-Za-z0-9/+]*[A-Z])(?=[A-Za-z0-9/+]*[a-z])(?=[A-Za-z0-9/+]*[0-9])"
    r"[A-Za-z0-9+]{10}[A-Za-z0-9/+]{30}(?![A-Za-z0-9/+=])"
)
"""40 characters of base64 with small and capital letters and digits: no digest and no path looks so."""
GANGS = frozenset({"train", "trial"})
"""Kinds whose workers are ranks of one run."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ENVIRONMENTS = frozenset({"env", "env_vars", "environment"})


def why_secret(name: str, value: str) -> str | None:
    """Why a variable's value is taken for a secret; None where it is not."""
    if _PLAIN.fullmatch(value):
        return None
    if _NAME.search(name) and not (_REFERENCE.search(name) and not _KEY_ID.search(name)):
        return "its name is a secret's"
    return why_secret_text(value)


def why_secret_text(text: str) -> str | None:
    """Why a text is taken to hold a secret; None where it is not."""
    found = next((what for what, pattern in _KNOWN.items() if pattern.search(text)), None)
    if found is None and _AWS_SECRET.search(text):
        found = "a secret key of AWS"
    return None if found is None else f"it looks like {found}"


def secret_findings(job: Job) -> Findings:
    """Every text of the job's spec and of its cluster's file that looks like a secret: all places refuse them alike."""
    for where, why in [*secrets_in(dict(job.spec)), *secrets_in(job.cluster.model_dump(mode="json"))]:
        yield refuse(
            "SECRET-VALUE",
            where,
            why,
            "specs and cluster files are stored, shown and sent",
            "name an environment variable or a Secret",
        )


def secrets_in(tree: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Path and reason of all texts and keys that look like secrets; names count among environments alone."""
    if isinstance(tree, str):
        why = why_secret_text(tree)
        if why is not None:
            yield where, why
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            if (why := why_secret_text(str(key))) is not None:
                yield where or "a key", f"one of its keys: {why}"
                continue
            path = f"{where}.{key}" if where else str(key)
            named = where.rpartition(".")[2] in ENVIRONMENTS and isinstance(value, str)
            why = why_secret(str(key), value) if named else None
            yield from [(path, why)] if why is not None else secrets_in(value, path)
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from secrets_in(value, f"{where}[{index}]")


def versions() -> dict[str, str]:
    """Return the versions that this machine and the target must share. Imports none of the packages."""
    found = {"graftwork": graftwork.__version__, "python": platform.python_version()}
    for name in ("ray", "torch", "kubernetes"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def surroundings(on: str, root: str, cluster: ClusterSpec) -> Findings:
    """Findings on this machine: version, token, Kubernetes client, credentials."""
    ray = versions()["ray"]
    if on != "local" and ray != cluster.ray_version:
        yield warn(
            "RAY-VERSION",
            "ray_version",
            f"{cluster.ray_version} there, {ray} here",
            "jobs are made for one Ray",
            f"pip install 'ray=={cluster.ray_version}'",
        )
    if on.startswith("http"):
        yield from _token(on)
    if on.startswith("k8s:"):
        if importlib.util.find_spec("kubernetes") is None:
            yield refuse(
                "NO-KUBERNETES-CLIENT",
                "kubernetes",
                "the Python package is not installed",
                "k8s: needs it",
                "pip install 'kubernetes>=35,<37' 'kubernetes-validate>=1.34'",
            )
        if not root.startswith("s3://") and cluster.storage.claim is None:
            yield refuse(
                "STORE-LOCAL",
                "storage.uri",
                root,
                "pods reach s3://, or a claim",
                "set storage.uri in cluster.yaml, or --root s3://BUCKET/PREFIX",
            )
    names = ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE")
    named = any(os.environ.get(name) for name in names) or (Path.home() / ".aws" / "credentials").is_file()
    if root.startswith("s3://") and not named:  # no error: the machine may have an identity of its own
        yield warn(
            "NO-S3-CREDENTIALS",
            "AWS_ACCESS_KEY_ID",
            "no credentials in the environment",
            "this command reads and writes the store as well as the pods do",
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
        )


def _token(on: str) -> Findings:
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(path) if path else Path.home() / ".ray" / "auth_token"
    if path and not file.is_file():
        yield refuse(
            "TOKEN-FILE",
            "RAY_AUTH_TOKEN_PATH",
            f"no file {path}",
            "it holds the cluster's token",
            "write the token there with mode 0600, or unset it",
        )
    elif not os.environ.get("RAY_AUTH_TOKEN") and not file.is_file() and urlsplit(on).hostname not in LOOPBACK:
        yield warn(
            "NO-TOKEN",
            "RAY_AUTH_TOKEN",
            "not set",
            "a Ray that takes anybody's jobs runs anybody's code",
            "start the cluster with RAY_AUTH_MODE=token and set RAY_AUTH_TOKEN here",
        )
    if file.is_file() and stat.S_IMODE(file.stat().st_mode) & 0o077:
        yield warn(
            "TOKEN-FILE-OPEN",
            str(file),
            "others on this machine can read it",
            "a token is its owner's alone",
            f"chmod 600 {file}",
        )


def gpu_memory_findings(job: Job, where: str, name: str, memory_bytes: int | None) -> Findings:
    """The predicted peak of a worker against a GPU that it may be placed on; None: the GPU's memory is not known.

    A worker computes on one GPU, however many it reserves, and on a share of one has that share of the memory.
    """
    wanted, share = max(one.gpu_memory_bytes_per_worker for one in job.demands), min(job.demand.gpus_per_worker, 1.0)
    if memory_bytes is None:
        yield warn(
            "GPU-UNKNOWN",
            where,
            f"GPUs of type {name or '(none named)'}",
            "a GPU's memory is compared with the predicted peak where its type is known",
            "name a type that `graftwork plan --gpu` knows",
        )
    elif wanted > HEADROOM * memory_bytes * share:
        part = "" if share == 1.0 else f", of which a worker gets {share:g}"
        yield refuse(
            "FIT-GPU-MEMORY",
            where,
            f"{name} has {memory_bytes / GIB:.1f} GiB{part}",
            f"a worker's predicted peak is {wanted / GIB:.1f} GiB; a run may use {HEADROOM:.0%} of a GPU",
            "a larger GPU, or what `graftwork plan` suggests",
        )


def gpu_share_findings(job: Job) -> Findings:
    """Shares of a GPU that Ray gives out and the workers can't compute on."""
    each, workers = job.demand.gpus_per_worker, job.demand.num_workers
    key = {"train": "gpus_per_worker", "tune": "train.gpus_per_worker"}.get(job.kind, "num_gpus")
    if each > 1 and each != int(each):
        yield refuse("GPU-SHARE", key, f"{each:g}", "Ray gives out whole GPUs above 1", f"set {key}={int(each)}")
    elif 0 < each < 1 and workers > 1 and job.kind in GANGS:
        yield refuse(
            "GPU-SHARE",
            key,
            f"{workers} workers with {each:g} GPU each",
            "NCCL takes one rank per GPU: two ranks on one GPU fail with `Duplicate GPU detected`",
            f"set {key}=1, or num_workers=1",
        )


def nvme_findings(job: Job, writable: tuple[str, ...] | None) -> Findings:
    """An offload to disks: what the machines need for it. `writable`: the folders that pods write to; None: any."""
    training = job.spec.get("train")
    strategy = (training if isinstance(training, Mapping) else job.spec).get("strategy") or {}
    key = next((key for key in ("offload_optimizer", "offload_weights") if strategy.get(key) == "nvme"), None)
    if key is None:
        return
    path = str(strategy.get("nvme_path"))
    if writable is not None and not any(path == folder or path.startswith(f"{folder}/") for folder in writable):
        yield refuse(
            "NVME-PATH",
            "strategy.nvme_path",
            f"{path} can't be written in a pod",
            f"a pod writes to {', '.join(writable)}; cluster.yaml mounts no disk of the node",
            f"set strategy.nvme_path={writable[0]}/offload, or strategy.{key}=cpu",
        )
    yield warn(
        "NVME-IMAGE",
        f"strategy.{key}",
        "nvme: DeepSpeed builds async_io where the workers run",
        "each machine or image needs libaio (libaio-dev), a C++ compiler and a local NVMe disk at nvme_path",
        f"add them, or set strategy.{key}=cpu",
    )
