"""Head and worker groups: their containers, labels, resources and numbers."""

import re
from collections.abc import Mapping
from typing import Any

from graftwork.cluster.kuberay.object_view import (
    AUTOSCALER_V2_ENV,
    ClusterView,
    Found,
    containers,
    dig,
    env_of,
    first_container,
    listed,
    mapping,
    number,
    refuse,
    version_of,
    warn,
)
from graftwork.cluster.kuberay.objects import DNS_1035, LABEL_VALUE, MAX_LABEL

# Ray's autoscaler beside the head: one version, told in one place.


START_ENV = "KUBERAY_GEN_AUTOSCALER_START_CMD"


def version_said_once(part: ClusterView) -> Found:
    where, told = f"{part.where}.autoscalerOptions.version", dig(part.spec, "autoscalerOptions", "version")
    value = part.head_env.get(AUTOSCALER_V2_ENV)
    if not part.autoscales and value in ("1", "true"):
        yield refuse(
            "AUTOSCALER-ENV",
            f"{part.where}.headGroupSpec",
            f"{AUTOSCALER_V2_ENV}={value}",
            "the variable needs enableInTreeAutoscaling",
            "enableInTreeAutoscaling: true",
        )
    if part.autoscales and told is not None and AUTOSCALER_V2_ENV in part.head_env:
        yield refuse(
            "AUTOSCALER-TWICE",
            where,
            f"the head has {AUTOSCALER_V2_ENV} too",
            "the version is told in one place",
            f"drop {AUTOSCALER_V2_ENV}",
        )


def v2_restarts_no_pod(part: ClusterView) -> Found:
    if not (part.autoscales and part.autoscaler_v2):
        return
    for where, pod in part.pods():
        if pod.get("restartPolicy") not in (None, "", "Never"):
            yield refuse(
                "AUTOSCALER-RESTART",
                f"{where}.restartPolicy",
                str(pod["restartPolicy"]),
                "autoscaler v2 replaces pods and restarts none",
                "leave it out, or Never",
            )


def idle_is_no_less_than_nothing(part: ClusterView) -> Found:
    idle = number(dig(part.spec, "autoscalerOptions", "idleTimeoutSeconds"))
    if idle is not None and idle < 0:
        yield refuse("AUTOSCALER-IDLE", f"{part.where}.autoscalerOptions.idleTimeoutSeconds", f"{idle}", "0 or more")


def start_command_is_the_operators(part: ClusterView) -> Found:
    if START_ENV in {entry.get("name") for entry in listed(dig(part.spec, "autoscalerOptions", "env"))}:
        yield refuse("AUTOSCALER-START", f"{part.where}.autoscalerOptions.env", START_ENV, "the operator sets it")


AUTOSCALER_RULES = (version_said_once, v2_restarts_no_pod, idle_is_no_less_than_nothing, start_command_is_the_operators)


# Fields behind the operator's feature gates: refused by a default install, and their own rules where a gate is on.


GATED = {
    "networkPolicy": "RayClusterNetworkPolicy",
    "tlsOptions": "RayClusterMTLS",
    "historyServerOptions": "RayClusterHistoryServer",
}
TLS_ENV = ("RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
ONE_WAY = {"DenyAllEgress": "ingressRules", "DenyAllIngress": "egressRules"}
"""Rules that say nothing in that mode."""


def gates_are_told(part: ClusterView) -> Found:
    for field, gate in GATED.items():
        if part.spec.get(field) is not None:
            yield warn(
                "GATE-OFF",
                f"{part.where}.{field}",
                "set",
                f"the operator's gate {gate} is off by default",
                f"start the operator with --feature-gates={gate}=true, or drop the field",
            )


def network_rules_match_their_mode(part: ClusterView) -> Found:
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
                "no worker group has that name",
            )
    for name, side in sides:
        if silent is not None and side.get(silent):
            yield refuse(
                "NETWORK-MODE",
                f"{where}.{name}.{silent}",
                f"mode {policy.get('mode')}",
                "that direction is open in this mode: the rules would say nothing",
            )
    for name in sorted(names):
        if not DNS_1035.fullmatch(name.lstrip("0123456789")) or name != name.lower() or len(name) > 63:
            yield refuse(
                "GROUP-NAME",
                f"{part.where}.workerGroupSpecs",
                repr(name),
                "with networkPolicy a group's name becomes part of an object's name",
            )


