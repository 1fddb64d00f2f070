"""Preflight of a job for Kubernetes from its own and its cluster's spec: room, limits, names, references, store."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from graftwork.cluster.jobs.backend import predicted_usd, unpriced, usd_per_hour
from graftwork.cluster.jobs.checks import (
    gpu_memory_findings,
    gpu_share_findings,
    nvme_findings,
    secret_findings,
    why_secret,
    why_secret_text,
)
from graftwork.cluster.jobs.inputs import path_findings
from graftwork.cluster.jobs.models import Attempt, Demand, Finding, Findings, Job, TargetMachines, refuse, warn
from graftwork.cluster.kuberay.object_view import KubeView, dig, version_of
from graftwork.cluster.kuberay.objects import build_rayjob
from graftwork.cluster.kuberay.pods import SCRATCH_PATH
from graftwork.cluster.kuberay.rules import check_rules
from graftwork.cluster.kuberay.rules.cluster import is_label
from graftwork.cluster.kuberay.schema import check_schema
from graftwork.cluster.spec import LABEL_PATTERN, ClusterSpec, WorkerSpec, quantity
from graftwork.planning.hardware import GIB, gpu_called
from graftwork.planning.memory import HEADROOM

OWN_PROGRAMS = frozenset({"exec", "experiment", "rag", "cluster"})
"""Kinds without a plan: a user's own program may use GPUs that no key of its spec names."""


RAY = (2, 60)
"""Of this package (pyproject.toml)."""
SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SECRET_KEY = re.compile(r"[-._a-zA-Z0-9]{1,253}")
RESERVED_LABELS = ("graftwork.dev/", "app.kubernetes.io/", "ray.io/", "kueue.x-k8s.io/")
ANY_WHEEL = "wheels/graftwork-0+000000000000-py3-none-any.whl"
"""Stands for the wheel, which is built and written after preflight."""


def preflight(
    attempt: Attempt,
    namespace: str,
    crd: KubeView | None = None,
    objects: Sequence[KubeView] | None = None,
) -> list[Finding]:
    """Findings on an attempt, errors first; each code and fact once. Pure: nothing is reached or written.

    `objects` are what would be made, where it is not a RayJob alone; `crd` is the live definition of their kind.
    """
    job = attempt.job
    if objects is None:
        wheel = f"{job.root}/{ANY_WHEEL}" if job.cluster.code == "wheel" else None
        objects = [build_rayjob(attempt, namespace, wheel)]
    found = [*_spec_findings(job, namespace), *_fit_findings(job)]
    for made in objects:
        is_kind = crd is not None and dig(crd, "spec", "names", "kind") == made.get("kind")
        found += [*check_rules(made), *check_schema(made, crd if is_kind else None)]
    return once(found)


def once(found: Iterable[Finding]) -> list[Finding]:
    """Errors first; a finding that two pods have in common once; values that look like secrets hidden in all texts."""
    first: dict[tuple[str, str], Finding] = {}
    for finding in found:
        texts = (finding.where, finding.problem, finding.rule, finding.hint)
        where, problem, rule, hint = ("(hidden)" if why_secret_text(text) else text for text in texts)
        shown = replace(finding, where=where, problem=problem, rule=rule, hint=hint)
        first.setdefault((shown.code, shown.problem), shown)
    return sorted(first.values(), key=lambda finding: finding.level)


def machines_of(cluster: ClusterSpec) -> TargetMachines:
    """The worker groups at their largest."""
    groups = [(group, group.max_count or group.count) for group in cluster.workers]
    with_gpus = [(group, count) for group, count in groups if group.gpu and count]
    names = ", ".join(group.name for group, _ in with_gpus)
    return TargetMachines(
        owner=f"cluster group {names}" if names else "the cluster's file",
        cpus=sum(count * quantity(group.cpu) for group, count in groups),
        memory_bytes=int(sum(count * quantity(group.memory) for group, count in groups)),
        gpus=float(sum(count * group.gpu for group, count in with_gpus)),
        gpu_types=tuple(dict.fromkeys(group.gpu_type or "" for group, _ in with_gpus)),
    )


