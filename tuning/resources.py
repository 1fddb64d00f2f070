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

Node = Mapping[str, float]
"""Resources by Ray's names: CPU, GPU, and memory in bytes."""


@dataclass(frozen=True)
class Request:
    """Resources of one trial while it runs."""

    worker: dict[str, float]
    """Of each process that trains."""
    workers: int = 1
    driver: dict[str, float] | None = None
    """Of the process that starts the workers of a distributed trial; None: the one process trains."""

    @property
    def bundles(self) -> list[dict[str, float]]:
        """One per process, the driver first. All are needed at the same time, each on one node."""
        workers = [self.worker] * self.workers
        return workers if self.driver is None else [self.driver, *workers]


@dataclass
class _FreeNode:
    """Free resources of a node. Parts of a GPU are of one GPU; whole GPUs may be several."""

    rest: dict[str, float]
    gpus: list[float] = field(default_factory=list)

    @classmethod
    def from_node(cls, node: Node) -> "_FreeNode":
        return cls({name: size for name, size in node.items() if name != "GPU"}, [1.0] * int(node.get("GPU", 0)))

    def take(self, bundle: Mapping[str, float]) -> bool:
        """Take the bundle and return True, or return False where there is no room."""
        rest = {name: size for name, size in bundle.items() if name != "GPU"}
        gpus = self._gpus(bundle.get("GPU", 0.0))
        if gpus is None or any(size > self.rest.get(name, 0.0) + 1e-9 for name, size in rest.items()):
            return False
        self.rest |= {name: self.rest[name] - size for name, size in rest.items()}
        self.gpus = gpus
        return True

    def _gpus(self, share: float) -> list[float] | None:
        """The free part of each GPU after the fullest one with room is taken; None where none has room."""
        fullest_first = sorted(self.gpus)
        if share > 1:
            whole = fullest_first.count(1.0)
            return fullest_first[: -int(share)] if whole >= share else None
        for place, free in enumerate(fullest_first):
            if share and free + 1e-9 >= share:
                return [*fullest_first[:place], free - share, *fullest_first[place + 1 :]]
        return None if share else fullest_first


def fits(nodes: Iterable[Node], requests: Iterable[Request]) -> bool:
    """Return whether all requests have room at the same time, the largest placed first."""
    free = [_FreeNode.from_node(node) for node in nodes]
    bundles = [bundle for request in requests for bundle in request.bundles]
    bundles.sort(key=lambda bundle: [bundle.get(name, 0.0) for name in ("GPU", "memory", "CPU")], reverse=True)
    return all(any(node.take(bundle) for node in free) for bundle in bundles)


def max_concurrent(nodes: Iterable[Node], request: Request, most: int) -> int:
    """Return how many such requests have room at a time, at most `most`."""
    free = [_FreeNode.from_node(node) for node in nodes]
    for number in range(most):
        if not all(any(node.take(bundle) for node in free) for bundle in request.bundles):
            return number
    return most


def largest(nodes: Sequence[Node], name: str) -> float:
    """Return the most that one node has of a resource."""
    return max((node.get(name, 0.0) for node in nodes), default=0.0)


def nodes_of_ray() -> list[Node]:
    """Of every node that is alive. Needs an initialised Ray."""
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()
    return [node["Resources"] for node in nodes if node["Alive"]]


DRIVER_BYTES = 400 * 2**20
"""Peak of the process that starts a distributed trial and hands on its reports: Python, Ray, Tune (docs/log.md)."""
TRIAL_BYTES = 250 * 2**20
"""The process that Tune starts, without the fork that trains on CPUs (docs/log.md)."""
MEMORY_STEP = 128 * 2**20
"""Unit of a memory request: Tune reuses a process for a trial with the same request as the one before."""
SHARE_STEP = 100
"""Parts of a GPU; a share is rounded up to a whole number of them."""


