"""Rules for pods: images, memory and environment, authentication of the Ray, and Pod Security."""

import re
from collections.abc import Mapping
from typing import Any

from graftwork.cluster.jobs.environment import why_secret
from graftwork.cluster.kuberay.object_view import (
    ClusterView,
    Found,
    containers,
    dig,
    first_container,
    listed,
    mapping,
    refuse,
    version_of,
    warn,
)
from graftwork.cluster.spec import QUANTITY_PATTERN, quantity

# Images, memory, environment of the pods: what starts, and dies or leaks later.


HEAD_BYTES = 8 * 2**30
DIGEST = re.compile(r"[^\s@]+@sha256:[0-9a-f]{64}")
OPERATORS_ENV = frozenset(
    {
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN",
        "RAY_ADDRESS",
        "RAY_IP",
        "FQ_RAY_IP",
        "RAY_PORT",
        "RAY_CLUSTER_NAME",
        "RAY_CLUSTER_NAMESPACE",
    }
)
"""KubeRay sets these; one of ours would win silently, an empty RAY_AUTH_MODE among them."""


def images_are_pinned(part: ClusterView) -> Found:
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


def the_head_has_room(part: ClusterView) -> Found:
    """kuberay#4287, #4356: the sample's 2 GiB end in out-of-memory."""
    memory = dig(first_container(part.head), "resources", "limits", "memory")
    where = f"{part.where}.headGroupSpec.template.spec.containers[0].resources.limits.memory"
    if memory is None:
        yield refuse("HEAD-MEMORY", where, "no limit", "a head has a limit of 8Gi or more", "head: {memory: 16Gi}")
    elif re.fullmatch(QUANTITY_PATTERN, str(memory)) and quantity(str(memory)) < HEAD_BYTES:
        yield refuse("HEAD-MEMORY", where, str(memory), "a head has 8Gi or more", "head: {memory: 16Gi}")


def the_head_takes_no_work(part: ClusterView) -> Found:
    cpus = dig(part.head, "rayStartParams", "num-cpus")
    if str(cpus) != "0":
        yield refuse(
            "HEAD-WORKS",
            f"{part.where}.headGroupSpec.rayStartParams.num-cpus",
            f"{cpus}",
            "work on the head takes the cluster with it when it runs out of memory",
            'num-cpus: "0"',
        )


def environment_has_no_secrets(part: ClusterView) -> Found:
    for where, pod in part.pods():
        for index, container in enumerate([*listed(pod.get("initContainers")), *containers(pod)]):
            yield from _environment(f"{where}.containers[{index}].env", container)


def environment_set_once(part: ClusterView) -> Found:
    for where, pod in part.pods():
        for container in containers(pod)[:1]:
            names = [str(entry.get("name")) for entry in listed(container.get("env"))]
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


def _environment(where: str, container: Mapping[str, Any]) -> Found:
    for entry in listed(container.get("env")):
        why = why_secret(str(entry.get("name")), entry["value"]) if isinstance(entry.get("value"), str) else None
        if why is not None:
            yield refuse(
                "SECRET-VALUE",
                f"{where}.{entry.get('name')}",
                why,
                "many users can read objects, so a secret value comes from a Kubernetes Secret",
                f"secret_env: {{{entry.get('name')}: SECRET/KEY}}",
            )


POD_RULES = (
    images_are_pinned,
    the_head_has_room,
    the_head_takes_no_work,
    environment_has_no_secrets,
    environment_set_once,
)


TOKEN_SINCE, K8S_TOKEN_SINCE = (2, 52), (2, 55)


def a_token_opens_it(part: ClusterView) -> Found:
    """An open dashboard runs anybody's code (CVE-2023-48022); Ray's own default is open until 2.61."""
    mode = dig(part.spec, "authOptions", "mode")
    if mode != "token":
        yield refuse(
            "AUTH-OPEN",
            f"{part.where}.authOptions.mode",
            f"{mode}",
            "anyone who reaches an open head can run code on the cluster",
            "auth: {mode: token}",
        )


def the_version_knows_tokens(part: ClusterView) -> Found:
    if dig(part.spec, "authOptions", "mode") != "token":
        return
    told, where = part.spec.get("rayVersion"), f"{part.where}.rayVersion"
    version = version_of(told)
    if version is None:
        yield refuse(
            "AUTH-VERSION",
            where,
            repr(told),
            "token mode needs the version of the image's Ray: 2.52 or newer",
            'rayVersion: "2.60.0"',
        )
    elif version < TOKEN_SINCE:
        yield refuse(
            "AUTH-VERSION", where, str(told), "token mode came with Ray 2.52", "set rayVersion and the image to 2.60.0"
        )


def kubernetes_tokens(part: ClusterView) -> Found:
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


def nobody_outside_reaches_the_head(part: ClusterView) -> Found:
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


def pods_are_restricted(part: ClusterView) -> Found:
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
            yield from _restricted(
                f"{where}.containers[{index}].securityContext",
                mapping(container.get("securityContext")),
                mapping(pod.get("securityContext")),
            )


def _restricted(where: str, own: Mapping[str, Any], pods: Mapping[str, Any]) -> Found:
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


SECURITY_RULES = (
    a_token_opens_it,
    the_version_knows_tokens,
    kubernetes_tokens,
    nobody_outside_reaches_the_head,
    pods_are_restricted,
)