def workers_in(group: WorkerSpec, demand: Demand, count: int) -> int:
    """How many workers of the demand `count` machines of a group hold, each on one machine."""
    rooms = [math.ceil(quantity(group.cpu)) / demand.cpus_per_worker] if demand.cpus_per_worker else []
    rooms += [group.gpu / demand.gpus_per_worker] if demand.gpus_per_worker else []
    if demand.memory_bytes_per_worker:
        rooms.append(HEADROOM * quantity(group.memory) / demand.memory_bytes_per_worker)
    return int(min(rooms, default=demand.num_workers) + 1e-9) * count


def _fit_findings(job: Job) -> Findings:
    """All findings on demand against machines, and on the limits."""
    for demand in job.demands:
        yield from _machine_findings(job, demand)
    yield from _group_findings(job)
    yield from gpu_share_findings(job)
    claim = job.root.removeprefix("file://") if job.cluster.storage.claim is not None else None
    yield from nvme_findings(job, (SCRATCH_PATH, "/tmp", *([claim] if claim else [])))  # a pod's root is read-only
    yield from _unused_gpu_findings(job)
    yield from _limit_findings(job)


def _machine_findings(job: Job, demand: Demand) -> Findings:
    cluster, serves = job.cluster, job.kind == "serve"
    counts = [(group.max_count or group.count) if serves else group.count for group in cluster.workers]
    room = sum(workers_in(group, demand, count) for group, count in zip(cluster.workers, counts, strict=True))
    if demand.gpus_per_worker and not any(group.gpu for group in cluster.workers):
        yield refuse(
            "FIT-NO-GPU",
            "workers",
            "no group has a GPU",
            f"a worker takes {demand.gpus_per_worker:g}",
            "workers: [{name: gpu, gpu: 1, ...}]",
        )
    elif not any(workers_in(group, demand, 1) for group in cluster.workers):
        yield refuse(
            "FIT-WORKER",
            "workers",
            f"no machine holds a worker: {_describe_machines(cluster)}",
            f"a worker takes {_describe_worker(demand)}, on one machine",
            "larger machines, or smaller workers",
        )
    elif room < demand.num_workers:
        yield refuse(
            "FIT-WORKERS",
            "workers",
            f"room for {room} workers: {_describe_machines(cluster)}",
            f"{demand.num_workers} workers run at the same time, {_describe_worker(demand)} each",
            f"more machines, or num_workers={room}" if room else "set `count`",
        )


def _group_findings(job: Job) -> Findings:
    """Findings on worker groups: machines that are not started, and types of GPUs."""
    for index, group in enumerate(job.cluster.workers):
        where, known = f"workers[{index}].gpu_type", gpu_called(group.gpu_type or "")
        if group.max_count is not None and group.max_count > group.count and job.kind != "serve":
            yield warn(
                "FIT-FIXED",
                f"workers[{index}].max_count",
                f"{group.max_count} over count={group.count}",
                "training and sweeps take fixed gangs: `count` machines are started",
                f"count: {group.max_count}, or drop max_count",
            )
        if group.gpu_type is not None and not group.gpu:
            yield refuse("GPU-NONE", where, f"{group.gpu_type} with gpu: 0", "a type needs a number", "gpu: 1")
            continue
        if group.gpu_type is not None and not group.node_selector:
            yield warn(
                "GPU-ANY",
                where,
                f"{group.gpu_type}, and no node_selector",
                "Kubernetes may take any node with GPUs",
                "node_selector: the label of such nodes",
            )
        if group.gpu and (group.gpu_type is not None or job.demand.gpus_per_worker):
            name = group.gpu_type or ""
            yield from gpu_memory_findings(job, where, name, None if known is None else known.memory_bytes)


def _unused_gpu_findings(job: Job) -> Findings:
    """GPUs that the job's machines have and its workers do not use."""
    reserved = sum(group.gpu * group.count for group in job.cluster.workers)
    used = job.demand.num_workers * job.demand.gpus_per_worker
    if not reserved or job.kind in OWN_PROGRAMS or (job.kind != "train" and used):
        return  # sweeps and endpoints grow into what is there
    if used < reserved:
        yield warn(
            "GPU-UNUSED",
            "workers",
            f"the job reserves {reserved} GPUs, and its workers use {used:g}",
            "a GPU costs its price as long as the job holds it, used or not",
            "set gpus_per_worker (num_gpus of an endpoint) to auto, raise num_workers, or reserve fewer GPUs",
        )