def tls_is_the_operators(part: ClusterView) -> Found:
    if dig(part.spec, "tlsOptions") is None or dig(part.spec, "tlsOptions", "enabled") is False:
        return
    for where, pod in part.pods():
        for container in containers(pod)[:1]:
            for name in TLS_ENV:
                if name in env_of(container):
                    yield refuse("TLS-MANAGED", f"{where}.containers[0].env", name, "tlsOptions sets it")


def history_says_where_it_lies(part: ClusterView) -> Found:
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
            "the collector needs both",
        )


GATE_RULES = (gates_are_told, network_rules_match_their_mode, tls_is_the_operators, history_says_where_it_lies)


RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")
MANAGERS = ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")
PRIORITY_SINCE = (2, 56)
RESERVED = "ray.io/"
SETTABLE = ("ray.io/accelerator-type", "ray.io/availability-zone", "ray.io/market-type", "ray.io/region")
"""Of Ray's own labels, those that its guide on labels has a group set."""
_LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")


def has_containers(part: ClusterView) -> Found:
    for where, pod in part.pods():
        if not containers(pod):
            yield refuse("NO-CONTAINER", where, "no container", "Ray is started in the first container of a pod")


def resources_said_once(part: ClusterView) -> Found:
    for where, group in part.iter_groups():
        params = mapping(group.get("rayStartParams"))
        twice = [name for name in RESOURCE_PARAMS if params.get(name)]
        if twice and group.get("resources"):
            yield refuse(
                "RESOURCES-TWICE",
                f"{where}.resources",
                f"rayStartParams has {', '.join(twice)} as well",
                "a group's resources are told in one place",
                "drop one of the two",
            )


def labels_have_their_place(part: ClusterView) -> Found:
    for where, group in part.iter_groups():
        if "labels" in mapping(group.get("rayStartParams")):
            yield refuse(
                "LABELS-IN-PARAMS",
                f"{where}.rayStartParams.labels",
                "labels among the start parameters",
                "KubeRay takes them from the group's own `labels`",
            )


def labels_are_labels(part: ClusterView) -> Found:
    for where, group in part.iter_groups():
        for key, value in mapping(group.get("labels")).items():
            if not is_label(key, value):
                yield refuse("LABEL-FORM", f"{where}.labels.{key}", repr(value), "labels have the form of Kubernetes")


def reserved_labels_are_rays(part: ClusterView) -> Found:
    """Ray gives a group's `labels` to its nodes, and sets those of `ray.io/` itself."""
    for where, group in part.iter_groups():
        for key in mapping(group.get("labels")):
            if key.startswith(RESERVED) and key not in SETTABLE:
                yield refuse(
                    "GROUP-LABEL-RESERVED",
                    f"{where}.labels.{key}",
                    f"a label under {RESERVED}",
                    f"Ray sets these itself, except {', '.join(SETTABLE)}",
                    "a label with a prefix of your own",
                )


def is_label(key: str, value: Any) -> bool:
    """Whether Kubernetes takes the pair as a label."""
    formed = LABEL_VALUE.fullmatch(str(value)) is not None and len(str(value)) <= MAX_LABEL
    return formed and _LABEL_KEY.fullmatch(key) is not None


def bounds(part: ClusterView) -> Found:
    for where, group in list(part.iter_groups())[1:]:
        least, most = number(group.get("minReplicas")), number(group.get("maxReplicas"))
        if not part.autoscales and (least is None or most is None):
            yield warn(
                "GROUP-BOUNDS",
                where,
                f"minReplicas={least}, maxReplicas={most}",
                "without the autoscaler both are given",
                "set both to `replicas`",
            )
        for key, value in (("minReplicas", least), ("maxReplicas", most)):
            if value is not None and value < 0:
                yield refuse("GROUP-NEGATIVE", f"{where}.{key}", f"{value}", "0 or more")
        if least is not None and most is not None and least > most >= 0:
            yield refuse(
                "GROUP-ORDER", where, f"minReplicas={least} > maxReplicas={most}", "minReplicas <= maxReplicas"
            )


