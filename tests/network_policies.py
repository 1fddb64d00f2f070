"""Evaluation of NetworkPolicies as Kubernetes defines it: may this pod open a connection to that one, or to an address?

A pod that a policy selects may do what one of its policies allows and nothing else; a connection needs the egress of
its source and the ingress of its target (kubernetes.io, "Network Policies").
"""

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Policy = Mapping[str, Any]


@dataclass(frozen=True)
class Pod:
    """A pod in a namespace. The label `kubernetes.io/metadata.name` of its namespace is the namespace's name."""

    namespace: str
    labels: Mapping[str, str] = field(default_factory=dict)
    namespace_labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Address:
    """Anything that is no pod of the cluster."""

    ip: str


def allowed(policies: Sequence[Policy], source: Pod, target: Pod | Address, port: int, protocol: str = "TCP") -> bool:
    """Return whether the connection passes. `policies` are the NetworkPolicy objects of all namespaces."""
    out = _side(policies, source, target, port, protocol, "Egress")
    return out and (isinstance(target, Address) or _side(policies, target, source, port, protocol, "Ingress"))


def _side(policies: Sequence[Policy], pod: Pod, peer: Pod | Address, port: int, protocol: str, way: str) -> bool:
    mine = [
        policy
        for policy in policies
        if policy["metadata"]["namespace"] == pod.namespace
        and _selects(policy["spec"]["podSelector"], pod.labels)
        and way in policy["spec"].get("policyTypes", ["Ingress"])
    ]
    peers = "to" if way == "Egress" else "from"
    rules = [(rule, policy["metadata"]["namespace"]) for policy in mine for rule in policy["spec"].get(way.lower(), [])]
    return not mine or any(
        (not rule.get(peers) or any(_is_peer(one, peer, namespace) for one in rule[peers]))
        and (not rule.get("ports") or any(_is_port(one, port, protocol) for one in rule["ports"]))
        for rule, namespace in rules
    )


def _is_peer(rule: Mapping[str, Any], peer: Pod | Address, namespace: str) -> bool:
    if "ipBlock" in rule:
        if isinstance(peer, Pod):
            return False  # Kubernetes leaves open whether a pod's address counts: a policy must not rely on it
        address, block = ipaddress.ip_address(peer.ip), rule["ipBlock"]
        within = [address in ipaddress.ip_network(cidr) for cidr in (block["cidr"], *block.get("except", []))]
        return within[0] and not any(within[1:])
    if isinstance(peer, Address):
        return False
    labels = {"kubernetes.io/metadata.name": peer.namespace, **peer.namespace_labels}
    there = _selects(rule["namespaceSelector"], labels) if "namespaceSelector" in rule else peer.namespace == namespace
    return there and _selects(rule.get("podSelector", {}), peer.labels)


def _is_port(rule: Mapping[str, Any], port: int, protocol: str) -> bool:
    if rule.get("protocol", "TCP") != protocol:
        return False
    first = rule.get("port")
    assert first is None or isinstance(first, int), f"a named port is not evaluated here: {first}"
    return first is None or first <= port <= rule.get("endPort", first)


def _selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    wanted: Mapping[str, str] = selector.get("matchLabels", {})
    return wanted.items() <= labels.items() and all(
        _meets(one, labels.get(one["key"])) for one in selector.get("matchExpressions", [])
    )


def _meets(expression: Mapping[str, Any], value: str | None) -> bool:
    operator: str = expression["operator"]
    values: Sequence[str] = expression.get("values", [])
    if operator in ("Exists", "DoesNotExist"):
        return (value is not None) == (operator == "Exists")
    assert operator in ("In", "NotIn"), operator
    return (value in values) == (operator == "In")