def _limit_findings(job: Job) -> Findings:
    limits, seconds = job.cluster.limits, job.demand.seconds
    if limits.budget_usd is not None:
        yield from _budget_findings(job, limits.budget_usd)
    elif job.cluster.prices is not None:
        for index in unpriced(job.cluster):
            kind = job.cluster.workers[index].gpu_type
            yield warn(
                "GPU-NO-PRICE",
                f"workers[{index}].gpu_type",
                f"{kind or 'a GPU without a type'} has no price",
                "the job's price is not known without it",
                f"add prices.gpu_hour.{kind or 'default'}: PRICE_PER_HOUR",
            )
    if limits.deadline is not None and seconds is not None and seconds > limits.deadline:
        yield warn(
            "FIT-DEADLINE",
            "limits.deadline",
            f"{limits.deadline:.0f} s, predicted {seconds:.0f} s",
            "at the deadline it stops with a checkpoint",
            "a longer deadline, or resubmit afterwards",
        )


def _budget_findings(job: Job, budget: float) -> Findings:
    prices, predicted = job.cluster.prices, predicted_usd(job)
    if prices is None or usd_per_hour(job.cluster) == 0:
        yield refuse(
            "BUDGET-NO-PRICES",
            "limits.budget_usd",
            f"{budget:g} without prices",
            "a budget is computed from `prices`",
            "prices: {cpu_hour: 0.04, gpu_hour: {H100: 4.5}}",
        )
        return
    for index in unpriced(job.cluster):
        group = job.cluster.workers[index]
        yield refuse(
            "BUDGET-NO-PRICE",
            f"workers[{index}].gpu_type",
            f"{group.gpu_type} has no price",
            "a budget needs each GPU's price",
            f"add prices.gpu_hour.{group.gpu_type or 'default'}: PRICE_PER_HOUR",
        )
    if predicted is not None and predicted > budget:
        yield warn(
            "FIT-BUDGET",
            "limits.budget_usd",
            f"{budget:.2f}, predicted {predicted:.2f}",
            "at the budget it stops with a checkpoint",
            "a larger budget, or resubmit afterwards",
        )


def _describe_worker(demand: Demand) -> str:
    parts = [f"{demand.cpus_per_worker:g} CPU"]
    parts += [f"{demand.gpus_per_worker:g} GPU"] if demand.gpus_per_worker else []
    parts += [f"{demand.memory_bytes_per_worker / GIB:.1f} GiB"] if demand.memory_bytes_per_worker else []
    return ", ".join(parts)


def _describe_machines(cluster: ClusterSpec) -> str:
    return "; ".join(
        f"{group.count} x {group.name} (cpu {group.cpu}, memory {group.memory}, gpu {group.gpu})"
        for group in cluster.workers
    )


def _spec_findings(job: Job, namespace: str) -> Findings:
    """All findings on the cluster's spec and on the job's own."""
    cluster, version = job.cluster, version_of(job.cluster.ray_version)
    if not re.fullmatch(LABEL_PATTERN, namespace) or len(namespace) > 63:
        yield refuse(
            "NAMESPACE-FORM",
            "--target",
            repr(namespace),
            "a namespace has small letters, digits and hyphens, at most 63",
            "set --target k8s:CONTEXT/NAMESPACE, e.g. k8s:prod/graftwork",
        )
    if cluster.gcs.backend == "redis" and cluster.gcs.redis_secret is None:
        yield warn(
            "REDIS-OPEN",
            "gcs.redis_secret",
            "none",
            "anyone who reaches Redis without a password controls the cluster",
            "gcs: {redis_secret: SECRET}",
        )
    if version is not None and version[:2] != RAY:
        yield refuse(
            "RAY-VERSION",
            "ray_version",
            cluster.ray_version,
            f"this Graftwork runs on Ray {RAY[0]}.{RAY[1]}",
            f"an image with Ray {RAY[0]}.{RAY[1]}",
        )
    for check in (_reference_findings, _label_findings, _secret_env_findings, _queue_findings):
        yield from check(cluster)
    yield from _store_findings(job)
    yield from _token_findings(job)
    yield from path_findings(job.spec, shared=False)
    yield from secret_findings(job)


def _reference_findings(cluster: ClusterSpec) -> Findings:
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


def _label_findings(cluster: ClusterSpec) -> Findings:
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


def _secret_env_findings(cluster: ClusterSpec) -> Findings:
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


def _token_findings(job: Job) -> Findings:
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


def _queue_findings(cluster: ClusterSpec) -> Findings:
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


def _store_findings(job: Job) -> Findings:
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
