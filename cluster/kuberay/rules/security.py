"""Who may speak to a Ray, and what its pods may do on their machines."""

from collections.abc import Mapping
from typing import Any

from graftwork.cluster.kuberay.findings import Found, dig, mapping, refuse, warn
from graftwork.cluster.kuberay.rules.part import ClusterView, containers, version_of

TOKEN_SINCE, K8S_TOKEN_SINCE = (2, 52), (2, 55)


def a_token_opens_it(part: ClusterView) -> Found:
    """An open dashboard runs anybody's code (CVE-2023-48022); Ray's own default is open until 2.61."""
    mode = dig(part.spec, "authOptions", "mode")
    if mode != "token":
        yield refuse("AUTH-OPEN", f"{part.where}.authOptions.mode", f"{mode}",
                     "whoever reaches the head runs code as it", "auth: {mode: token}")  # fmt: skip


def the_version_knows_tokens(part: ClusterView) -> Found:
    if dig(part.spec, "authOptions", "mode") != "token":
        return
    told, where = part.spec.get("rayVersion"), f"{part.where}.rayVersion"
    version = version_of(told)
    if version is None:
        yield refuse(
            "AUTH-VERSION", where, repr(told), "token mode needs the version of the image's Ray: 2.52 or newer"
        )
    elif version < TOKEN_SINCE:
        yield refuse("AUTH-VERSION", where, str(told), "token mode came with Ray 2.52", "a newer image")


def kubernetes_tokens(part: ClusterView) -> Found:
    options, where = mapping(part.spec.get("authOptions")), f"{part.where}.authOptions.enableK8sTokenAuth"
    if options.get("enableK8sTokenAuth") is not True:
        return
    if part.kind in ("RayJob", "RayService"):
        yield refuse("AUTH-K8S-KIND", where, f"true in a {part.kind}", "KubeRay takes it for a RayCluster alone")
    if options.get("mode") != "token":
        yield refuse("AUTH-K8S-MODE", where, f"mode {options.get('mode')}", "it needs mode token")
    if options.get("secretName"):
        yield refuse("AUTH-K8S-SECRET", where, "secretName is given too", "Kubernetes' tokens or a Secret's, not both")
    version = version_of(part.spec.get("rayVersion"))
    if version is not None and version < K8S_TOKEN_SINCE:
        yield refuse("AUTH-K8S-VERSION", where, str(part.spec["rayVersion"]), "it came with Ray 2.55")


def nobody_outside_reaches_the_head(part: ClusterView) -> Found:
    where = f"{part.where}.headGroupSpec"
    if part.head.get("serviceType") not in (None, "", "ClusterIP"):
        yield refuse("HEAD-EXPOSED", f"{where}.serviceType", str(part.head["serviceType"]), "ClusterIP: the head is no "
                     "public service", "kubectl port-forward, or a proxy that asks who one is")  # fmt: skip
    if part.head.get("enableIngress") is True:
        yield refuse("HEAD-EXPOSED", f"{where}.enableIngress", "true", "no Ingress leads to the dashboard")


def pods_are_restricted(part: ClusterView) -> Found:
    for where, pod in part.pods():
        for key in ("hostNetwork", "hostPID", "hostIPC"):
            if pod.get(key) is True:
                yield refuse("POD-HOST", f"{where}.{key}", "true", "a pod shares nothing with its machine")
        for index, container in enumerate(containers(pod)):
            yield from _restricted(
                f"{where}.containers[{index}].securityContext",
                mapping(container.get("securityContext")),
                mapping(pod.get("securityContext")),
            )


def _restricted(where: str, own: Mapping[str, Any], pods: Mapping[str, Any]) -> Found:
    rule = "Pod Security `restricted`"
    if own.get("privileged") is True or own.get("allowPrivilegeEscalation") is not False:
        yield refuse("POD-PRIVILEGES", f"{where}.allowPrivilegeEscalation", "not false", rule)
    if (
        own.get("runAsNonRoot", pods.get("runAsNonRoot")) is not True
        or own.get("runAsUser", pods.get("runAsUser")) == 0
    ):
        yield refuse("POD-ROOT", f"{where}.runAsNonRoot", "it may run as root", rule)
    if "ALL" not in (mapping(own.get("capabilities")).get("drop") or ()):
        yield refuse("POD-CAPABILITIES", f"{where}.capabilities.drop", "not ALL", rule)
    profile = mapping(own.get("seccompProfile", pods.get("seccompProfile"))).get("type")
    if profile not in ("RuntimeDefault", "Localhost"):
        yield refuse("POD-SECCOMP", f"{where}.seccompProfile.type", f"{profile}", rule)
    if own.get("readOnlyRootFilesystem") is not True:
        yield warn("POD-WRITABLE", f"{where}.readOnlyRootFilesystem", "not true", "what runs cannot change its image")


SECURITY_RULES = (
    a_token_opens_it, the_version_knows_tokens, kubernetes_tokens, nobody_outside_reaches_the_head, pods_are_restricted,
)  # fmt: skip
