"""Before and after, on the ranks that train: the work is shared, rank 0 writes.

`before` is the base without any adapter, measured as it was loaded. It depends on base, precision and questions alone,
so it is kept in the root and shared by all runs: <root>/outcomes/<key>.json. `after` ends in the run's outcomes.json.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from graftwork import base_model
from graftwork.base_model import ResolvedBase
from graftwork.config import canonical_json
from graftwork.storage import Store
from graftwork.training.adapter_spec import FullSpec
from graftwork.training.adapters.attach import attach, load_adapter_weights
from graftwork.training.checkpoint import Checkpoints
from graftwork.training.job import TrainJob
from graftwork.training.outcomes import record
from graftwork.training.outcomes.parts import ItemGroup, ItemOutput, shares
from graftwork.training.outcomes.weigh import answers


@dataclass(frozen=True)
class Measuring:
    """The parts of a job, measured on this rank. Every rank calls the same methods in the same order."""

    job: TrainJob
    base: ResolvedBase
    rank: int
    world: int

    def before(self, model: Any) -> None:
        """Measure the base as it was loaded, where no run has done so."""
        for part in self.job.parts:
            if not self._from_rank_0(record.knows_before(self._store, self._key(part))):
                said = self._shared(model, part)
                if self.rank == 0:
                    record.write_before(self._store, self._key(part), said)

    def after(self, model: Any) -> None:
        """Measure the trained model and put both together in the run's record."""
        for part in self.job.parts:
            said = self._shared(model, part)
            if self.rank == 0:
                assert self.job.run is not None, "trials measure nothing"
                before = record.read_before(self._store, self._key(part))
                record.write_part(self.job.run, part, before, said)

    @property
    def _store(self) -> Store:
        assert self.job.run is not None, "trials measure nothing"
        return self.job.run.store

    def _key(self, part: ItemGroup) -> str:
        device = "cuda" if self.job.spec.gpus else "cpu"
        quant = self.job.spec.quant.model_dump(mode="json", exclude={"resident"})
        what = {"base": self.base.digest, "quant": quant, "part": part.digest(), "device": device}
        return hashlib.sha256(canonical_json(what).encode()).hexdigest()[:32]

    def _shared(self, model: Any, part: ItemGroup) -> list[ItemOutput]:
        """What the model says to all items; each rank asks its share."""
        places = shares(part.items, self.rank, self.world)
        mine = list(zip(places, answers(model, part, places, base_model.template(self.base)), strict=True))
        everyone: Sequence[list[tuple[int, ItemOutput]]] = [mine]
        if self.world > 1:
            gathered: list[list[tuple[int, ItemOutput]]] = [[] for _ in range(self.world)]
            dist.all_gather_object(gathered, mine)
            everyone = gathered
        return [said for _, said in sorted((one for share in everyone for one in share), key=lambda one: one[0])]

    def _from_rank_0(self, found: bool) -> bool:
        """What rank 0 found: on other machines a store may not show it yet."""
        told = [found]
        if self.world > 1:
            dist.broadcast_object_list(told, src=0)
        return told[0]


def measure_finished(job: TrainJob, step: int, device: str, rank: int, world: int) -> None:
    """Measure the outcomes that a run lacks, from its last checkpoint: nothing is trained. On every rank."""
    assert job.run is not None, "trials measure nothing"
    spec = job.spec
    base_model.import_bitsandbytes()
    torch.set_num_threads(max(1, int(spec.cpus_per_worker)))
    base = base_model.resolve(spec.base)
    loaded = base_model.load(base, spec.quant, device=device, purpose="train")
    outcomes = Measuring(job, base, rank, world)
    outcomes.before(loaded.model)
    with Checkpoints(job.run).adapter(step) as folder:
        if isinstance(spec.adapter, FullSpec):
            model = type(loaded.model).from_pretrained(folder, dtype=torch.float32).to(device)
        else:
            model = attach(loaded.model, spec.adapter)
            load_adapter_weights(model, folder)
    outcomes.after(model)