def replicas_lie_within(part: ClusterView) -> Found:
    """Not the operator's rule: it moves `replicas` into the bounds without a word."""
    for where, group in list(part.iter_groups())[1:]:
        count, least, most = (number(group.get(key)) for key in ("replicas", "minReplicas", "maxReplicas"))
        if count is not None and least is not None and most is not None and not least <= count <= most:
            yield refuse(
                "GROUP-REPLICAS",
                f"{where}.replicas",
                f"{count} outside {least} to {most}",
                "the operator would start another number than was asked for",
            )


def names_differ(part: ClusterView) -> Found:
    names = [str(group.get("groupName")) for group in part.groups]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield refuse(
            "GROUP-NAME-TWICE",
            f"{part.where}.workerGroupSpecs",
            f"two groups are called {name!r}",
            "the operator counts pods by group name",
        )


def idle_needs_v2(part: ClusterView) -> Found:
    for where, group in list(part.iter_groups())[1:]:
        idle = number(group.get("idleTimeoutSeconds"))
        if idle is not None and idle < 0:
            yield refuse("GROUP-NEGATIVE", f"{where}.idleTimeoutSeconds", f"{idle}", "0 or more")
        elif idle is not None and not _v2(part):
            yield refuse(
                "GROUP-IDLE-V2",
                f"{where}.idleTimeoutSeconds",
                "autoscaler v2 is off",
                "a group's own idle timeout is autoscaler v2's",
                "autoscalerOptions.version: v2",
            )


def priority_needs_v2(part: ClusterView) -> Found:
    for where, group in list(part.iter_groups())[1:]:
        if not number(group.get("priority")):
            continue
        version = version_of(part.spec.get("rayVersion"))
        if version is None or version < PRIORITY_SINCE:
            yield refuse(
                "GROUP-PRIORITY-VERSION",
                f"{where}.priority",
                f"rayVersion={part.spec.get('rayVersion')}",
                "a group's priority came with Ray 2.56",
            )
        if not _v2(part):
            yield refuse(
                "GROUP-PRIORITY-V2",
                f"{where}.priority",
                "autoscaler v2 is off",
                "a group's priority is autoscaler v2's",
                "autoscalerOptions.version: v2",
            )


def hosts_are_pods(part: ClusterView) -> Found:
    """Not the operator's rule: it makes `replicas` times `numOfHosts` pods, so 0 makes none and reports ready."""
    for where, group in list(part.iter_groups())[1:]:
        hosts = number(group.get("numOfHosts"))
        if hosts is not None and hosts < 1:
            yield refuse(
                "GROUP-HOSTS",
                f"{where}.numOfHosts",
                f"{hosts:g}",
                "a replica of a group has 1 host or more: with 0 no machine is started",
                "numOfHosts: 1, or leave it out",
            )


def suspended_groups_start_nothing(part: ClusterView) -> Found:
    for where, group in list(part.iter_groups())[1:]:
        if not part.autoscales and group.get("suspend") is True:
            yield refuse(
                "GROUP-SUSPENDED",
                f"{where}.suspend",
                "true",
                "a suspended group has no machines, and the job's workers wait for them",
                "leave suspend out, or the group",
            )


def suspended_groups_do_not_scale(part: ClusterView) -> Found:
    for where, group in list(part.iter_groups())[1:]:
        if part.autoscales and group.get("suspend") is True:
            yield refuse(
                "GROUP-SUSPEND",
                f"{where}.suspend",
                "true with the autoscaler on",
                "the autoscaler would bring its machines back",
            )


def upgrades_are_their_makers(part: ClusterView) -> Found:
    kind = dig(part.spec, "upgradeStrategy", "type")
    if kind is not None and part.kind != "RayCluster":
        yield refuse(
            "UPGRADE-CHILD",
            f"{part.where}.upgradeStrategy",
            str(kind),
            f"how a {part.kind}'s cluster is replaced is the {part.kind}'s to say",
        )


def managers_are_known(part: ClusterView) -> Found:
    """A CEL rule of the CRD's."""
    manager = part.spec.get("managedBy")
    if manager not in (None, *MANAGERS):
        yield refuse("MANAGED-BY", f"{part.where}.managedBy", repr(manager), f"one of {', '.join(MANAGERS)}")


def _v2(part: ClusterView) -> bool:
    return part.autoscaler_v2 or part.head_env.get(AUTOSCALER_V2_ENV) in ("1", "true")


