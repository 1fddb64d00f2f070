"""Spec of a cluster: where a job runs and which resources it may use, one YAML file per cluster.

A job's spec describes the work, and is the same on a laptop and on a cluster.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from graftwork.config import Spec

LABEL_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
"""RFC 1123 label: what Kubernetes takes as a name within another name."""
QUANTITY_PATTERN = r"^([0-9]+(\.[0-9]+)?)(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"
"""A quantity of Kubernetes without exponents: 500m, 4, 16Gi."""

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_BYTES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def seconds_of(value: Any) -> Any:
    """`90`, `90s`, `15m`, `12h`, `1h30m` or `2d` as seconds; anything else is left for pydantic to refuse."""
    if not isinstance(value, str):
        return value
    parts = re.findall(r"([0-9]+(?:\.[0-9]+)?)([smhd])", value.strip())
    if not parts or "".join(number + unit for number, unit in parts) != value.strip():
        raise ValueError(f"{value!r} is no duration: write 90s, 15m, 12h, 1h30m or 2d")
    return sum(float(number) * _UNITS_S[unit] for number, unit in parts)


def quantity(text: str) -> float:
    """A quantity as a number: `16Gi` is 17179869184.0, `500m` is 0.5."""
    match = re.fullmatch(QUANTITY_PATTERN, text)
    assert match is not None, text
    return float(match[1]) / 1000 if match[3] == "m" else float(match[1]) * _BYTES[match[3] or ""]


Seconds = Annotated[float, BeforeValidator(seconds_of), Field(gt=0)]
Quantity = Annotated[
    str, BeforeValidator(lambda v: str(v) if isinstance(v, int | float) else v), Field(pattern=QUANTITY_PATTERN)
]
Label = Annotated[str, Field(pattern=LABEL_PATTERN, max_length=63)]


class HeadSpec(Spec):
    """The head: Ray's own processes and the job's driver. No worker is placed on it."""

    cpu: Quantity = "4"
    memory: Quantity = "16Gi"
    """Under 8Gi a head runs out of memory with the load of a sweep."""


class WorkerSpec(Spec):
    """A group of equal machines."""

    name: Label = "workers"
    count: int = Field(default=1, ge=0)
    max_count: int | None = Field(default=None, ge=1)
    """Above `count` the group grows with the load: for serving. Training and sweeps take fixed gangs."""
    cpu: Quantity = "8"
    memory: Quantity = "32Gi"
    gpu: int = Field(default=0, ge=0)
    gpu_type: str | None = None
    """What `accelerator` labels call it, e.g. H100; the key of its price."""
    node_selector: dict[str, str] = {}
    """Labels of the nodes that its pods may go to, e.g. `cloud.google.com/gke-accelerator: nvidia-h100-80gb`."""
    spot: bool = False
    """Machines that may be taken away: a notice makes a checkpoint, and the run goes on without them."""
    spot_key: str = "graftwork.dev/spot"
    """Taint and label of such nodes."""

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.max_count is not None and self.max_count < max(self.count, 1):
            raise ValueError(f"max_count={self.max_count} is less than count={self.count}")
        return self


class StorageSpec(Spec):
    """The store that head and workers reach. The credentials are a Secret's, never a value here."""

    uri: str | None = None
    """Replaces `root` of the jobs' specs, e.g. s3://bucket/team-a."""
    endpoint: str | None = None
    """Of an S3 that is not Amazon's, e.g. https://minio.storage:9000."""
    region: str = "us-east-1"
    secret: str | None = None
    """Kubernetes Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; null where the pods have an identity."""
    claim: str | None = None
    """PersistentVolumeClaim that head and workers mount at the store's path: for a store that is a shared folder."""


class AuthSpec(Spec):
    """Who may speak to the Ray of a job."""

    mode: Literal["token", "disabled"] = "token"
    secret: str | None = None
    """Kubernetes Secret with the key `auth_token`; null: the operator makes one a cluster."""


