"""Rules for fields that the operator's feature gates guard: network policies, TLS, the history server.

A default install of the operator refuses these fields; where a gate is on, each field has rules of its own.
"""

from collections.abc import Mapping

from graftwork.cluster.kuberay.object_view import (
    ClusterView,
    Found,
    containers,
    dig,
    env_of,
    listed,
    mapping,
    refuse,
    warn,
)
from graftwork.cluster.kuberay.objects import DNS_1035

GATED = {
    "networkPolicy": "RayClusterNetworkPolicy",
    "tlsOptions": "RayClusterMTLS",
    "historyServerOptions": "RayClusterHistoryServer",
}
TLS_ENV = ("RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
ONE_WAY = {"DenyAllEgress": "ingressRules", "DenyAllIngress": "egressRules"}
"""Rules that say nothing in that mode."""


def gates_are_off_by_default(part: ClusterView) -> Found:
    for field, gate in GATED.items():
        if part.spec.get(field) is not None:
            yield warn(
                "GATE-OFF",
                f"{part.where}.{field}",
                "set",
                f"the operator's gate {gate} is off by default",
                f"start the operator with --feature-gates={gate}=true, or remove the field",
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


def tls_is_set_by_operator(part: ClusterView) -> Found:
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


def history_server_has_storage(part: ClusterView) -> Found:
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


GATE_RULES = (
    gates_are_off_by_default,
    network_rules_match_their_mode,
    tls_is_set_by_operator,
    history_server_has_storage,
)
