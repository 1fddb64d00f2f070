"""Fields behind the operator's feature gates: refused by a default install, and their own rules where a gate is on."""

from collections.abc import Mapping

from graftwork.cluster.kuberay.findings import Found, dig, listed, mapping, refuse, warn
from graftwork.cluster.kuberay.names import DNS_1035
from graftwork.cluster.kuberay.rules.part import ClusterView, containers, env_of

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
            yield warn("GATE-OFF", f"{part.where}.{field}", "set", f"the operator's gate {gate} is off by default",
                       f"start the operator with --feature-gates={gate}=true, or drop the field")  # fmt: skip


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
            yield refuse("NETWORK-GROUP", f"{where}.workerGroups[{index}]", repr(group.get("groupName")),
                         "no worker group has that name")  # fmt: skip
    for name, side in sides:
        if silent is not None and side.get(silent):
            yield refuse("NETWORK-MODE", f"{where}.{name}.{silent}", f"mode {policy.get('mode')}",
                         "that direction is open in this mode: the rules would say nothing")  # fmt: skip
    for name in sorted(names):
        if not DNS_1035.fullmatch(name.lstrip("0123456789")) or name != name.lower() or len(name) > 63:
            yield refuse("GROUP-NAME", f"{part.where}.workerGroupSpecs", repr(name),
                         "with networkPolicy a group's name becomes part of an object's name")  # fmt: skip


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
        yield refuse("HISTORY-COLLECTOR", f"{part.where}.historyServerOptions.collectorOptions", f"no {what}",
                     "the collector needs both")  # fmt: skip


GATE_RULES = (gates_are_told, network_rules_match_their_mode, tls_is_the_operators, history_says_where_it_lies)
