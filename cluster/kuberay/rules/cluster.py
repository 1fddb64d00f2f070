"""Rules for a RayCluster: autoscaler, head and worker groups, network policies, TLS and the history server.

A default install of the operator refuses network policies, TLS and the history server; where a gate is on, each field
has rules of its own.
"""

import re
from collections.abc import Mapping
from typing import Any

from graftwork.cluster.jobs.models import Findings, refuse, warn
from graftwork.cluster.kuberay.labels import LABEL_VALUE, MAX_LABEL
from graftwork.cluster.kuberay.object_view import (
    ClusterView,
    containers,
    dig,
    env_of,
    listed,
    mapping,
    number,
    version_of,
)
from graftwork.cluster.kuberay.objects import DNS_1035

AUTOSCALER_V2_ENV = "RAY_enable_autoscaler_v2"
START_ENV = "KUBERAY_GEN_AUTOSCALER_START_CMD"
RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")
MANAGERS = ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")
PRIORITY_SINCE = (2, 56)
RESERVED = "ray.io/"
SETTABLE = ("ray.io/accelerator-type", "ray.io/availability-zone", "ray.io/market-type", "ray.io/region")
"""Of Ray's own labels, those that its guide on labels has a group set."""
GATED = {
    "networkPolicy": "RayClusterNetworkPolicy",
    "tlsOptions": "RayClusterMTLS",
    "historyServerOptions": "RayClusterHistoryServer",
}
TLS_ENV = ("RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
ONE_WAY = {"DenyAllEgress": "ingressRules", "DenyAllIngress": "egressRules"}
"""Rules without an effect in that mode."""
_LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")


def is_label(key: str, value: Any) -> bool:
    """Return whether Kubernetes takes the pair as a label."""
    formed = LABEL_VALUE.fullmatch(str(value)) is not None and len(str(value)) <= MAX_LABEL
    return formed and _LABEL_KEY.fullmatch(key) is not None


def check_autoscaler(part: ClusterView) -> Findings:
    """The autoscaler next to the head: one version, set in one place."""
    where, options = f"{part.where}.autoscalerOptions", mapping(part.spec.get("autoscalerOptions"))
    value = part.head_env.get(AUTOSCALER_V2_ENV)
    if not part.autoscales and value in ("1", "true"):
        yield refuse(
            "AUTOSCALER-ENV",
            f"{part.where}.headGroupSpec",
            f"{AUTOSCALER_V2_ENV}={value}",
            "the variable needs enableInTreeAutoscaling",
            "enableInTreeAutoscaling: true",
        )
    if part.autoscales and options.get("version") is not None and AUTOSCALER_V2_ENV in part.head_env:
        yield refuse(
            "AUTOSCALER-TWICE",
            f"{where}.version",
            f"the head has {AUTOSCALER_V2_ENV} too",
            "autoscalerOptions.version sets the version",
            f"remove {AUTOSCALER_V2_ENV} from the head's env",
        )
    idle = number(options.get("idleTimeoutSeconds"))
    if idle is not None and idle < 0:
        yield refuse(
            "AUTOSCALER-IDLE",
            f"{where}.idleTimeoutSeconds",
            f"{idle}",
            "an idle time is 0 s or more",
            "idleTimeoutSeconds: 60",
        )
    if START_ENV in {entry.get("name") for entry in listed(options.get("env"))}:
        yield refuse(
            "AUTOSCALER-START",
            f"{where}.env",
            START_ENV,
            "the operator sets this variable to the autoscaler's command",
            f"remove {START_ENV} from autoscalerOptions.env",
        )


def check_pods(part: ClusterView) -> Findings:
    """Containers, and the restart policy that autoscaler v2 takes."""
    for where, pod in part.pods():
        if not containers(pod):
            yield refuse(
                "NO-CONTAINER",
                where,
                "no container",
                "Ray is started in the first container of a pod",
                "add a container named ray-head or ray-worker with the image of the job",
            )
        if part.autoscales and part.autoscaler_v2 and pod.get("restartPolicy") not in (None, "", "Never"):
            yield refuse(
                "AUTOSCALER-RESTART",
                f"{where}.restartPolicy",
                str(pod["restartPolicy"]),
                "autoscaler v2 replaces pods and restarts none",
                "restartPolicy: Never",
            )


def check_labels(part: ClusterView) -> Findings:
    """Resources and labels of head and groups. Ray gives a group's `labels` to its nodes, and sets `ray.io/` itself."""
    for where, group in part.iter_groups():
        params = mapping(group.get("rayStartParams"))
        twice = [name for name in RESOURCE_PARAMS if params.get(name)]
        if twice and group.get("resources"):
            yield refuse(
                "RESOURCES-TWICE",
                f"{where}.resources",
                f"rayStartParams has {', '.join(twice)} as well",
                "a group's resources are set in one place",
                "remove num-cpus, num-gpus, memory and resources from rayStartParams",
            )
        if "labels" in params:
            yield refuse(
                "LABELS-IN-PARAMS",
                f"{where}.rayStartParams.labels",
                "labels among the start parameters",
                "KubeRay reads a group's labels from its field `labels`",
                "move rayStartParams.labels to the group's `labels`",
            )
        for key, value in mapping(group.get("labels")).items():
            if not is_label(key, value):
                yield refuse(
                    "LABEL-FORM",
                    f"{where}.labels.{key}",
                    repr(value),
                    "a label's key and value have at most 63 letters, digits, - _ and .",
                    "rename the label, e.g. labels: {team: vision}",
                )
            if key.startswith(RESERVED) and key not in SETTABLE:
                yield refuse(
                    "GROUP-LABEL-RESERVED",
                    f"{where}.labels.{key}",
                    f"a label under {RESERVED}",
                    f"Ray sets these itself, except {', '.join(SETTABLE)}",
                    "rename it with a prefix of your own, e.g. example.com/team",
                )


def check_replicas(part: ClusterView) -> Findings:
    """Bounds, replicas and hosts. The last two are not the operator's rules.

    It moves `replicas` into the bounds without a word, and makes `replicas` times `numOfHosts` pods: 0 makes none and
    reports ready.
    """
    for where, group in part.iter_workers():
        count, least, most = (number(group.get(key)) for key in ("replicas", "minReplicas", "maxReplicas"))
        if not part.autoscales and (least is None or most is None):
            yield warn(
                "GROUP-BOUNDS",
                where,
                f"minReplicas={least}, maxReplicas={most}",
                "without the autoscaler both are given",
                "set minReplicas and maxReplicas to the value of `replicas`",
            )
        for key, value in (("minReplicas", least), ("maxReplicas", most)):
            if value is not None and value < 0:
                yield refuse(
                    "GROUP-NEGATIVE", f"{where}.{key}", f"{value}", "a number of replicas is 0 or more", f"{key}: 0"
                )
        if least is not None and most is not None and least > most >= 0:
            yield refuse(
                "GROUP-ORDER",
                where,
                f"minReplicas={least} > maxReplicas={most}",
                "minReplicas is at most maxReplicas",
                f"maxReplicas: {least:g}, or minReplicas: {most:g}",
            )
        if count is not None and least is not None and most is not None and not least <= count <= most:
            yield refuse(
                "GROUP-REPLICAS",
                f"{where}.replicas",
                f"{count} outside {least} to {most}",
                "the operator moves `replicas` into the bounds and starts another number than asked",
                f"replicas: {min(max(count, least), most):g}, or bounds that include {count:g}",
            )
        hosts = number(group.get("numOfHosts"))
        if hosts is not None and hosts < 1:
            yield refuse(
                "GROUP-HOSTS",
                f"{where}.numOfHosts",
                f"{hosts:g}",
                "a replica of a group has 1 host or more: with 0 no machine is started",
                "numOfHosts: 1, or leave it out",
            )


def check_group_scaling(part: ClusterView) -> Findings:
    """Idle time and priority of a group, which are autoscaler v2's."""
    is_v2 = part.autoscaler_v2 or part.head_env.get(AUTOSCALER_V2_ENV) in ("1", "true")
    version = version_of(part.spec.get("rayVersion"))
    for where, group in part.iter_workers():
        idle, priority = number(group.get("idleTimeoutSeconds")), number(group.get("priority"))
        if idle is not None and idle < 0:
            yield refuse(
                "GROUP-NEGATIVE",
                f"{where}.idleTimeoutSeconds",
                f"{idle}",
                "an idle time is 0 s or more",
                "idleTimeoutSeconds: 60",
            )
        elif idle is not None and not is_v2:
            yield refuse(
                "GROUP-IDLE-V2",
                f"{where}.idleTimeoutSeconds",
                "autoscaler v2 is off",
                "a group's own idle timeout is autoscaler v2's",
                "autoscalerOptions.version: v2",
            )
        if priority and (version is None or version < PRIORITY_SINCE):
            yield refuse(
                "GROUP-PRIORITY-VERSION",
                f"{where}.priority",
                f"rayVersion={part.spec.get('rayVersion')}",
                "a group's priority needs Ray 2.56 or newer",
                "set rayVersion and the image to 2.60.0, or remove priority",
            )
        if priority and not is_v2:
            yield refuse(
                "GROUP-PRIORITY-V2",
                f"{where}.priority",
                "autoscaler v2 is off",
                "a group's priority is autoscaler v2's",
                "autoscalerOptions.version: v2",
            )


def check_suspended_groups(part: ClusterView) -> Findings:
    for where, group in part.iter_workers():
        if group.get("suspend") is True and part.autoscales:
            yield refuse(
                "GROUP-SUSPEND",
                f"{where}.suspend",
                "true with the autoscaler on",
                "the autoscaler starts the machines of a suspended group again",
                "remove suspend, or set enableInTreeAutoscaling: false",
            )
        elif group.get("suspend") is True:
            yield refuse(
                "GROUP-SUSPENDED",
                f"{where}.suspend",
                "true",
                "a suspended group has no machines, and the job's workers wait for them",
                "suspend: false, or remove the group",
            )


def check_names(part: ClusterView) -> Findings:
    """Names of groups, and the upgrade of a cluster that another object owns."""
    names = [str(group.get("groupName")) for group in part.groups]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield refuse(
            "GROUP-NAME-TWICE",
            f"{part.where}.workerGroupSpecs",
            f"two groups are called {name!r}",
            "the operator counts pods by group name, so each group has its own",
            f"rename one of them, e.g. groupName: {name}-2",
        )
    kind = dig(part.spec, "upgradeStrategy", "type")
    if kind is not None and part.kind != "RayCluster":
        yield refuse(
            "UPGRADE-CHILD",
            f"{part.where}.upgradeStrategy",
            str(kind),
            f"the {part.kind} decides how its cluster is replaced",
            f"remove upgradeStrategy from the cluster and set spec.upgradeStrategy of the {part.kind}",
        )


def check_manager(part: ClusterView) -> Findings:
    """A CEL rule of the CRD."""
    manager = part.spec.get("managedBy")
    if manager not in (None, *MANAGERS):
        yield refuse(
            "MANAGED-BY",
            f"{part.where}.managedBy",
            repr(manager),
            f"one of {', '.join(MANAGERS)}",
            "remove managedBy, or set managedBy: ray.io/kuberay-operator",
        )


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


CLUSTER_RULES = (
    *(check_autoscaler, check_pods, check_labels, check_replicas),
    *(check_group_scaling, check_suspended_groups, check_names, check_manager),
    *(check_gates, check_network_policy, check_tls, check_history_server),
)
