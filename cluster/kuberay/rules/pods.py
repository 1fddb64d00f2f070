"""Images, memory, environment of the pods: what starts, and dies or leaks later."""

import re
from collections.abc import Mapping
from typing import Any

from graftwork.cluster.kuberay.findings import Found, dig, listed, refuse
from graftwork.cluster.kuberay.rules.part import ClusterView, containers, first_container
from graftwork.cluster.secret_like import why_secret
from graftwork.cluster.spec import QUANTITY_PATTERN, quantity

HEAD_BYTES = 8 * 2**30
DIGEST = re.compile(r"[^\s@]+@sha256:[0-9a-f]{64}")
OPERATORS_ENV = frozenset({
    "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS", "RAY_IP", "FQ_RAY_IP", "RAY_PORT", "RAY_CLUSTER_NAME",
    "RAY_CLUSTER_NAMESPACE",
})  # fmt: skip
"""KubeRay sets these; one of ours would win silently, an empty RAY_AUTH_MODE among them."""


def images_are_pinned(part: ClusterView) -> Found:
    """A tag can mean other code tomorrow, on the second machine already."""
    for where, pod in part.pods():
        for key in ("initContainers", "containers"):
            for index, container in enumerate(listed(pod.get(key))):
                image = str(container.get("image") or "")
                if not DIGEST.fullmatch(image):
                    yield refuse("IMAGE-DIGEST", f"{where}.{key}[{index}].image", image or "no image",
                                 "an image is named by its digest: registry/app@sha256:...",
                                 "image: the digest that `docker push` or the registry shows")  # fmt: skip


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


def environment_is_said_once(part: ClusterView) -> Found:
    for where, pod in part.pods():
        for container in containers(pod)[:1]:
            names = [str(entry.get("name")) for entry in listed(container.get("env"))]
            for name in sorted({name for name in names if names.count(name) > 1}):
                yield refuse("ENV-TWICE", f"{where}.containers[0].env", name, "the last one would win silently",
                             f"drop {name} from `env` or `secret_env`")  # fmt: skip
            for name in sorted(OPERATORS_ENV.intersection(names)):
                yield refuse("ENV-RESERVED", f"{where}.containers[0].env", name, "KubeRay sets it", f"drop {name}")


def _environment(where: str, container: Mapping[str, Any]) -> Found:
    for entry in listed(container.get("env")):
        why = why_secret(str(entry.get("name")), entry["value"]) if isinstance(entry.get("value"), str) else None
        if why is not None:
            yield refuse(
                "SECRET-VALUE",
                f"{where}.{entry.get('name')}",
                why,
                "a secret is a Secret's: objects are read by many",
                f"secret_env: {{{entry.get('name')}: SECRET/KEY}}",
            )


POD_RULES = (
    images_are_pinned, the_head_has_room, the_head_takes_no_work, environment_has_no_secrets, environment_is_said_once,
)  # fmt: skip