GROUP_RULES = (
    has_containers,
    resources_said_once,
    labels_have_their_place,
    labels_are_labels,
    bounds,
    replicas_lie_within,
    names_differ,
    idle_needs_v2,
    priority_needs_v2,
    suspended_groups_do_not_scale,
    reserved_labels_are_rays,
    hosts_are_pods,
    suspended_groups_start_nothing,
    upgrades_are_their_makers,
    managers_are_known,
)


# The head's state outside of the head: Redis or RocksDB, told by gcsFaultToleranceOptions and nowhere else.


OPTIONS = "gcsFaultToleranceOptions"
FT_ANNOTATION, NAMESPACE_ANNOTATION = "ray.io/ft-enabled", "ray.io/external-storage-namespace"
ROCKSDB_VOLUME, ROCKSDB_PATH = "gcs-storage", "/data/gcs"
ROCKSDB_ENV = ("RAY_gcs_storage", "RAY_gcs_storage_path")
REDIS_FIELDS = ("redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace")


def said_in_one_place(part: ClusterView) -> Found:
    where, options = f"{part.where}.{OPTIONS}", part.spec.get(OPTIONS)
    params, env = mapping(part.head.get("rayStartParams")), part.head_env
    if options is None:
        if "RAY_REDIS_ADDRESS" in env and str(part.annotations.get(FT_ANNOTATION)).lower() != "true":
            yield refuse(
                "REDIS-UNSAID",
                f"{part.where}.headGroupSpec",
                "RAY_REDIS_ADDRESS is set",
                f"a head with a Redis is told by {OPTIONS}",
                "gcs: {backend: redis, redis_address: ...}",
            )
        return
    if part.annotations.get(FT_ANNOTATION):
        yield refuse("REDIS-TWICE", where, f"the annotation {FT_ANNOTATION} is set too", "one of the two")
    if part.annotations.get(NAMESPACE_ANNOTATION):
        yield refuse(
            "REDIS-TWICE",
            where,
            f"the annotation {NAMESPACE_ANNOTATION} is set too",
            "externalStorageNamespace says it",
        )
    if params.get("redis-password"):
        yield refuse(
            "REDIS-PASSWORD",
            f"{part.where}.headGroupSpec.rayStartParams.redis-password",
            "a password",
            "redisPassword says it, by a Secret",
            "gcs.redis_secret",
        )
    for name in ("REDIS_PASSWORD", "RAY_REDIS_ADDRESS"):
        if name in env:
            yield refuse("REDIS-TWICE", f"{part.where}.headGroupSpec", f"the head has {name}", f"{OPTIONS} says it")


def no_user_name_by_the_way(part: ClusterView) -> Found:
    if mapping(part.head.get("rayStartParams")).get("redis-username") or "REDIS_USERNAME" in part.head_env:
        yield refuse(
            "REDIS-USERNAME",
            f"{part.where}.headGroupSpec",
            "a Redis user in parameters or environment",
            "redisUsername says it",
        )


def backend_has_its_own_fields(part: ClusterView) -> Found:
    options = part.spec.get(OPTIONS)
    if not isinstance(options, Mapping):
        return
    where = f"{part.where}.{OPTIONS}"
    if options.get("backend") != "rocksdb":
        if options.get("storage") is not None:
            yield refuse("REDIS-STORAGE", f"{where}.storage", "with backend redis", "storage is RocksDB's")
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
            yield refuse("ROCKSDB-REDIS", f"{where}.{field}", "with backend rocksdb", "the field is Redis's")
    storage = mapping(options.get("storage"))
    beside = [field for field in ("size", "storageClassName", "accessModes") if storage.get(field)]
    if storage.get("claimName") and beside:
        yield refuse(
            "ROCKSDB-CLAIM",
            f"{where}.storage",
            f"claimName with {', '.join(beside)}",
            "a claim that is there has its size and class already",
        )
    yield from _managed(part)


def password_is_a_secrets(part: ClusterView) -> Found:
    if dig(part.spec, OPTIONS, "redisPassword", "value"):
        yield refuse(
            "REDIS-PASSWORD",
            f"{part.where}.{OPTIONS}.redisPassword.value",
            "a value",
            "a password comes from a Secret",
            "gcs.redis_secret",
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
            "the operator sets these itself",
        )


SURVIVAL_RULES = (said_in_one_place, no_user_name_by_the_way, backend_has_its_own_fields, password_is_a_secrets)
