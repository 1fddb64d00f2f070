"""Head and worker groups: their containers, labels, resources and numbers."""

import re
from typing import Any

from graftwork.cluster.kuberay.findings import Found, dig, mapping, number, refuse, warn
from graftwork.cluster.kuberay.names import LABEL_VALUE, MAX_LABEL
from graftwork.cluster.kuberay.rules.part import AUTOSCALER_V2_ENV, ClusterView, containers, version_of

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
            yield refuse("RESOURCES-TWICE", f"{where}.resources", f"rayStartParams has {', '.join(twice)} as well",
                         "a group's resources are told in one place", "drop one of the two")  # fmt: skip


def labels_have_their_place(part: ClusterView) -> Found:
    for where, group in part.iter_groups():
        if "labels" in mapping(group.get("rayStartParams")):
            yield refuse("LABELS-IN-PARAMS", f"{where}.rayStartParams.labels", "labels among the start parameters",
                         "KubeRay takes them from the group's own `labels`")  # fmt: skip


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
                yield refuse("GROUP-LABEL-RESERVED", f"{where}.labels.{key}", f"a label under {RESERVED}",
                             f"Ray sets these itself, except {', '.join(SETTABLE)}",
                             "a label with a prefix of your own")  # fmt: skip


def is_label(key: str, value: Any) -> bool:
    """Whether Kubernetes takes the pair as a label."""
    formed = LABEL_VALUE.fullmatch(str(value)) is not None and len(str(value)) <= MAX_LABEL
    return formed and _LABEL_KEY.fullmatch(key) is not None


def bounds(part: ClusterView) -> Found:
    for where, group in list(part.iter_groups())[1:]:
        least, most = number(group.get("minReplicas")), number(group.get("maxReplicas"))
        if not part.autoscales and (least is None or most is None):
            yield warn("GROUP-BOUNDS", where, f"minReplicas={least}, maxReplicas={most}",
                         "without the autoscaler both are given", "set both to `replicas`")  # fmt: skip
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
            yield refuse("GROUP-REPLICAS", f"{where}.replicas", f"{count} outside {least} to {most}",
                         "the operator would start another number than was asked for")  # fmt: skip


def names_differ(part: ClusterView) -> Found:
    names = [str(group.get("groupName")) for group in part.groups]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield refuse("GROUP-NAME-TWICE", f"{part.where}.workerGroupSpecs", f"two groups are called {name!r}",
                     "the operator counts pods by group name")  # fmt: skip


def idle_needs_v2(part: ClusterView) -> Found:
    for where, group in list(part.iter_groups())[1:]:
        idle = number(group.get("idleTimeoutSeconds"))
        if idle is not None and idle < 0:
            yield refuse("GROUP-NEGATIVE", f"{where}.idleTimeoutSeconds", f"{idle}", "0 or more")
        elif idle is not None and not _v2(part):
            yield refuse("GROUP-IDLE-V2", f"{where}.idleTimeoutSeconds", "autoscaler v2 is off",
                         "a group's own idle timeout is autoscaler v2's", "autoscalerOptions.version: v2")  # fmt: skip


def priority_needs_v2(part: ClusterView) -> Found:
    for where, group in list(part.iter_groups())[1:]:
        if not number(group.get("priority")):
            continue
        version = version_of(part.spec.get("rayVersion"))
        if version is None or version < PRIORITY_SINCE:
            yield refuse("GROUP-PRIORITY-VERSION", f"{where}.priority", f"rayVersion={part.spec.get('rayVersion')}",
                         "a group's priority came with Ray 2.56")  # fmt: skip
        if not _v2(part):
            yield refuse("GROUP-PRIORITY-V2", f"{where}.priority", "autoscaler v2 is off",
                         "a group's priority is autoscaler v2's", "autoscalerOptions.version: v2")  # fmt: skip


def hosts_are_pods(part: ClusterView) -> Found:
    """Not the operator's rule: it makes `replicas` times `numOfHosts` pods, so 0 makes none and reports ready."""
    for where, group in list(part.iter_groups())[1:]:
        hosts = number(group.get("numOfHosts"))
        if hosts is not None and hosts < 1:
            yield refuse("GROUP-HOSTS", f"{where}.numOfHosts", f"{hosts:g}",
                         "a replica of a group has 1 host or more: with 0 no machine is started",
                         "numOfHosts: 1, or leave it out")  # fmt: skip


def suspended_groups_start_nothing(part: ClusterView) -> Found:
    for where, group in list(part.iter_groups())[1:]:
        if not part.autoscales and group.get("suspend") is True:
            yield refuse("GROUP-SUSPENDED", f"{where}.suspend", "true",
                         "a suspended group has no machines, and the job's workers wait for them",
                         "leave suspend out, or the group")  # fmt: skip


def suspended_groups_do_not_scale(part: ClusterView) -> Found:
    for where, group in list(part.iter_groups())[1:]:
        if part.autoscales and group.get("suspend") is True:
            yield refuse("GROUP-SUSPEND", f"{where}.suspend", "true with the autoscaler on",
                         "the autoscaler would bring its machines back")  # fmt: skip


def upgrades_are_their_makers(part: ClusterView) -> Found:
    kind = dig(part.spec, "upgradeStrategy", "type")
    if kind is not None and part.kind != "RayCluster":
        yield refuse("UPGRADE-CHILD", f"{part.where}.upgradeStrategy", str(kind),
                     f"how a {part.kind}'s cluster is replaced is the {part.kind}'s to say")  # fmt: skip


def managers_are_known(part: ClusterView) -> Found:
    """A CEL rule of the CRD's."""
    manager = part.spec.get("managedBy")
    if manager not in (None, *MANAGERS):
        yield refuse("MANAGED-BY", f"{part.where}.managedBy", repr(manager), f"one of {', '.join(MANAGERS)}")


def _v2(part: ClusterView) -> bool:
    return part.autoscaler_v2 or part.head_env.get(AUTOSCALER_V2_ENV) in ("1", "true")


GROUP_RULES = (
    has_containers, resources_said_once, labels_have_their_place, labels_are_labels, bounds, replicas_lie_within,
    names_differ, idle_needs_v2, priority_needs_v2, suspended_groups_do_not_scale,
    reserved_labels_are_rays, hosts_are_pods, suspended_groups_start_nothing,
    upgrades_are_their_makers, managers_are_known,
)  # fmt: skip
