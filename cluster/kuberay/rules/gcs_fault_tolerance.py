"""Rules for GCS fault tolerance: Redis or RocksDB, configured by gcsFaultToleranceOptions and nowhere else."""

from collections.abc import Mapping
from typing import Any

from graftwork.cluster.kuberay.object_view import (
    ClusterView,
    Found,
    dig,
    first_container,
    listed,
    mapping,
    refuse,
    warn,
)

OPTIONS = "gcsFaultToleranceOptions"
FT_ANNOTATION, NAMESPACE_ANNOTATION = "ray.io/ft-enabled", "ray.io/external-storage-namespace"
ROCKSDB_VOLUME, ROCKSDB_PATH = "gcs-storage", "/data/gcs"
ROCKSDB_ENV = ("RAY_gcs_storage", "RAY_gcs_storage_path")
REDIS_FIELDS = ("redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace")


def redis_set_once(part: ClusterView) -> Found:
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


def no_user_name_by_the_way(part: ClusterView) -> Found:
    if mapping(part.head.get("rayStartParams")).get("redis-username") or "REDIS_USERNAME" in part.head_env:
        yield refuse(
            "REDIS-USERNAME",
            f"{part.where}.headGroupSpec",
            "a Redis user in parameters or environment",
            "redisUsername sets the user of Redis",
            f"remove it from the head and set {OPTIONS}.redisUsername",
        )


def backend_has_its_own_fields(part: ClusterView) -> Found:
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
    beside = [field for field in ("size", "storageClassName", "accessModes") if storage.get(field)]
    if storage.get("claimName") and beside:
        yield refuse(
            "ROCKSDB-CLAIM",
            f"{where}.storage",
            f"claimName with {', '.join(beside)}",
            "an existing claim already has its size and storage class",
            f"remove {' and '.join(beside)}, or remove claimName",
        )
    yield from _managed(part)


def password_is_a_secrets(part: ClusterView) -> Found:
    if dig(part.spec, OPTIONS, "redisPassword", "value"):
        yield refuse(
            "REDIS-PASSWORD",
            f"{part.where}.{OPTIONS}.redisPassword.value",
            "a value",
            "a password comes from a Secret",
            "gcs: {redis_secret: SECRET}",
        )


def _managed(part: ClusterView) -> Found:
    head: Mapping[str, Any] = first_container(part.head)
    mounts = listed(head.get("volumeMounts"))
    volumes = listed(dig(part.head, "template", "spec", "volumes"))
    taken = [name for name in ROCKSDB_ENV if name in part.head_env]
    taken += [ROCKSDB_PATH for mount in mounts if mount.get("mountPath") == ROCKSDB_PATH]
    taken += [ROCKSDB_VOLUME for volume in [*mounts, *volumes] if volume.get("name") == ROCKSDB_VOLUME]
    if taken:
        yield refuse(
            "ROCKSDB-MANAGED",
            f"{part.where}.headGroupSpec",
            ", ".join(dict.fromkeys(taken)),
            "the operator sets the variables, the mount and the volume of RocksDB itself",
            f"remove {', '.join(dict.fromkeys(taken))} from headGroupSpec",
        )


SURVIVAL_RULES = (redis_set_once, no_user_name_by_the_way, backend_has_its_own_fields, password_is_a_secrets)
