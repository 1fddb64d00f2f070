"""What a cluster's spec says of Kubernetes' things, before objects are made of it: names, references, places."""

import re

from graftwork.cluster.backend import Job
from graftwork.cluster.inputs import path_findings
from graftwork.cluster.kuberay.findings import Found, refuse, warn
from graftwork.cluster.kuberay.rules.groups import is_label
from graftwork.cluster.kuberay.rules.part import version_of
from graftwork.cluster.secret_like import secret_findings, why_secret
from graftwork.cluster.spec import LABEL_PATTERN, ClusterSpec

RAY = (2, 60)
"""Of this package (pyproject.toml)."""
SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SECRET_KEY = re.compile(r"[-._a-zA-Z0-9]{1,253}")
RESERVED_LABELS = ("graftwork.dev/", "app.kubernetes.io/", "ray.io/", "kueue.x-k8s.io/")


def check_spec(job: Job, namespace: str) -> Found:
    """All findings on the cluster's spec and on the job's own."""
    if not re.fullmatch(LABEL_PATTERN, namespace) or len(namespace) > 63:
        yield refuse("NAMESPACE-FORM", "--target", repr(namespace), "small letters, digits and hyphens, at most 63")
    yield from _references(job.cluster)
    yield from _labels(job.cluster)
    yield from _secret_env(job.cluster)
    yield from _queues(job.cluster)
    yield from _store(job)
    yield from _survival(job.cluster)
    yield from _version(job.cluster)
    yield from _tokens(job)
    yield from path_findings(job.spec, shared=False)
    yield from secret_findings(job)


def _references(cluster: ClusterSpec) -> Found:
    """Names of objects that must be there."""
    named = {
        "service_account": cluster.service_account, "image_pull_secret": cluster.image_pull_secret,
        "storage.secret": cluster.storage.secret, "storage.claim": cluster.storage.claim,
        "auth.secret": cluster.auth.secret, "gcs.redis_secret": cluster.gcs.redis_secret, "queue": cluster.queue,
        "priority": cluster.priority,
    }  # fmt: skip
    for where, name in named.items():
        if name is not None and (not SUBDOMAIN.fullmatch(name) or len(name) > 253):
            why = why_secret("", name)
            yield refuse("REFERENCE-FORM", where, "no name of an object" if why else repr(name),
                         "the name of an object of the namespace: small letters, digits, hyphens, dots")  # fmt: skip


def _labels(cluster: ClusterSpec) -> Found:
    for key, value in cluster.labels.items():
        if not is_label(key, value):
            yield refuse("LABEL-FORM", f"labels.{key}", repr(value), "labels have the form of Kubernetes")
        if key.startswith(RESERVED_LABELS):
            yield refuse("LABEL-RESERVED", f"labels.{key}", "set by hand", f"not under {', '.join(RESERVED_LABELS)}")
    for index, group in enumerate(cluster.workers):
        for key, value in {**group.node_selector, group.spot_key: "true"}.items():
            if not is_label(key, value):
                yield refuse("LABEL-FORM", f"workers[{index}].node_selector.{key}", repr(value), "a node's label")


def _secret_env(cluster: ClusterSpec) -> Found:
    for name, reference in cluster.secret_env.items():
        secret, slash, key = reference.partition("/")
        formed = slash and SUBDOMAIN.fullmatch(secret) and SECRET_KEY.fullmatch(key)
        if not formed or why_secret("", reference) is not None:
            yield refuse(
                "SECRET-REFERENCE",
                f"secret_env.{name}",
                "no SECRET/KEY",
                "the name of a Secret and a key of it",
                f"kubectl create secret generic ... and {name}: SECRET/KEY",
            )
    for name in [*cluster.env, *cluster.secret_env]:
        if not ENV_NAME.fullmatch(name):
            yield refuse("ENV-NAME", f"env.{name}", repr(name), "letters, digits and underscores, no digit first")


def _tokens(job: Job) -> Found:
    """Variables that a served endpoint reads its keys from."""
    for key in ("token_env", "admin_token_env"):
        name = job.spec.get(key)
        if name and name not in job.cluster.secret_env:
            yield refuse(
                "TOKEN-MISSING",
                key,
                f"{name} is no variable of the pods",
                "an endpoint's keys are a Secret's",
                f"secret_env: {{{name}: SECRET/KEY}}",
            )


def _queues(cluster: ClusterSpec) -> Found:
    if cluster.gang == "kai" and cluster.gang_queue is None:
        yield refuse("GANG-QUEUE", "gang_queue", "none with gang: kai", "KAI leaves pods without a queue pending",
                     "gang_queue: the name of a queue of KAI's")  # fmt: skip
    if cluster.gang == "none" and cluster.gang_queue is not None:
        yield refuse("GANG-NONE", "gang_queue", cluster.gang_queue, "a gang's queue is its scheduler's",
                     "gang: volcano, kai or yunikorn; `queue` is Kueue's")  # fmt: skip
    if cluster.gang_queue is not None and not is_label("queue", cluster.gang_queue):
        yield refuse("REFERENCE-FORM", "gang_queue", repr(cluster.gang_queue), "a label's value")


def _store(job: Job) -> Found:
    claim = job.cluster.storage.claim
    local = not job.root.startswith("s3://")
    if re.search(r"\s", job.root):
        yield refuse("STORE-FORM", "storage.uri", repr(job.root), "a URI has no spaces: it is a word of an entrypoint")
    if local and claim is None:
        yield refuse("STORE-LOCAL", "storage.uri", job.root or "none", "pods reach the store: s3://, or a folder with "
                     "storage.claim", "storage: {uri: s3://bucket/team, secret: s3-credentials}")  # fmt: skip
    if claim is not None and not local:
        yield refuse("STORE-CLAIM", "storage.claim", f"with {job.root}", "a claim is for a store that is a folder")
    if job.cluster.storage.endpoint is not None and not re.match(r"https?://[^\s/]+", job.cluster.storage.endpoint):
        yield refuse("STORE-ENDPOINT", "storage.endpoint", "no URL", "http(s)://HOST:PORT")


def _survival(cluster: ClusterSpec) -> Found:
    if cluster.gcs.backend == "redis" and cluster.gcs.redis_secret is None:
        yield warn("REDIS-OPEN", "gcs.redis_secret", "none", "who reaches that Redis rules this Ray",
                   "gcs: {redis_secret: SECRET}")  # fmt: skip


def _version(cluster: ClusterSpec) -> Found:
    version = version_of(cluster.ray_version)
    if version is not None and version[:2] != RAY:
        yield refuse("RAY-VERSION", "ray_version", cluster.ray_version, f"this Graftwork runs on Ray {RAY[0]}.{RAY[1]}",
                     f"an image with Ray {RAY[0]}.{RAY[1]}")  # fmt: skip