@dataclass(frozen=True)
class TrialResources:
    """Resource requests of the trials of one sweep on one cluster."""

    spec: TuneSpec
    rows: Mapping[str, RowSizes]
    """By `space.rows_key`."""
    nodes: Sequence[Node]
    """Empty: no cluster is known, and every trial runs in one process."""
    elsewhere: str | None = None
    """Target on which each trial is a job (`tuning/remote_trial.py`): a request is then for the process that waits."""

    def resolve_trial(self, values: Values) -> TrainSpec:
        """The training spec of a point, without `auto`, for one process or distributed workers.

        Raises ConfigError when the values contradict each other, or where nothing fits.
        """
        distributed = trial_spec(self.spec, values, distributed=True)
        if self.elsewhere is not None:
            return distributed  # `auto` is resolved there
        if self.spec.distributed != "always":
            alone_only = self.spec.distributed == "never" or not shards(distributed) or not self.nodes
            try:
                alone = self._without_auto(trial_spec(self.spec, values), values)
            except ConfigError:
                if alone_only:
                    raise
            else:
                if alone_only or fits_one(self.request([alone], values), self.nodes):
                    return alone
        return self._without_auto(distributed, values)

    def request(self, trials: Sequence[TrainSpec], values: Values) -> Request:
        """Request of a trial without `auto`, or of several that share a process and its rows (`values`: of any).

        Without memory for a base whose layers are not known, or an unknown GPU.
        """
        if self.elsewhere is not None:
            return Request({"memory": float(DRIVER_BYTES)})
        trial, found = trials[0], self._shape_and_machine(trials[0])
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
        """Return why a trial is distributed, or a job; None where it is neither."""
        if self.elsewhere is not None:
            return f"a job of its own: --trial-target {self.elsewhere}"
        if not is_distributed(trial):
            return None
        placed = f"distributed over {trial.num_workers} workers ({trial.strategy.kind})"
        if self.spec.distributed == "always":
            return f"{placed}: distributed=always"
        try:
            alone = self.request([self._without_auto(trial_spec(self.spec, values), values)], values)
        except ConfigError as error:
            return f"{placed}: one process does not fit ({error.problem})"
        return f"{placed}: one process would ask for {format_request(alone)}; {format_nodes(self.nodes)}"

    def check_capacity(self, points: Sequence[Values]) -> int:
        """Return how many processes run at a time.

        Raises ClusterError when a point fits nowhere even alone, or when the cluster can never hold `max_concurrent` of
        the smallest; ConfigError, DataError for a distributed trial that can't be trained.
        """
        requests = []
        for values in points:
            trial = self.resolve_trial(values)
            requests.append(self.request([trial], values))
            if is_distributed(trial) and self.elsewhere is None:
                check_here(trial)
                check_rows(trial, self.spec.eval_rows)
            if not fits_one(requests[-1], self.nodes):
                raise self.unschedulable_error(trial, values)

        def total(request: Request) -> list[float]:
            return [sum(bundle.get(name, 0.0) for bundle in request.bundles) for name in ("GPU", "CPU", "memory")]

        return at_once(self.spec, min(requests, key=total), self.nodes, len(points))

    def unschedulable_error(self, trial: TrainSpec, values: Values) -> GraftworkError:
        """The error for a trial that the cluster can't hold even alone."""
        request = self.request([trial], values)
        for name in ("CPU", "GPU"):  # CPUs, or GPUs where there is none
            most, need = largest(self.nodes, name), request.worker.get(name, 0.0)
            if need > most and (name == "CPU" or most == 0):
                return ClusterError(
                    f"train.{name.lower()}s_per_worker={resources_per_worker(trial)[name]:g}",
                    f"the largest node has {most:g} {name}",
                    "a trial runs on one node" if request.driver is None else "a worker runs on one node",
                    f"set it to {most:g} or less",
                )
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

    def _shape_and_machine(self, trial: TrainSpec) -> tuple[ModelShape, Machine] | None:
        shape = ModelShape.from_config(base_model.resolve(trial.base).config)
        try:
            return None if shape.unplanned else (shape, machine_of(trial))
        except ConfigError:
            return None

    def _way_out(self, trial: TrainSpec, values: Values) -> str | None:
        """The smallest change of the trial's spec that would fit."""
        found = self._shape_and_machine(trial)
        if found is None:
            return None
        shape, machine = found
        room = HEADROOM * machine.memory_bytes if machine.gpu is not None else largest(self.nodes, "memory")
        ways = suggest_training_changes(trial, shape, self.rows[rows_key(values)], machine)
        way = next((way for way, size in ways if size <= room and "(" not in way and "num_workers" not in way), None)
        return way and " ".join(f"--set train.{one}" for one in way.split())


def is_distributed(trial: TrainSpec) -> bool:
    """Return whether Ray Train trains a trial: one with several workers, or with a strategy."""
    return trial.num_workers > 1 or trial.strategy != StrategySpec()


def fits_one(request: Request, nodes: Sequence[Node]) -> bool:
    """Return whether a trial has room when nothing else runs. One process has one GPU."""
    one_gpu = request.driver is not None or request.worker.get("GPU", 0.0) <= 1
    return one_gpu and fits(nodes, [request])


def at_once(spec: TuneSpec, smallest: Request, nodes: Sequence[Node], trials: int) -> int:
    """Return the processes at a time: `max_concurrent`, or as many as there is room for.

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
    """Return the bytes of one process, and its share of a GPU; a distributed worker has a whole GPU."""
    trial, together = trials[0], len(trials) > 1
    if together:
        plan = predict_together(trials, model, rows, value_bytes=machine.value_bytes)
    else:
        plan = worker_memory(trial, model, rows, machine)
    need = charge_bytes(plan.peak_bytes, 1, machine)
    if machine.gpu is None:
        need += 0 if is_distributed(trial) or together else TRIAL_BYTES
        return {"memory": float(MEMORY_STEP * math.ceil(need / MEMORY_STEP))}
    host = {"memory": float(plan.host_bytes or PROCESS_BYTES)}
    share = math.ceil(SHARE_STEP * need / (HEADROOM * machine.memory_bytes)) / SHARE_STEP
    return host if is_distributed(trial) else {**host, "GPU": share}


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