class JobLimits(Spec):
    """What stops a job cleanly, with a checkpoint. Null: nothing does."""

    deadline: Seconds | None = None
    """Longest time from the start of its driver, e.g. 12h."""
    pending: Seconds = 900.0
    """Longest time before its driver starts."""
    budget_usd: float | None = Field(default=None, gt=0)
    """Most that it may cost, by `prices`."""


class RetrySpec(Spec):
    """When a job is started again by itself. It goes on from its last checkpoint."""

    max_attempts: int = Field(default=1, ge=1, le=20)
    on: tuple[Literal["lost", "preempted", "oom", "failed"], ...] = ("lost", "preempted")


class PriceTable(Spec):
    """US dollars, for plans and budgets."""

    cpu_hour: float = Field(default=0.0, ge=0)
    gpu_hour: dict[str, float] = {}
    """By `gpu_type`, or `default`."""
    spot_factor: float = Field(default=1.0, gt=0, le=1)
    """What a spot machine costs of the price."""


class GcsSpec(Spec):
    """Whether the head's state outlives the head."""

    backend: Literal["none", "redis", "rocksdb"] = "none"
    redis_address: str | None = None
    redis_secret: str | None = None
    """Kubernetes Secret with the key `password`."""

    @model_validator(mode="after")
    def _redis(self) -> Self:
        if (self.backend == "redis") != (self.redis_address is not None):
            raise ValueError("redis_address is given with backend: redis, and only with it")
        return self


class ClusterSpec(Spec):
    """Machines, object store, limits and prices of a target: `--cluster-config FILE`, or ./cluster.yaml if present."""

    kind: Literal["cluster"] = "cluster"
    image: str | None = None
    """Image of head and workers, by digest: registry/app@sha256:... . KubeRay needs one."""
    image_pull_secret: str | None = None
    ray_version: str = "2.60.0"
    code: Literal["wheel", "image"] = "wheel"
    """wheel: this machine's graftwork goes along, named by its content; image: the one in the image runs."""
    storage: StorageSpec = StorageSpec()
    auth: AuthSpec = AuthSpec()
    head: HeadSpec = HeadSpec()
    workers: tuple[WorkerSpec, ...] = (WorkerSpec(),)
    limits: JobLimits = JobLimits()
    retry: RetrySpec = RetrySpec()
    prices: PriceTable | None = None
    gcs: GcsSpec = GcsSpec()
    queue: str | None = None
    """Kueue's LocalQueue."""
    priority: str | None = None
    """Priority class: Kueue's where there is a queue, else Kubernetes'."""
    gang: Literal["none", "volcano", "kai", "yunikorn"] = "none"
    """Scheduler that places all pods of a job or none."""
    gang_queue: str | None = None
    """Queue of that scheduler."""
    service_account: str = "graftwork"
    secret_env: dict[str, str] = {}
    """Environment variables of head and workers from Secrets: NAME: SECRET/KEY. Values are never written anywhere."""
    env: dict[str, str] = {}
    """Plain environment variables. One that looks like a secret is refused."""
    labels: dict[str, str] = {}
    ttl_s: float = Field(default=30.0, ge=0)
    """Seconds that the pods of a RayJob stay after the job ends, GPUs included (`ttlSecondsAfterFinished`). Its record
    and its log stay in the store."""

    @property
    def cpus(self) -> float:
        """CPUs of the head and of `count` machines of each group."""
        return quantity(self.head.cpu) + sum(group.count * quantity(group.cpu) for group in self.workers)

    @property
    def memory_bytes(self) -> float:
        """Memory of the head and of `count` machines of each group."""
        return quantity(self.head.memory) + sum(group.count * quantity(group.memory) for group in self.workers)

    @property
    def gpus(self) -> float:
        """GPUs of `count` machines of each group."""
        return float(sum(group.count * group.gpu for group in self.workers))

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [group.name for group in self.workers]
        if len(set(names)) != len(names):
            raise ValueError(f"two worker groups have one name: {', '.join(names)}")
        return self
