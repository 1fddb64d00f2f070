"""Pod templates of head and workers: closed, with all that Ray writes to on volumes of their own.

They meet the Pod Security standard `restricted`. Credentials come by reference to Secrets; no value of one is in here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graftwork.cluster.kuberay.object_view import KubeObject
from graftwork.cluster.spec import ClusterSpec, WorkerSpec, quantity

UID = 1000
"""User of the image."""
GRACE_S = 120
"""Time between the notice and the end of a pod, for a checkpoint or for its open requests."""
END_S = 10
"""Of that, after the drain."""
CODE_PATH, SCRATCH_PATH = "/code", "/scratch"
GPU = "nvidia.com/gpu"
WHEEL = "GRAFTWORK_WHEEL"
SHM_PART = 0.5
"""Of the memory; Ray's object store takes 0.3, torch's loaders the rest."""
CLOSED: Mapping[str, Any] = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "runAsUser": UID,
    "runAsGroup": UID,
    "seccompProfile": {"type": "RuntimeDefault"},
}
"""securityContext of each container, the operator's own ones included: it copies this to its init container."""
HEAD_PORTS = (("gcs-server", 6379), ("dashboard", 8265), ("metrics", 8080))
"""Ray Client's 10001 is not among them: nothing of ours uses it."""
SERVE_PORT = ("serve", 8000)


@dataclass(frozen=True)
class PodSettings:
    """Settings that all pods of an object share."""

    cluster: ClusterSpec
    labels: Mapping[str, str]
    root: str
    wheel_uri: str | None
    serves: bool
    grace_s: int = GRACE_S
    """Between a pod's notice and its end."""


def head_template(settings: PodSettings, *, autoscales: bool) -> KubeObject:
    """The head. One that autoscales talks to Kubernetes: it has a token, of an account that the operator makes."""
    head = settings.cluster.head
    ports = (*HEAD_PORTS, SERVE_PORT) if settings.serves else HEAD_PORTS
    container = {
        "name": "ray-head",
        "ports": [{"name": name, "containerPort": number} for name, number in ports],
        "resources": _resources({"cpu": head.cpu, "memory": head.memory}),
    }
    template = _template(settings, container, head.memory)
    template["spec"]["automountServiceAccountToken"] = autoscales
    if autoscales:
        del template["spec"]["serviceAccountName"]
    return template


def worker_template(settings: PodSettings, group: WorkerSpec) -> KubeObject:
    """Template of a worker: on spot nodes if the group has `spot`, with a drain before its end."""
    amounts = {"cpu": group.cpu, "memory": group.memory, **({GPU: str(group.gpu)} if group.gpu else {})}
    ports = (HEAD_PORTS[2], SERVE_PORT) if settings.serves else (HEAD_PORTS[2],)
    drain = ["python", "-m", "graftwork.cluster.kuberay.prestop", str(settings.grace_s - END_S)]
    container = {
        "name": "ray-worker",
        "ports": [{"name": name, "containerPort": number} for name, number in ports],
        "resources": _resources(amounts),
        "lifecycle": {"preStop": {"exec": {"command": drain}}},
    }
    template = _template(settings, container, group.memory)
    selector = {**group.node_selector, **({group.spot_key: "true"} if group.spot else {})}
    tolerated = [*([GPU] if group.gpu else []), *([group.spot_key] if group.spot else [])]
    if selector:
        template["spec"]["nodeSelector"] = selector
    if tolerated:
        template["spec"]["tolerations"] = [{"key": key, "operator": "Exists"} for key in tolerated]
    return template


def _template(settings: PodSettings, container: Mapping[str, Any], memory: str) -> KubeObject:
    cluster = settings.cluster
    shm = f"{int(quantity(memory) * SHM_PART) >> 20}Mi"
    volumes: list[KubeObject] = [
        {"name": "tmp", "emptyDir": {}},
        {"name": "scratch", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": shm}},
    ]
    mounts = [
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "scratch", "mountPath": SCRATCH_PATH},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    if cluster.storage.claim is not None:
        volumes.append({"name": "store", "persistentVolumeClaim": {"claimName": cluster.storage.claim}})
        mounts.append({"name": "store", "mountPath": settings.root.removeprefix("file://")})
    spec: KubeObject = {
        "serviceAccountName": cluster.service_account,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": UID,
            "runAsGroup": UID,
            "fsGroup": UID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "terminationGracePeriodSeconds": settings.grace_s,
        "enableServiceLinks": False,
    }
    if settings.wheel_uri is not None:
        volumes.append({"name": "code", "emptyDir": {}})
        mounts.append({"name": "code", "mountPath": CODE_PATH})
        spec["initContainers"] = [  # fetches this code before Ray starts, without pip
            {
                "name": "code",
                "image": cluster.image or "",
                "securityContext": dict(CLOSED),
                "command": [
                    "python",
                    "-m",
                    "graftwork.cluster.jobs.packaging",
                    "unpack",
                    settings.wheel_uri,
                    CODE_PATH,
                ],
                "volumeMounts": list(mounts),
                "resources": _resources({"cpu": "1", "memory": "1Gi"}),
                **_environment(settings),
            }
        ]
    shared = {"image": cluster.image or "", "securityContext": dict(CLOSED), **_environment(settings), **container}
    spec["containers"] = [{**shared, "volumeMounts": mounts}]
    spec["volumes"] = volumes
    if cluster.image_pull_secret is not None:
        spec["imagePullSecrets"] = [{"name": cluster.image_pull_secret}]
    if cluster.priority is not None and cluster.queue is None:
        spec["priorityClassName"] = cluster.priority
    return {"metadata": {"labels": dict(settings.labels)}, "spec": spec}


def _environment(settings: PodSettings) -> KubeObject:
    cluster, storage = settings.cluster, settings.cluster.storage
    plain = {"HOME": SCRATCH_PATH, "AWS_DEFAULT_REGION": storage.region, **cluster.env}
    if storage.endpoint is not None:
        plain["AWS_ENDPOINT_URL"] = storage.endpoint
    if storage.secret is not None:
        plain["AWS_EC2_METADATA_DISABLED"] = "true"  # else each client queries an absent host for credentials
    if settings.wheel_uri is not None:
        plain |= {WHEEL: settings.wheel_uri, "PYTHONPATH": CODE_PATH}
    env: list[KubeObject] = [{"name": name, "value": value} for name, value in sorted(plain.items())]
    for name, reference in sorted(cluster.secret_env.items()):
        secret, _, key = reference.partition("/")
        env.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
    source = [{"secretRef": {"name": storage.secret}}] if storage.secret is not None else []
    return {"env": env, **({"envFrom": source} if source else {})}


def _resources(amounts: Mapping[str, str]) -> KubeObject:
    """Requests are limits: nothing is taken from a neighbour, and the kubelet evicts these pods last."""
    return {"requests": dict(amounts), "limits": dict(amounts)}
