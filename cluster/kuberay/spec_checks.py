"""Checks of a cluster's spec before objects are made of it: names, labels, references to Secrets, queues, store."""

import re

from graftwork.cluster.jobs.environment import secret_findings, why_secret
from graftwork.cluster.jobs.inputs import path_findings
from graftwork.cluster.jobs.models import Job
from graftwork.cluster.kuberay.object_view import Found, refuse, version_of, warn
from graftwork.cluster.kuberay.rules.cluster import is_label
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
        yield refuse(
            "NAMESPACE-FORM",
            "--target",
            repr(namespace),
            "a namespace has small letters, digits and hyphens, at most 63",
            "set --target k8s:CONTEXT/NAMESPACE, e.g. k8s:prod/graftwork",
        )
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
        "service_account": cluster.service_account,
        "image_pull_secret": cluster.image_pull_secret,
        "storage.secret": cluster.storage.secret,
        "storage.claim": cluster.storage.claim,
        "auth.secret": cluster.auth.secret,
        "gcs.redis_secret": cluster.gcs.redis_secret,
        "queue": cluster.queue,
        "priority": cluster.priority,
    }
    for where, name in named.items():
        if name is not None and (not SUBDOMAIN.fullmatch(name) or len(name) > 253):
            why = why_secret("", name)
            yield refuse(
                "REFERENCE-FORM",
                where,
                "no name of an object" if why else repr(name),
                "the name of a Kubernetes object: small letters, digits, hyphens, dots",
                f"set {where} to the name of an object in the namespace, e.g. team-a",
            )


def _labels(cluster: ClusterSpec) -> Found:
    for key, value in cluster.labels.items():
        if not is_label(key, value):
            yield refuse(
                "LABEL-FORM",
                f"labels.{key}",
                repr(value),
                "a label's key and value have at most 63 letters, digits, - _ and .",
                "rename the label, e.g. labels: {team: vision}",
            )
        if key.startswith(RESERVED_LABELS):
            yield refuse(
                "LABEL-RESERVED",
                f"labels.{key}",
                "set by hand",
                f"labels under {', '.join(RESERVED_LABELS)} are set by Graftwork, KubeRay or Kueue",
                f"rename it with a prefix of your own, e.g. example.com/{key.rpartition('/')[2]}",
            )
    for index, group in enumerate(cluster.workers):
        for key, value in {**group.node_selector, group.spot_key: "true"}.items():
            if not is_label(key, value):
                yield refuse(
                    "LABEL-FORM",
                    f"workers[{index}].node_selector.{key}",
                    repr(value),
                    "a label of a node has at most 63 letters, digits, - _ and .",
                    "take the label from `kubectl get nodes --show-labels`",
                )


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
            yield refuse(
                "ENV-NAME",
                f"env.{name}",
                repr(name),
                "a variable's name has letters, digits and underscores, and no digit first",
                f"rename it, e.g. {re.sub('[^A-Za-z0-9_]', '_', name).lstrip('0123456789') or 'NAME'}",
            )


def _tokens(job: Job) -> Found:
    """Variables that a served endpoint reads its keys from."""
    for key in ("token_env", "admin_token_env"):
        name = job.spec.get(key)
        if name and name not in job.cluster.secret_env:
            yield refuse(
                "TOKEN-MISSING",
                key,
                f"{name} is no variable of the pods",
                "an endpoint reads its keys from a Kubernetes Secret",
                f"secret_env: {{{name}: SECRET/KEY}}",
            )


def _queues(cluster: ClusterSpec) -> Found:
    if cluster.gang == "kai" and cluster.gang_queue is None:
        yield refuse(
            "GANG-QUEUE",
            "gang_queue",
            "none with gang: kai",
            "KAI leaves pods without a queue pending",
            "gang_queue: NAME, from `kubectl get queues.scheduling.run.ai`",
        )
    if cluster.gang == "none" and cluster.gang_queue is not None:
        yield refuse(
            "GANG-NONE",
            "gang_queue",
            cluster.gang_queue,
            "gang_queue belongs to a gang scheduler",
            "set gang: volcano, kai or yunikorn; for Kueue set `queue`",
        )
    if cluster.gang_queue is not None and not is_label("queue", cluster.gang_queue):
        yield refuse(
            "REFERENCE-FORM",
            "gang_queue",
            repr(cluster.gang_queue),
            "the queue's name becomes a label's value: letters, digits, - _ and ., at most 63",
            "set gang_queue to the name of a queue of the scheduler, e.g. team-a",
        )


def _store(job: Job) -> Found:
    claim = job.cluster.storage.claim
    local = not job.root.startswith("s3://")
    if re.search(r"\s", job.root):
        yield refuse(
            "STORE-FORM",
            "storage.uri",
            repr(job.root),
            "a store's URI has no spaces, because it is a word of the entrypoint",
            f"rename it, e.g. storage: {{uri: {re.sub('[ ]+', '-', job.root.strip()) or 's3://bucket/team'}}}",
        )
    if local and claim is None:
        yield refuse(
            "STORE-LOCAL",
            "storage.uri",
            job.root or "none",
            "pods reach the store: s3://, or a folder with storage.claim",
            "storage: {uri: s3://bucket/team, secret: s3-credentials}",
        )
    if claim is not None and not local:
        yield refuse(
            "STORE-CLAIM",
            "storage.claim",
            f"with {job.root}",
            "a claim mounts a folder, and a store on S3 needs none",
            "remove storage.claim, or set storage.uri to a folder of the claim, e.g. /mnt/runs",
        )
    if job.cluster.storage.endpoint is not None and not re.match(r"https?://[^\s/]+", job.cluster.storage.endpoint):
        yield refuse(
            "STORE-ENDPOINT",
            "storage.endpoint",
            "no URL",
            "an endpoint is a URL: http(s)://HOST:PORT",
            "storage: {endpoint: http://minio.storage:9000}",
        )


def _survival(cluster: ClusterSpec) -> Found:
    if cluster.gcs.backend == "redis" and cluster.gcs.redis_secret is None:
        yield warn(
            "REDIS-OPEN",
            "gcs.redis_secret",
            "none",
            "anyone who reaches Redis without a password controls the cluster",
            "gcs: {redis_secret: SECRET}",
        )


def _version(cluster: ClusterSpec) -> Found:
    version = version_of(cluster.ray_version)
    if version is not None and version[:2] != RAY:
        yield refuse(
            "RAY-VERSION",
            "ray_version",
            cluster.ray_version,
            f"this Graftwork runs on Ray {RAY[0]}.{RAY[1]}",
            f"an image with Ray {RAY[0]}.{RAY[1]}",
        )
