"""Rules for GCS fault tolerance with Redis or RocksDB, which only `gcsFaultToleranceOptions` configures."""

from collections.abc import Mapping

from graftwork.cluster.jobs.models import Findings, refuse, warn
from graftwork.cluster.kuberay.object_view import ClusterView, dig, first_container, listed, mapping

OPTIONS = "gcsFaultToleranceOptions"
FT_ANNOTATION, NAMESPACE_ANNOTATION = "ray.io/ft-enabled", "ray.io/external-storage-namespace"
ROCKSDB_VOLUME, ROCKSDB_PATH = "gcs-storage", "/data/gcs"
ROCKSDB_ENV = ("RAY_gcs_storage", "RAY_gcs_storage_path")
REDIS_FIELDS = ("redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace")


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


GCS_RULES = (check_redis, check_redis_credentials, check_gcs_backend)
