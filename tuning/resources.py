"""Resource requests of a trial as the planner predicts them, for one process or for distributed workers."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graftwork.base import load as base_model
from graftwork.base.model_shape import ModelShape
from graftwork.errors import ClusterError, ConfigError, GraftworkError
from graftwork.planning.hardware import GIB, Machine
from graftwork.planning.memory import HEADROOM, RowSizes, charge_bytes
from graftwork.training.autotune import machine_of
from graftwork.training.planning.memory import PROCESS_BYTES
from graftwork.training.planning.plan import has_auto, suggest_training_changes, worker_memory
from graftwork.training.ray_resources import resources_per_worker
from graftwork.training.spec import TrainSpec
from graftwork.training.strategies import StrategySpec, check_here, check_rows
from graftwork.tuning.multi_lora.group import predict_together
from graftwork.tuning.plan import resolve_auto_trial, shards
from graftwork.tuning.search import Values, rows_key, trial_spec
from graftwork.tuning.spec import TuneSpec

# Requests of the trials' processes, compared with the nodes of the cluster.


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


DRIVER_BYTES = 400 * 2**20
"""Peak of the process that starts a gang's workers and hands on their reports: Python, Ray, Tune (docs/log.md)."""
TRIAL_BYTES = 250 * 2**20
"""The process that Tune starts, beside the fork that trains on CPUs (docs/log.md)."""
MEMORY_STEP = 128 * 2**20
"""Memory is rounded up to so many bytes: Tune keeps a process for a trial that asks for as much as the one before."""
SHARE_STEP = 100
"""A GPU's share is rounded up to one of so many parts."""


@dataclass(frozen=True)
class TrialResources:
    """What the trials of one sweep ask of one cluster."""

    spec: TuneSpec
    rows: Mapping[str, RowSizes]
    """By `space.rows_key`."""
    nodes: Sequence[Node]
    """None at all: every trial runs in one process (nothing is known of a cluster)."""
    elsewhere: str | None = None
    """Where each trial is a job of its own (`tuning/remote_trial.py`): asked for here is the process that waits."""

    def resolve_trial(self, values: Values) -> TrainSpec:
        """The training spec of a point, without `auto`, for one process or a gang.

        Raises ConfigError when the values contradict each other, or where nothing fits.
        """
        alone, gang = trial_spec(self.spec, values), trial_spec(self.spec, values, gang=True)
        if self.elsewhere is not None:
            return gang  # `auto` is settled there
        if self.spec.distributed == "always" or not self.nodes or not is_distributed(gang):
            return self._without_auto(gang if self.spec.distributed == "always" else alone, values)
        try:
            settled = self._without_auto(alone, values)
        except ConfigError:
            if self.spec.distributed == "never" or not shards(gang):
                raise
            return self._without_auto(gang, values)
        fits = (
            self.spec.distributed == "never"
            or not shards(gang)
            or fits_one(self.request([settled], values), self.nodes)
        )
        return settled if fits else self._without_auto(gang, values)

    def request(self, trials: Sequence[TrainSpec], values: Values) -> Request:
        """What a settled trial asks for, or several that share a process and its rows (`values`: of any of them). Of a
        base whose layers are not known, or a GPU that is not, no memory."""
        if self.elsewhere is not None:
            return Request({"memory": float(DRIVER_BYTES)})
        trial, found = trials[0], self._known(trials[0])
        worker = resources_per_worker(trial)
        if found is not None:
            worker |= predicted(trials, *found, self.rows[rows_key(values)])
        if not self.spec.reserve_memory:
            worker.pop("memory", None)
        if not is_distributed(trial):
            return Request(worker)
        driver = {"memory": float(DRIVER_BYTES) if "memory" in worker else 1.0}  # Ray wants a bundle of something
        return Request(worker, trial.num_workers, driver)

    def explain_placement(self, trial: TrainSpec, values: Values) -> str | None:
        """Why a trial runs as a gang, or as a job; None where it does neither."""
        if self.elsewhere is not None:
            return f"a job of its own: --trial-target {self.elsewhere}"
        if not is_distributed(trial):
            return None
        gang = f"distributed over {trial.num_workers} workers ({trial.strategy.kind})"
        if self.spec.distributed == "always":
            return f"{gang}: distributed=always"
        try:
            alone = self.request([self._without_auto(trial_spec(self.spec, values), values)], values)
        except ConfigError as error:
            return f"{gang}: one process does not fit ({error.problem})"
        return f"{gang}: one process would ask for {format_request(alone)}; {format_nodes(self.nodes)}"

    def check_capacity(self, points: Sequence[Values]) -> int:
        """Processes that run at a time. Raises ClusterError when a point fits nowhere even alone, or when the cluster
        can never hold `max_concurrent` of the smallest; ConfigError, DataError for a gang that can't be trained."""
        requests = []
        for values in points:
            trial = self.resolve_trial(values)
            requests.append(self.request([trial], values))
            if is_distributed(trial) and self.elsewhere is None:
                check_here(trial)
                check_rows(trial, self.spec.eval_rows)
            if not fits_one(requests[-1], self.nodes):
                raise self.unschedulable_error(trial, values)
        return at_once(self.spec, min(requests, key=_weight), self.nodes, len(points))

    def unschedulable_error(self, trial: TrainSpec, values: Values) -> GraftworkError:
        """The error for a trial that the cluster can't hold even alone."""
        request = self.request([trial], values)
        lacking = _lacking(trial, request, self.nodes)
        if lacking is not None:
            return lacking
        name = " ".join(f"{key}={value}" for key, value in values.items())
        found, rule = (
            f"its prediction asks for {format_request(request)}; {format_nodes(self.nodes)}",
            "a trial starts where it has room",
        )
        if request.worker.get("GPU", 0.0) > 1 and not is_distributed(trial):
            found = f"it is predicted to take {request.worker['GPU']:.2f} times what it may"
            rule = f"a trial may take {HEADROOM:.0%} of a GPU's memory"
        way_out = self._way_out(trial, values) or "take a smaller base, or nodes that have (or declare) more memory"
        return ClusterError(f"the trial {name}", found, rule, way_out)

    def _without_auto(self, trial: TrainSpec, values: Values) -> TrainSpec:
        if not has_auto(trial):
            return trial
        shape = ModelShape.from_config(base_model.resolve(trial.base).config)
        return resolve_auto_trial(self.spec, trial, shape, self.rows[rows_key(values)], machine_of(trial))

    def _known(self, trial: TrainSpec) -> tuple[ModelShape, Machine] | None:
        shape = ModelShape.from_config(base_model.resolve(trial.base).config)
        try:
            return None if shape.unplanned else (shape, machine_of(trial))
        except ConfigError:
            return None

    def _way_out(self, trial: TrainSpec, values: Values) -> str | None:
        """The nearest change of the trial's spec that would fit."""
        found = self._known(trial)
        if found is None:
            return None
        shape, machine = found
        room = HEADROOM * machine.memory_bytes if machine.gpu is not None else largest(self.nodes, "memory")
        ways = suggest_training_changes(trial, shape, self.rows[rows_key(values)], machine)
        way = next((way for way, size in ways if size <= room and "(" not in way and "num_workers" not in way), None)
        return way and " ".join(f"--set train.{one}" for one in way.split())


