"""Rules for pods: images, memory and environment, authentication of the Ray, and Pod Security."""

import re
from collections.abc import Mapping
from typing import Any

from graftwork.cluster.jobs.checks import why_secret
from graftwork.cluster.jobs.models import Findings, refuse, warn
from graftwork.cluster.kuberay.object_view import (
    ClusterView,
    containers,
    dig,
    first_container,
    listed,
    mapping,
    version_of,
)
from graftwork.cluster.spec import QUANTITY_PATTERN, quantity

HEAD_BYTES = 8 * 2**30
DIGEST = re.compile(r"[^\s@]+@sha256:[0-9a-f]{64}")
OPERATORS_ENV = {
    *("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS", "RAY_IP", "FQ_RAY_IP", "RAY_PORT"),
    *("RAY_CLUSTER_NAME", "RAY_CLUSTER_NAMESPACE"),
}
"""KubeRay sets these; one of ours would win silently, an empty RAY_AUTH_MODE among them."""
TOKEN_SINCE, K8S_TOKEN_SINCE = (2, 52), (2, 55)


def check_images(part: ClusterView) -> Findings:
    """A tag can mean other code tomorrow, on the second machine already."""
    for where, pod in part.pods():
        for key in ("initContainers", "containers"):
            for index, container in enumerate(listed(pod.get(key))):
                image = str(container.get("image") or "")
                if not DIGEST.fullmatch(image):
                    yield refuse(
                        "IMAGE-DIGEST",
                        f"{where}.{key}[{index}].image",
                        image or "no image",
                        "an image is named by its digest: registry/app@sha256:...",
                        "image: REGISTRY/APP@sha256:DIGEST, as `docker push` prints it",
                    )


def check_head(part: ClusterView) -> Findings:
    """Memory of the head, and no work on it: the samples' 2 GiB end in out-of-memory (kuberay#4287, #4356)."""
    memory = dig(first_container(part.head), "resources", "limits", "memory")
    where = f"{part.where}.headGroupSpec"
    at = f"{where}.template.spec.containers[0].resources.limits.memory"
    if memory is None:
        yield refuse("HEAD-MEMORY", at, "no limit", "a head has a limit of 8Gi or more", "head: {memory: 16Gi}")
    elif re.fullmatch(QUANTITY_PATTERN, str(memory)) and quantity(str(memory)) < HEAD_BYTES:
        yield refuse("HEAD-MEMORY", at, str(memory), "a head has 8Gi or more", "head: {memory: 16Gi}")
    cpus = dig(part.head, "rayStartParams", "num-cpus")
    if str(cpus) != "0":
        yield refuse(
            "HEAD-WORKS",
            f"{where}.rayStartParams.num-cpus",
            f"{cpus}",
            "work on the head takes the cluster with it when it runs out of memory",
            'num-cpus: "0"',
        )


def check_environment(part: ClusterView) -> Findings:
    """No secret as a plain value, no variable twice, none that KubeRay sets."""
    for where, pod in part.pods():
        for index, container in enumerate([*listed(pod.get("initContainers")), *containers(pod)]):
            for entry in listed(container.get("env")):
                name, value = str(entry.get("name")), entry.get("value")
                if isinstance(value, str) and (why := why_secret(name, value)) is not None:
                    yield refuse(
                        "SECRET-VALUE",
                        f"{where}.containers[{index}].env.{name}",
                        why,
                        "many users can read objects, so a secret value comes from a Kubernetes Secret",
                        f"secret_env: {{{name}: SECRET/KEY}}",
                    )
        names = [str(entry.get("name")) for container in containers(pod)[:1] for entry in listed(container.get("env"))]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield refuse(
                "ENV-TWICE",
                f"{where}.containers[0].env",
                name,
                "the last one would win silently",
                f"remove {name} from `env` or from `secret_env`",
            )
        for name in sorted(OPERATORS_ENV.intersection(names)):
            yield refuse(
                "ENV-RESERVED",
                f"{where}.containers[0].env",
                name,
                "KubeRay sets this variable",
                f"remove {name} from `env` and `secret_env`",
            )


def check_token(part: ClusterView) -> Findings:
    """Token mode: an open dashboard runs anybody's code (CVE-2023-48022); Ray's own default is open until 2.61."""
    mode, value, where = dig(part.spec, "authOptions", "mode"), part.spec.get("rayVersion"), f"{part.where}.rayVersion"
    version = version_of(value)
    if mode != "token":
        yield refuse(
            "AUTH-OPEN",
            f"{part.where}.authOptions.mode",
            f"{mode}",
            "anyone who reaches an open head can run code on the cluster",
            "auth: {mode: token}",
        )
    elif version is None:
        yield refuse(
            "AUTH-VERSION",
            where,
            repr(value),
            "token mode needs the version of the image's Ray: 2.52 or newer",
            'rayVersion: "2.60.0"',
        )
    elif version < TOKEN_SINCE:
        yield refuse(
            "AUTH-VERSION", where, str(value), "token mode came with Ray 2.52", "set rayVersion and the image to 2.60.0"
        )


