"""What a Kubernetes cluster's refusals mean, for people: each says what, where and what to do next. Exit code 3."""

import re
from collections.abc import Sequence

from graftwork.errors import ClusterError

FORBIDDEN = re.compile(
    r'cannot (?P<verb>\w+) resource "(?P<resource>[^"]+)" in API group "(?P<group>[^"]*)"(?P<where>.*)', re.DOTALL
)
"""How the API server words what RBAC does not allow (k8s.io/apiserver, responsewriters/errors.go)."""


def rule_yaml(verb: str, resource: str, group: str) -> str:
    """The RBAC rule that allows it, to be put under `rules:` of a Role."""
    return f'{{apiGroups: ["{group}"], resources: [{resource}], verbs: [{verb}]}}'


def missing_rule(message: str) -> str | None:
    """The RBAC rule that a refusal asks for; None where it is no refusal by RBAC."""
    found = FORBIDDEN.search(message)
    return rule_yaml(found["verb"], found["resource"], found["group"]) if found else None


def no_extra(on: str) -> ClusterError:
    """The client's package is not installed."""
    return ClusterError(f"--target {on}", "the package `kubernetes` is not installed here", "it is the extra `k8s`",
                        "pip install 'kubernetes>=35,<37' 'kubernetes-validate>=1.34'")  # fmt: skip


def no_kubeconfig(on: str, why: str) -> ClusterError:
    """No kubeconfig, or one that cannot be read."""
    return ClusterError(
        f"--target {on}", f"there is no usable kubeconfig ({why.strip()})",
        "clusters are found in $KUBECONFIG, else in ~/.kube/config", "set KUBECONFIG to the cluster's file",
    )  # fmt: skip


def no_context(on: str, context: str, names: Sequence[str]) -> ClusterError:
    """The kubeconfig has no such context."""
    return ClusterError(
        f"--target {on}", f"the kubeconfig has no context {context!r}; it has {', '.join(sorted(names)) or 'none'}",
        "k8s:CONTEXT/NAMESPACE", "take one of these, or set KUBECONFIG to another file",
    )  # fmt: skip


def unreachable(on: str, server: str, why: str) -> ClusterError:
    """Nobody answers."""
    return ClusterError(
        f"--target {on}", f"the API server at {server} does not answer ({_short(why)})",
        "the context's server must be reachable from here", "check the network, the VPN, and `kubectl version`",
    )  # fmt: skip


def untrusted(on: str, server: str, why: str) -> ClusterError:
    """TLS failed: an expired or foreign certificate."""
    expired = "expired" in why
    return ClusterError(
        f"--target {on}", f"no trusted connection to {server} ({_short(why)})",
        "the server's certificate is valid now and signed by the context's certificate-authority",
        "the server's certificate has expired, or this machine's clock is wrong: renew it, or run `date`" if expired
        else "fetch the kubeconfig anew from the cluster's provider",
    )  # fmt: skip


def unwelcome(on: str, message: str) -> ClusterError:
    """401: it does not know who we are."""
    return ClusterError(
        f"--target {on}", f"the API server does not take the context's credentials (401 {_short(message)})",
        "a certificate or token expires; a machine whose clock is off is refused too",
        "log in to the cluster again, or fetch its kubeconfig anew; then `kubectl auth whoami`",
    )  # fmt: skip


def forbidden(on: str, message: str) -> ClusterError:
    """403 by RBAC, by a quota or by an admission rule."""
    rule = missing_rule(message)
    if rule is None:
        return ClusterError(f"--target {on}", f"the API server refuses it (403 {_short(message)})", "",
                            "ask who runs the cluster; `graftwork doctor` shows quotas and queues")  # fmt: skip
    return ClusterError(
        f"--target {on}", f"RBAC does not allow it ({_short(message)})", "the user of the context needs the rule",
        f"add to its Role: {rule}; k8s/base/rbac.yaml has all that are needed",
    )  # fmt: skip


def unserved(on: str, asked: str) -> ClusterError:
    """404 for a kind: its CRD is absent."""
    return ClusterError(
        f"--target {on}", f"{asked}: the cluster does not know this kind", "KubeRay v1.7 or newer is installed there",
        "helm install kuberay-operator kuberay/kuberay-operator --version 1.7.0, with our k8s/kuberay-values.yaml",
    )  # fmt: skip


def busy(on: str, code: int, message: str, seconds: float) -> ClusterError:
    """429 or 5xx for longer than we tried."""
    return ClusterError(
        f"--target {on}", f"the API server answers {code} for {seconds:.0f} s ({_short(message)})",
        "calls are tried again while it is overloaded or failing", "try again in a while; look at the API server",
    )  # fmt: skip


def other_error(on: str, asked: str, code: int, message: str) -> ClusterError:
    """Any other refusal."""
    return ClusterError(f"--target {on}", f"{asked}: the API server says {code} ({_short(message)})", "",
                        "graftwork doctor --target ... looks further")  # fmt: skip


def _short(text: str) -> str:
    return " ".join(text.split())[-400:]
