"""What the processes of trials ask of a cluster, and whether its nodes hold them: never more than there is."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Node = Mapping[str, float]
"""Resources by Ray's names: CPU, GPU, and memory in bytes."""


@dataclass(frozen=True)
class Request:
    """What one trial asks for while it runs."""

    worker: dict[str, float]
    """Of each process that trains."""
    workers: int = 1
    driver: dict[str, float] | None = None
    """Of the process that starts a gang's workers; None: the one process trains."""

    @property
    def bundles(self) -> list[dict[str, float]]:
        """One a process, the driver first. All are there at the same time, each on one node."""
        workers = [self.worker] * self.workers
        return workers if self.driver is None else [self.driver, *workers]


@dataclass
class _Free:
    """What is left of a node. A GPU's parts are of one GPU; whole ones may be several."""

    rest: dict[str, float]
    gpus: list[float] = field(default_factory=list)

    @classmethod
    def from_node(cls, node: Node) -> "_Free":
        return cls({name: size for name, size in node.items() if name != "GPU"}, [1.0] * int(node.get("GPU", 0)))

    def take(self, bundle: Mapping[str, float]) -> bool:
        """Whether it has room; then it is taken."""
        rest = {name: size for name, size in bundle.items() if name != "GPU"}
        gpus = self._gpus(bundle.get("GPU", 0.0))
        if gpus is None or any(size > self.rest.get(name, 0.0) + 1e-9 for name, size in rest.items()):
            return False
        self.rest |= {name: self.rest[name] - size for name, size in rest.items()}
        self.gpus = gpus
        return True

    def _gpus(self, share: float) -> list[float] | None:
        """What is left of each GPU; the fullest with room is taken."""
        fullest_first = sorted(self.gpus)
        if share > 1:
            whole = fullest_first.count(1.0)
            return fullest_first[: -int(share)] if whole >= share else None
        for place, free in enumerate(fullest_first):
            if share and free + 1e-9 >= share:
                return [*fullest_first[:place], free - share, *fullest_first[place + 1 :]]
        return None if share else fullest_first


def fits(nodes: Iterable[Node], requests: Iterable[Request]) -> bool:
    """Whether all of them have room at the same time, the largest placed first."""
    free = [_Free.from_node(node) for node in nodes]
    bundles = [bundle for request in requests for bundle in request.bundles]
    return all(_place(free, bundle) for bundle in sorted(bundles, key=_size, reverse=True))


def max_concurrent(nodes: Iterable[Node], request: Request, most: int) -> int:
    """So many at a time have room, at most `most`."""
    free = [_Free.from_node(node) for node in nodes]
    for number in range(most):
        if not all(_place(free, bundle) for bundle in request.bundles):
            return number
    return most


def largest(nodes: Sequence[Node], name: str) -> float:
    """What one node has of a resource, at most."""
    return max((node.get(name, 0.0) for node in nodes), default=0.0)


def nodes_of_ray() -> list[Node]:
    """Of every node that is alive. Needs an initialised Ray."""
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()
    return [node["Resources"] for node in nodes if node["Alive"]]


def _place(free: Iterable[_Free], bundle: Mapping[str, float]) -> bool:
    return any(node.take(bundle) for node in free)


def _size(bundle: Mapping[str, float]) -> tuple[float, float, float]:
    return bundle.get("GPU", 0.0), bundle.get("memory", 0.0), bundle.get("CPU", 0.0)
