"""Record of an experiment in the store (`experiments/<id>/state.json`), from which a restarted endpoint continues.

One process writes it: the ingress. A change is written before it takes effect.
"""

import hashlib
import logging
import time
from collections.abc import Mapping
from typing import Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict

from graftwork.config import canonical_json
from graftwork.serving.ab_test.assignment import Range, first_ranges
from graftwork.serving.ab_test.spec import ExperimentSpec, identity_of
from graftwork.serving.spec import ArmSpec
from graftwork.storage.store import Store

log = logging.getLogger("ray.serve")
FOLDER, FILE = "experiments", "state.json"
Status = Literal["running", "killed", "stopped", "stale"]


class Cut(BaseModel):
    """An arm that was taken out, by whom, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    arm: str
    at: float
    why: str


class ExperimentRecord(BaseModel):
    """One experiment. Replaced whole at each change."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    """Name, and the first 8 hex digits of the digest of all that must not change."""
    spec: ExperimentSpec
    arms: dict[str, ArmSpec]
    """As they are asked, each adapter pinned to a version."""
    base_digest: str
    weights: dict[str, float]
    ranges: tuple[Range, ...]
    status: Status = "running"
    started_at: float
    """Unix seconds."""
    ramp_steps: int = 0
    """Steps of the spec's ramp that hold already."""
    cuts: tuple[Cut, ...] = ()

    def changed(self, **changes: Any) -> "ExperimentRecord":
        """A copy with these fields replaced."""
        return self.model_copy(update=changes)

    @property
    def cut_arms(self) -> frozenset[str]:
        """Arms that take part no more."""
        return frozenset(cut.arm for cut in self.cuts)

    @property
    def log(self) -> tuple[Store | None, tuple[str, ...]]:
        """Location of its rows: a store (None: the endpoint's own) and the folder in it."""
        own = self.spec.log is None
        return (None if own else Store(str(self.spec.log))), ((FOLDER, self.id, "log") if own else (self.id,))


def new_record(spec: ExperimentSpec, arms: Mapping[str, ArmSpec], base_digest: str) -> ExperimentRecord:
    """The record of an experiment that starts now."""
    whole = {
        "spec": identity_of(spec),
        "base": base_digest,
        "arms": {name: arm.model_dump(mode="json") for name, arm in arms.items()},
    }
    digest = hashlib.sha256(canonical_json(whole).encode()).hexdigest()
    return ExperimentRecord(
        id=f"{spec.name}-{digest[:8]}",
        spec=spec,
        arms=dict(arms),
        base_digest=base_digest,
        weights=spec.weights,
        ranges=first_ranges(spec.weights),
        started_at=time.time(),
    )


class Records:
    """The records of one store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def save(self, record: ExperimentRecord) -> None:
        """Replaces the record atomically."""
        self.store.write_json(record.model_dump(mode="json"), FOLDER, record.id, FILE)

    def load_all(self) -> list[ExperimentRecord]:
        """Every experiment, oldest first. One that can't be read is left out, and said: the others go on."""
        found = [self._load(name) for name in self.store.list(FOLDER)]
        return sorted((record for record in found if record is not None), key=lambda record: record.started_at)

    def _load(self, name: str) -> ExperimentRecord | None:
        data = self.store.find_bytes(FOLDER, name, FILE)
        try:
            return ExperimentRecord.model_validate_json(data) if data is not None else None
        except pydantic.ValidationError as error:
            log.warning(
                "experiment %s is not gone on with: %s is damaged (%s)",
                name,
                self.store.path(FOLDER, name, FILE),
                error.errors()[0]["msg"],
            )
            return None
