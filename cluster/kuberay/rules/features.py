"""Rules for optional features of a RayCluster: GCS fault tolerance, network policies, TLS, the history server.

A default install of the operator refuses network policies, TLS and the history server; where a gate is on, each field
has rules of its own. GCS fault tolerance is configured by gcsFaultToleranceOptions and nowhere else.
"""

from collections.abc import Mapping

from graftwork.cluster.jobs.models import Findings, refuse, warn
from graftwork.cluster.kuberay.object_view import ClusterView, containers, dig, env_of, first_container, listed, mapping
from graftwork.cluster.kuberay.objects import DNS_1035

GATED = {
    "networkPolicy": "RayClusterNetworkPolicy",
    "tlsOptions": "RayClusterMTLS",
    "historyServerOptions": "RayClusterHistoryServer",
}
TLS_ENV = ("RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
ONE_WAY = {"DenyAllEgress": "ingressRules", "DenyAllIngress": "egressRules"}
"""Rules without an effect in that mode."""
OPTIONS = "gcsFaultToleranceOptions"
FT_ANNOTATION, NAMESPACE_ANNOTATION = "ray.io/ft-enabled", "ray.io/external-storage-namespace"
ROCKSDB_VOLUME, ROCKSDB_PATH = "gcs-storage", "/data/gcs"
ROCKSDB_ENV = ("RAY_gcs_storage", "RAY_gcs_storage_path")
REDIS_FIELDS = ("redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace")


def check_gates(part: ClusterView) -> Findings:
    for field, gate in GATED.items():
        if part.spec.get(field) is not None:
            yield warn(
                "GATE-OFF",
                f"{part.where}.{field}",
                "set",
                f"the operator's gate {gate} is off by default",
                f"start the operator with --feature-gates={gate}=true, or remove the field",
            )


def check_network_policy(part: ClusterView) -> Findings:
    policy = part.spec.get("networkPolicy")
    if not isinstance(policy, Mapping):
        return
    where, names = f"{part.where}.networkPolicy", {str(group.get("groupName")) for group in part.groups}
    silent = ONE_WAY.get(str(policy.get("mode")))
    sides = [("head", mapping(policy.get("head"))), ("worker", mapping(policy.get("worker")))]
    for index, group in enumerate(listed(policy.get("workerGroups"))):
        sides.append((f"workerGroups[{index}]", group))
        if group.get("groupName") not in names:
            yield refuse(
                "NETWORK-GROUP",
                f"{where}.workerGroups[{index}]",
                repr(group.get("groupName")),
                "network rules name a worker group of the cluster",
                f"set groupName to one of: {', '.join(sorted(names)) or 'none'}",
            )
    for name, side in sides:
        if silent is not None and side.get(silent):
            yield refuse(
                "NETWORK-MODE",
                f"{where}.{name}.{silent}",
                f"mode {policy.get('mode')}",
                "the mode leaves that direction open, so the rules have no effect",
                f"remove {silent}, or set mode: DenyAll",
            )
    for name in sorted(names):
        if not DNS_1035.fullmatch(name.lstrip("0123456789")) or name != name.lower() or len(name) > 63:
            yield refuse(
                "GROUP-NAME",
                f"{part.where}.workerGroupSpecs",
                repr(name),
                "with networkPolicy a group's name becomes part of an object's name (RFC 1035, at most 63)",
                "rename the group with small letters, digits and hyphens, e.g. groupName: gpu-workers",
            )


def check_tls(part: ClusterView) -> Findings:
    if dig(part.spec, "tlsOptions") is None or dig(part.spec, "tlsOptions", "enabled") is False:
        return
    for where, pod in part.pods():
        for container in containers(pod)[:1]:
            for name in TLS_ENV:
                if name in env_of(container):
                    yield refuse(
                        "TLS-MANAGED",
                        f"{where}.containers[0].env",
                        name,
                        "the operator sets this variable from tlsOptions",
                        f"remove {name} from the container's env, or set tlsOptions.enabled: false",
                    )


def check_history_server(part: ClusterView) -> Findings:
    if part.spec.get("historyServerOptions") is None:
        return
    options = mapping(dig(part.spec, "historyServerOptions", "collectorOptions"))
    missing = [] if options.get("image") else ["image"]
    missing += [] if "STORAGE_BACKEND" in env_of(options) else ["env STORAGE_BACKEND"]
    for what in missing:
        yield refuse(
            "HISTORY-COLLECTOR",
            f"{part.where}.historyServerOptions.collectorOptions",
            f"no {what}",
            "the collector needs an image and the variable STORAGE_BACKEND",
            "collectorOptions: {image: IMAGE, env: [{name: STORAGE_BACKEND, value: s3}]}",
        )


def check_redis(part: ClusterView) -> Findings:
    where, options = f"{part.where}.{OPTIONS}", part.spec.get(OPTIONS)
    params, env = mapping(part.head.get("rayStartParams")), part.head_env
    if options is None:
        if "RAY_REDIS_ADDRESS" in env and str(part.annotations.get(FT_ANNOTATION)).lower() != "true":
            yield refuse(
                "REDIS-UNSAID",
                f"{part.where}.headGroupSpec",
                "RAY_REDIS_ADDRESS is set",
                f"{OPTIONS} configures Redis",
                "gcs: {backend: redis, redis_address: HOST:6379}",
            )
        return
    if part.annotations.get(FT_ANNOTATION):
        yield refuse(
            "REDIS-TWICE",
            where,
            f"the annotation {FT_ANNOTATION} is set too",
            f"{OPTIONS} configures Redis, and the annotation does it as well",
            f"remove the annotation {FT_ANNOTATION}",
        )
    if part.annotations.get(NAMESPACE_ANNOTATION):
        yield refuse(
            "REDIS-TWICE",
            where,
            f"the annotation {NAMESPACE_ANNOTATION} is set too",
            "externalStorageNamespace sets the namespace",
            f"remove the annotation {NAMESPACE_ANNOTATION} and set {OPTIONS}.externalStorageNamespace",
        )
    if params.get("redis-password"):
        yield refuse(
            "REDIS-PASSWORD",
            f"{part.where}.headGroupSpec.rayStartParams.redis-password",
            "a password",
            "redisPassword names a Secret with the password",
            "gcs: {redis_secret: SECRET}",
        )
    for name in ("REDIS_PASSWORD", "RAY_REDIS_ADDRESS"):
        if name in env:
            yield refuse(
                "REDIS-TWICE",
                f"{part.where}.headGroupSpec",
                f"the head has {name}",
                f"{OPTIONS} sets the address and password of Redis",
                f"remove {name} from the head's env and set {OPTIONS}.redisAddress and redisPassword",
            )


def check_redis_credentials(part: ClusterView) -> Findings:
    if mapping(part.head.get("rayStartParams")).get("redis-username") or "REDIS_USERNAME" in part.head_env:
        yield refuse(
            "REDIS-USERNAME",
            f"{part.where}.headGroupSpec",
            "a Redis user in parameters or environment",
            "redisUsername sets the user of Redis",
            f"remove it from the head and set {OPTIONS}.redisUsername",
        )
    if dig(part.spec, OPTIONS, "redisPassword", "value"):
        yield refuse(
            "REDIS-PASSWORD",
            f"{part.where}.{OPTIONS}.redisPassword.value",
            "a value",
            "a password comes from a Secret",
            "gcs: {redis_secret: SECRET}",
        )


def check_gcs_backend(part: ClusterView) -> Findings:
    options = part.spec.get(OPTIONS)
    if not isinstance(options, Mapping):
        return
    where = f"{part.where}.{OPTIONS}"
    if options.get("backend") != "rocksdb":
        if options.get("storage") is not None:
            yield refuse(
                "REDIS-STORAGE",
                f"{where}.storage",
                "with backend redis",
                "`storage` configures RocksDB",
                f"remove storage, or set {OPTIONS}.backend: rocksdb",
            )
        return
    yield warn(
        "GATE-ROCKSDB",
        where,
        "backend rocksdb",
        "the operator's gate GCSFaultToleranceEmbeddedStorage is off by default",
        "start the operator with --feature-gates=GCSFaultToleranceEmbeddedStorage=true",
    )
    for field in REDIS_FIELDS:
        if options.get(field):
            yield refuse(
                "ROCKSDB-REDIS",
                f"{where}.{field}",
                "with backend rocksdb",
                "the field configures Redis",
                f"remove {field}, or set {OPTIONS}.backend: redis",
            )
    storage = mapping(options.get("storage"))
    others = [field for field in ("size", "storageClassName", "accessModes") if storage.get(field)]
    if storage.get("claimName") and others:
        yield refuse(
            "ROCKSDB-CLAIM",
            f"{where}.storage",
            f"claimName with {', '.join(others)}",
            "an existing claim already has its size and storage class",
            f"remove {' and '.join(others)}, or remove claimName",
        )
    yield from _managed_findings(part)


def _managed_findings(part: ClusterView) -> Findings:
    mounts = listed(first_container(part.head).get("volumeMounts"))
    volumes = listed(dig(part.head, "template", "spec", "volumes"))
    managed = [name for name in ROCKSDB_ENV if name in part.head_env]
    managed += [ROCKSDB_PATH for mount in mounts if mount.get("mountPath") == ROCKSDB_PATH]
    managed += [ROCKSDB_VOLUME for volume in [*mounts, *volumes] if volume.get("name") == ROCKSDB_VOLUME]
    if managed:
        yield refuse(
            "ROCKSDB-MANAGED",
            f"{part.where}.headGroupSpec",
            ", ".join(dict.fromkeys(managed)),
            "the operator sets the variables, the mount and the volume of RocksDB itself",
            f"remove {', '.join(dict.fromkeys(managed))} from headGroupSpec",
        )


FEATURE_RULES = (
    *(check_redis, check_redis_credentials, check_gcs_backend),
    *(check_gates, check_network_policy, check_tls, check_history_server),
)
