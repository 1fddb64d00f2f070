"""Objects of Kubernetes as JSON, and the RayCluster within one, as the rules read it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

KubeObject = dict[str, Any]
"""Object of Kubernetes, or a part of one, as the JSON that its API takes: the API server has its schema, not this
code."""
KubeView = Mapping[str, Any]
"""The same, to read."""


def dig(tree: KubeView, *path: str) -> Any:
    """Return the value at a path; None where there is none, or a null on the way."""
    found: Any = tree
    for key in path:
        if not isinstance(found, Mapping):
            return None
        found = found.get(key)
    return found


def number(value: Any) -> float | None:
    """A number that is one: the schema reports a wrong type."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def mapping(value: Any) -> KubeView:
    """A mapping, empty where there is none."""
    return value if isinstance(value, Mapping) else {}


def listed(value: Any) -> list[KubeView]:
    """The mappings of a list, empty where there is none."""
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []


@dataclass(frozen=True)
class ClusterView:
    """View of a RayCluster that tolerates any shape: the schema reports a wrong one."""

    kind: str
    """Kind of the object that has the cluster."""
    where: str
    spec: KubeView
    annotations: KubeView
    """Annotations of that object."""

    @property
    def head(self) -> KubeView:
        return mapping(self.spec.get("headGroupSpec"))

    @property
    def groups(self) -> list[KubeView]:
        return listed(self.spec.get("workerGroupSpecs"))

    @property
    def autoscales(self) -> bool:
        return self.spec.get("enableInTreeAutoscaling") is True

    @property
    def autoscaler_v2(self) -> bool:
        return str(dig(self.spec, "autoscalerOptions", "version")) == "v2"

    @property
    def head_env(self) -> KubeObject:
        """Values of the head's variables, None for those taken from elsewhere."""
        return env_of(first_container(self.head))

    def iter_groups(self) -> Iterator[tuple[str, KubeView]]:
        """Head and groups, each with its path."""
        yield f"{self.where}.headGroupSpec", self.head
        yield from self.iter_workers()

    def iter_workers(self) -> Iterator[tuple[str, KubeView]]:
        """Groups of workers, each with its path."""
        for index, group in enumerate(self.groups):
            yield f"{self.where}.workerGroupSpecs[{index}]", group

    def pods(self) -> Iterator[tuple[str, KubeView]]:
        """Pod specs of head and groups, each with its path."""
        for where, group in self.iter_groups():
            yield f"{where}.template.spec", mapping(dig(group, "template", "spec"))


def containers(pod: KubeView) -> list[KubeView]:
    """The containers of a pod that run together; KubeRay starts Ray in the first."""
    return listed(pod.get("containers"))


def first_container(group: KubeView) -> KubeView:
    """The one that Ray runs in; empty where there is none."""
    return next(iter(containers(mapping(dig(group, "template", "spec")))), {})


def env_of(container: KubeView) -> KubeObject:
    """Variables by name; None for a value that comes from elsewhere."""
    return {str(entry.get("name")): entry.get("value") for entry in listed(container.get("env"))}


def version_of(text: Any) -> tuple[int, ...] | None:
    """`2.60.0` as numbers; None for what is no version."""
    words = str(text).removeprefix("v").split("+")[0].split("-")[0].split(".")
    return tuple(int(word) for word in words) if len(words) >= 2 and all(word.isdigit() for word in words) else None
