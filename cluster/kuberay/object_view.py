"""The RayCluster within an object, as the rules read it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from graftwork.cluster.jobs.models import Finding

# Findings: the code first, then where, the problem, the rule and the hint.


Found = Iterator[Finding]


def refuse(code: str, where: str, problem: str, rule: str, hint: str) -> Finding:
    """Return an error, which keeps the job from being submitted."""
    return Finding(f"E-{code}", "error", where, problem, rule, hint)


def warn(code: str, where: str, problem: str, rule: str, hint: str) -> Finding:
    """Return a warning, with which the job goes on."""
    return Finding(f"W-{code}", "warning", where, problem, rule, hint)


def dig(tree: Mapping[str, Any], *path: str) -> Any:
    """What lies at a path, None where nothing does or a null stands on the way."""
    found: Any = tree
    for key in path:
        if not isinstance(found, Mapping):
            return None
        found = found.get(key)
    return found


def number(value: Any) -> float | None:
    """A number that is one: schema errors are the schema's to tell."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def mapping(value: Any) -> Mapping[str, Any]:
    """A mapping, empty where there is none."""
    return value if isinstance(value, Mapping) else {}


def listed(value: Any) -> list[Mapping[str, Any]]:
    """The mappings of a list, empty where there is none."""
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []


AUTOSCALER_V2_ENV = "RAY_enable_autoscaler_v2"


@dataclass(frozen=True)
class ClusterView:
    """Tolerates any shape: what a schema refuses is told by it, and not again here."""

    kind: str
    """Of the object that it lies in."""
    where: str
    spec: Mapping[str, Any]
    annotations: Mapping[str, Any]
    """Of the object."""

    @property
    def head(self) -> Mapping[str, Any]:
        return mapping(self.spec.get("headGroupSpec"))

    @property
    def groups(self) -> list[Mapping[str, Any]]:
        return listed(self.spec.get("workerGroupSpecs"))

    @property
    def autoscales(self) -> bool:
        return self.spec.get("enableInTreeAutoscaling") is True

    @property
    def autoscaler_v2(self) -> bool:
        return str(dig(self.spec, "autoscalerOptions", "version")) == "v2"

    @property
    def head_env(self) -> dict[str, Any]:
        """Values of the head's variables, None for those taken from elsewhere."""
        return env_of(first_container(self.head))

    def iter_groups(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Head and groups, each with its path."""
        yield f"{self.where}.headGroupSpec", self.head
        for index, group in enumerate(self.groups):
            yield f"{self.where}.workerGroupSpecs[{index}]", group

    def pods(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Pod specs of head and groups, each with its path."""
        for where, group in self.iter_groups():
            yield f"{where}.template.spec", mapping(dig(group, "template", "spec"))


def containers(pod: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The containers of a pod that run beside each other; KubeRay starts Ray in the first."""
    return listed(pod.get("containers"))


def first_container(group: Mapping[str, Any]) -> Mapping[str, Any]:
    """The one that Ray runs in; empty where there is none."""
    return next(iter(containers(mapping(dig(group, "template", "spec")))), {})


def env_of(container: Mapping[str, Any]) -> dict[str, Any]:
    """Variables by name; None for a value that comes from elsewhere."""
    return {str(entry.get("name")): entry.get("value") for entry in listed(container.get("env"))}


def version_of(text: Any) -> tuple[int, ...] | None:
    """`2.60.0` as numbers; None for what is no version."""
    words = str(text).removeprefix("v").split("+")[0].split("-")[0].split(".")
    return tuple(int(word) for word in words) if len(words) >= 2 and all(word.isdigit() for word in words) else None
