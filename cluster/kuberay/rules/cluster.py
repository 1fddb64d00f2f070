"""Rules for the autoscaler, and for head and worker groups: containers, labels, resources and replicas."""

import re
from typing import Any

from graftwork.cluster.kuberay.object_view import (
    AUTOSCALER_V2_ENV,
    ClusterView,
    Found,
    containers,
    dig,
    listed,
    mapping,
    number,
    refuse,
    version_of,
    warn,
)
from graftwork.cluster.kuberay.objects import LABEL_VALUE, MAX_LABEL

# Ray's autoscaler next to the head: one version, set in one place.


START_ENV = "KUBERAY_GEN_AUTOSCALER_START_CMD"


def autoscaler_version_set_once(part: ClusterView) -> Found:
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
            "autoscalerOptions.version sets the version",
            f"remove {AUTOSCALER_V2_ENV} from the head's env",
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
                "restartPolicy: Never",
            )


def idle_is_no_less_than_nothing(part: ClusterView) -> Found:
    idle = number(dig(part.spec, "autoscalerOptions", "idleTimeoutSeconds"))
    if idle is not None and idle < 0:
        yield refuse(
            "AUTOSCALER-IDLE",
            f"{part.where}.autoscalerOptions.idleTimeoutSeconds",
            f"{idle}",
            "an idle time is 0 s or more",
            "idleTimeoutSeconds: 60",
        )


def start_command_is_the_operators(part: ClusterView) -> Found:
    if START_ENV in {entry.get("name") for entry in listed(dig(part.spec, "autoscalerOptions", "env"))}:
        yield refuse(
            "AUTOSCALER-START",
            f"{part.where}.autoscalerOptions.env",
            START_ENV,
            "the operator sets this variable to the autoscaler's command",
            f"remove {START_ENV} from autoscalerOptions.env",
        )


AUTOSCALER_RULES = (
    autoscaler_version_set_once,
    v2_restarts_no_pod,
    idle_is_no_less_than_nothing,
    start_command_is_the_operators,
)


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
            yield refuse(
                "NO-CONTAINER",
                where,
                "no container",
                "Ray is started in the first container of a pod",
                "add a container named ray-head or ray-worker with the image of the job",
            )


def resources_set_once(part: ClusterView) -> Found:
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


def labels_have_their_place(part: ClusterView) -> Found:
    for where, group in part.iter_groups():
        if "labels" in mapping(group.get("rayStartParams")):
            yield refuse(
                "LABELS-IN-PARAMS",
                f"{where}.rayStartParams.labels",
                "labels among the start parameters",
                "KubeRay reads a group's labels from its field `labels`",
                "move rayStartParams.labels to the group's `labels`",
            )


def labels_are_labels(part: ClusterView) -> Found:
    for where, group in part.iter_groups():
        for key, value in mapping(group.get("labels")).items():
            if not is_label(key, value):
                yield refuse(
                    "LABEL-FORM",
                    f"{where}.labels.{key}",
                    repr(value),
                    "a label's key and value have at most 63 letters, digits, - _ and .",
                    "rename the label, e.g. labels: {team: vision}",
                )


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
                    "rename it with a prefix of your own, e.g. example.com/team",
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


def replicas_lie_within(part: ClusterView) -> Found:
    """Not the operator's rule: it moves `replicas` into the bounds without a word."""
    for where, group in list(part.iter_groups())[1:]:
        count, least, most = (number(group.get(key)) for key in ("replicas", "minReplicas", "maxReplicas"))
        if count is not None and least is not None and most is not None and not least <= count <= most:
            yield refuse(
                "GROUP-REPLICAS",
                f"{where}.replicas",
                f"{count} outside {least} to {most}",
                "the operator moves `replicas` into the bounds and starts another number than asked",
                f"replicas: {min(max(count, least), most):g}, or bounds that include {count:g}",
            )


def names_differ(part: ClusterView) -> Found:
    names = [str(group.get("groupName")) for group in part.groups]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield refuse(
            "GROUP-NAME-TWICE",
            f"{part.where}.workerGroupSpecs",
            f"two groups are called {name!r}",
            "the operator counts pods by group name, so each group has its own",
            f"rename one of them, e.g. groupName: {name}-2",
        )


def idle_needs_v2(part: ClusterView) -> Found:
    for where, group in list(part.iter_groups())[1:]:
        idle = number(group.get("idleTimeoutSeconds"))
        if idle is not None and idle < 0:
            yield refuse(
                "GROUP-NEGATIVE",
                f"{where}.idleTimeoutSeconds",
                f"{idle}",
                "an idle time is 0 s or more",
                "idleTimeoutSeconds: 60",
            )
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
                "a group's priority needs Ray 2.56 or newer",
                "set rayVersion and the image to 2.60.0, or remove priority",
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
                "suspend: false, or remove the group",
            )


def suspended_groups_do_not_scale(part: ClusterView) -> Found:
    for where, group in list(part.iter_groups())[1:]:
        if part.autoscales and group.get("suspend") is True:
            yield refuse(
                "GROUP-SUSPEND",
                f"{where}.suspend",
                "true with the autoscaler on",
                "the autoscaler starts the machines of a suspended group again",
                "remove suspend, or set enableInTreeAutoscaling: false",
            )


def upgrades_are_their_makers(part: ClusterView) -> Found:
    kind = dig(part.spec, "upgradeStrategy", "type")
    if kind is not None and part.kind != "RayCluster":
        yield refuse(
            "UPGRADE-CHILD",
            f"{part.where}.upgradeStrategy",
            str(kind),
            f"the {part.kind} decides how its cluster is replaced",
            f"remove upgradeStrategy from the cluster and set spec.upgradeStrategy of the {part.kind}",
        )


def managers_are_known(part: ClusterView) -> Found:
    """A CEL rule of the CRD's."""
    manager = part.spec.get("managedBy")
    if manager not in (None, *MANAGERS):
        yield refuse(
            "MANAGED-BY",
            f"{part.where}.managedBy",
            repr(manager),
            f"one of {', '.join(MANAGERS)}",
            "remove managedBy, or set managedBy: ray.io/kuberay-operator",
        )


def _v2(part: ClusterView) -> bool:
    return part.autoscaler_v2 or part.head_env.get(AUTOSCALER_V2_ENV) in ("1", "true")


GROUP_RULES = (
    has_containers,
    resources_set_once,
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