def check_kubernetes_token(part: ClusterView) -> Findings:
    options, where = mapping(part.spec.get("authOptions")), f"{part.where}.authOptions.enableK8sTokenAuth"
    if options.get("enableK8sTokenAuth") is not True:
        return
    if part.kind in ("RayJob", "RayService"):
        yield refuse(
            "AUTH-K8S-KIND",
            where,
            f"true in a {part.kind}",
            "KubeRay accepts Kubernetes tokens for a RayCluster only",
            "enableK8sTokenAuth: false, and auth: {mode: token, secret: SECRET}",
        )
    if options.get("mode") != "token":
        yield refuse(
            "AUTH-K8S-MODE",
            where,
            f"mode {options.get('mode')}",
            "Kubernetes tokens need mode token",
            "auth: {mode: token}",
        )
    if options.get("secretName"):
        yield refuse(
            "AUTH-K8S-SECRET",
            where,
            "secretName is given too",
            "the token comes from Kubernetes or from a Secret",
            "remove authOptions.secretName, or set enableK8sTokenAuth: false",
        )
    version = version_of(part.spec.get("rayVersion"))
    if version is not None and version < K8S_TOKEN_SINCE:
        yield refuse(
            "AUTH-K8S-VERSION",
            where,
            str(part.spec["rayVersion"]),
            "Kubernetes tokens need Ray 2.55 or newer",
            "set rayVersion and the image to 2.60.0",
        )


def check_exposure(part: ClusterView) -> Findings:
    where = f"{part.where}.headGroupSpec"
    if part.head.get("serviceType") not in (None, "", "ClusterIP"):
        yield refuse(
            "HEAD-EXPOSED",
            f"{where}.serviceType",
            str(part.head["serviceType"]),
            "ClusterIP: the head is no public service",
            "serviceType: ClusterIP, and kubectl port-forward or a proxy with authentication",
        )
    if part.head.get("enableIngress") is True:
        yield refuse(
            "HEAD-EXPOSED",
            f"{where}.enableIngress",
            "true",
            "ClusterIP: no Ingress leads to the dashboard",
            "enableIngress: false, and kubectl port-forward for access",
        )


def check_pod_security(part: ClusterView) -> Findings:
    for where, pod in part.pods():
        for key in ("hostNetwork", "hostPID", "hostIPC"):
            if pod.get(key) is True:
                yield refuse(
                    "POD-HOST",
                    f"{where}.{key}",
                    "true",
                    "a pod does not share the network, processes or IPC of its machine",
                    f"remove {key}, or set it to false",
                )
        for index, container in enumerate(containers(pod)):
            yield from _restricted_findings(
                f"{where}.containers[{index}].securityContext",
                mapping(container.get("securityContext")),
                mapping(pod.get("securityContext")),
            )


def _restricted_findings(where: str, own: Mapping[str, Any], pods: Mapping[str, Any]) -> Findings:
    if own.get("privileged") is True or own.get("allowPrivilegeEscalation") is not False:
        yield refuse(
            "POD-PRIVILEGES",
            f"{where}.allowPrivilegeEscalation",
            "not false",
            "Pod Security `restricted`: no privilege escalation",
            "securityContext: {privileged: false, allowPrivilegeEscalation: false}",
        )
    if (
        own.get("runAsNonRoot", pods.get("runAsNonRoot")) is not True
        or own.get("runAsUser", pods.get("runAsUser")) == 0
    ):
        yield refuse(
            "POD-ROOT",
            f"{where}.runAsNonRoot",
            "it may run as root",
            "Pod Security `restricted`: a user other than root",
            "securityContext: {runAsNonRoot: true, runAsUser: 1000}",
        )
    if "ALL" not in (mapping(own.get("capabilities")).get("drop") or ()):
        yield refuse(
            "POD-CAPABILITIES",
            f"{where}.capabilities.drop",
            "not ALL",
            "Pod Security `restricted`: no capabilities",
            "securityContext: {capabilities: {drop: [ALL]}}",
        )
    profile = mapping(own.get("seccompProfile", pods.get("seccompProfile"))).get("type")
    if profile not in ("RuntimeDefault", "Localhost"):
        yield refuse(
            "POD-SECCOMP",
            f"{where}.seccompProfile.type",
            f"{profile}",
            "Pod Security `restricted`: a seccomp profile",
            "securityContext: {seccompProfile: {type: RuntimeDefault}}",
        )
    if own.get("readOnlyRootFilesystem") is not True:
        yield warn(
            "POD-WRITABLE",
            f"{where}.readOnlyRootFilesystem",
            "not true",
            "a process in the pod cannot change its image",
            "securityContext: {readOnlyRootFilesystem: true}",
        )


POD_RULES = (
    *(check_images, check_head, check_environment, check_token, check_kubernetes_token),
    *(check_exposure, check_pod_security),
)