def is_distributed(trial: TrainSpec) -> bool:
    """Whether a trial is trained by several workers, or with a strategy: then by Ray Train."""
    return trial.num_workers > 1 or trial.strategy != StrategySpec()


def fits_one(request: Request, nodes: Sequence[Node]) -> bool:
    """Whether a trial has room when nothing else runs. One process has one GPU."""
    one_gpu = request.driver is not None or request.worker.get("GPU", 0.0) <= 1
    return one_gpu and fits(nodes, [request])


def at_once(spec: TuneSpec, smallest: Request, nodes: Sequence[Node], trials: int) -> int:
    """Processes at a time: `max_concurrent`, or as many as there is room for.

    Raises ClusterError when the nodes can never hold so many of the smallest trial.
    """
    if spec.max_concurrent == "auto":
        return max_concurrent(nodes, smallest, max(1, trials))
    most = min(spec.max_concurrent, trials)
    room = max_concurrent(nodes, smallest, most)
    if room >= most:
        return spec.max_concurrent
    raise ClusterError(
        f"max_concurrent={spec.max_concurrent}",
        f"there is room for {room} at a time: {format_nodes(nodes)}; "
        f"the smallest trial asks for {format_request(smallest)}",
        "trials never ask for more than there is, by the prediction of their memory",
        f"--set max_concurrent={room}, or auto",
    )


def predicted(trials: Sequence[TrainSpec], model: ModelShape, machine: Machine, rows: RowSizes) -> dict[str, float]:
    """Bytes of one process; with a GPU its share too, which a gang's workers have whole."""
    trial, together = trials[0], len(trials) > 1
    if together:
        plan = predict_together(trials, model, rows, value_bytes=machine.value_bytes)
    else:
        plan = worker_memory(trial, model, rows, machine)
    need = charge_bytes(plan.peak_bytes, 1, machine)
    if machine.gpu is None:
        beside = 0 if is_distributed(trial) or together else TRIAL_BYTES
        return {"memory": float(MEMORY_STEP * math.ceil((need + beside) / MEMORY_STEP))}
    host = {"memory": float(plan.host_bytes or PROCESS_BYTES)}
    share = math.ceil(SHARE_STEP * need / (HEADROOM * machine.memory_bytes)) / SHARE_STEP
    return host if is_distributed(trial) else {**host, "GPU": share}


def _lacking(trial: TrainSpec, request: Request, nodes: Sequence[Node]) -> ClusterError | None:
    """CPUs, or GPUs where there is none."""
    for name in ("CPU", "GPU"):
        most, need = largest(nodes, name), request.worker.get(name, 0.0)
        if need > most and (name == "CPU" or most == 0):
            return ClusterError(
                f"train.{name.lower()}s_per_worker={resources_per_worker(trial)[name]:g}",
                f"the largest node has {most:g} {name}",
                "a trial runs on one node" if request.driver is None else "a worker runs on one node",
                f"set it to {most:g} or less",
            )
    return None


def format_request(request: Request) -> str:
    """Return the request as text."""
    one = ", ".join(_amount(name, size) for name, size in request.worker.items())
    return one if request.driver is None else f"{request.workers} workers of {one} each"


def format_nodes(nodes: Sequence[Node]) -> str:
    """Return the resources of the nodes as text, and the largest node where there are several."""
    names = [name for name in ("CPU", "GPU", "memory") if largest(nodes, name)]
    total = ", ".join(_amount(name, sum(node.get(name, 0.0) for node in nodes)) for name in names)
    if len(nodes) == 1:
        return f"the one node has {total}"
    return f"{len(nodes)} nodes have {total}, the largest {', '.join(_amount(n, largest(nodes, n)) for n in names)}"


def _amount(name: str, size: float) -> str:
    return f"{size / GIB:.2f} GiB of memory" if name == "memory" else f"{size:g} {name}"


def _weight(request: Request) -> tuple[float, float, float]:
    total = [sum(bundle.get(name, 0.0) for bundle in request.bundles) for name in ("GPU", "CPU", "memory")]
    return total[0], total[1], total[2]
