"""Evaluation in a worker, before the first step and after the last: continuations are scored, answers generated.

Legend: B rows, T tokens, N scored positions, V vocabulary.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graftwork.base.load import ResolvedBase, load, resolve
from graftwork.base.load import template as base_template
from graftwork.config import canonical_json
from graftwork.planning.memory import BATCH_ROWS, BATCH_TOKENS
from graftwork.prompts.template import Template
from graftwork.quantization import import_bitsandbytes
from graftwork.storage.store import Store
from graftwork.training.adapters.attach import attach, load_adapter_weights
from graftwork.training.checkpoint import Checkpoints
from graftwork.training.evaluation.report import write_part
from graftwork.training.evaluation.spec import Item, ItemGroup, ItemOutput, shares
from graftwork.training.objectives.rows import IGNORED
from graftwork.training.objectives.trainer import greedy, trained_logits
from graftwork.training.worker_messages import TrainJob, all_gather_object, rank_and_world

# `before` is the base without any adapter, measured as it was loaded. It depends on base, precision and questions alone
# and is shared by all runs of a root: <root>/outcomes/<key>.json. `after` ends in the run's outcomes.json.


@dataclass(frozen=True)
class Measuring:
    """The parts of a job, measured on this rank. Every rank calls the same methods in the same order."""

    job: TrainJob
    base: ResolvedBase

    def before(self, model: Any) -> None:
        """Measure the base as it was loaded, where no run has done so."""
        for part in self.job.parts:
            store, key = self._items_place(part)
            if not all_gather_object(store.exists(*key))[0]:  # on other machines a store may not show it yet
                said = self._gather_outputs(model, part)
                if rank_and_world()[0] == 0:
                    store.write_json([one.as_dict() for one in said], *key)

    def after(self, model: Any) -> None:
        """Measure the trained model and put both together in the run's record."""
        for part in self.job.parts:
            said = self._gather_outputs(model, part)
            if rank_and_world()[0] == 0:
                assert self.job.run is not None, "trials measure nothing"
                store, key = self._items_place(part)
                before = [ItemOutput.from_dict(one) for one in store.read_json(*key)]
                write_part(self.job.run, part, before, said)

    def _items_place(self, part: ItemGroup) -> tuple[Store, tuple[str, str]]:
        """The store, and the key of the bare base's outputs in it."""
        assert self.job.run is not None, "trials measure nothing"
        device = "cuda" if self.job.spec.gpus else "cpu"
        quant = self.job.spec.quant.model_dump(mode="json", exclude={"resident"})
        what = {"base": self.base.digest, "quant": quant, "part": part.digest(), "device": device}
        digest = hashlib.sha256(canonical_json(what).encode()).hexdigest()[:32]
        return self.job.run.store, ("outcomes", f"{digest}.json")

    def _gather_outputs(self, model: Any, part: ItemGroup) -> list[ItemOutput]:
        """The model's outputs for all items; each rank computes its share."""
        places = shares(part.items, *rank_and_world())
        mine = list(zip(places, answers(model, part, places, base_template(self.base)), strict=True))
        everyone = [one for share in all_gather_object(mine) for one in share]
        return [said for _, said in sorted(everyone, key=lambda one: one[0])]


def measure_finished(job: TrainJob, step: int, device: str) -> None:
    """Measure the outcomes that a run lacks, from its last checkpoint: nothing is trained. On every rank."""
    assert job.run is not None, "trials measure nothing"
    spec = job.spec
    import_bitsandbytes()
    torch.set_num_threads(max(1, int(spec.cpus_per_worker)))
    base = resolve(spec.base)
    loaded = load(base, spec.quant, device=device, purpose="train")
    outcomes = Measuring(job, base)
    outcomes.before(loaded.model)
    with Checkpoints(job.run).model_files(step) as folder:
        if spec.adapter.trains_base:
            model = type(loaded.model).from_pretrained(folder, dtype=torch.float32).to(device)
        else:
            model = attach(loaded.model, spec.adapter)
            load_adapter_weights(model, folder)
    outcomes.after(model)


@torch.no_grad()
def answers(model: Any, part: ItemGroup, places: Sequence[int], template: Template) -> list[ItemOutput]:
    """The model's outputs for the items at `places`, in that order. Leaves the model in the mode it was in."""
    items = [part.items[at] for at in places]
    training = model.training
    model.eval()
    try:
        logprobs = _continuation_logprobs(model, items, part.pad_id)
        texts = _write_answers(model, items, part, template)
    finally:
        model.train(training)
    return [ItemOutput(tuple(logprobs[at]), texts[at]) for at in range(len(items))]


def _continuation_logprobs(model: Any, items: Sequence[Item], pad_id: int) -> list[list[float]]:
    """Log-probability of each continuation of each item."""
    rows = [(item.prompt, one) for item in items for one in item.continuations]
    found = [0.0] * len(rows)
    for batch in _batches([len(prompt) + len(one) for prompt, one in rows]):
        for n, value in zip(batch, _sum_logprobs(model, [rows[n] for n in batch], pad_id), strict=True):
            found[n] = value
    values = iter(found)
    return [[next(values) for _ in item.continuations] for item in items]


def _sum_logprobs(model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int) -> list[float]:
    """Summed log-probability of each row's continuation behind its prompt."""
    width = max(len(prompt) + len(one) for prompt, one in rows)
    ids_BT = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask_BT, labels_BT = torch.zeros_like(ids_BT), torch.full_like(ids_BT, IGNORED)
    for place, (prompt, one) in enumerate(rows):
        end = len(prompt) + len(one)
        ids_BT[place, :end] = torch.tensor([*prompt, *one])
        mask_BT[place, :end] = 1
        labels_BT[place, len(prompt) : end] = torch.tensor([*one])
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT}
    inputs = {key: value.to(model.device) for key, value in inputs.items()}
    logits_NV, targets_N = trained_logits(model, model.get_output_embeddings(), inputs)
    nats_N = torch.nn.functional.cross_entropy(logits_NV.float(), targets_N, reduction="none").double()
    return [-float(part.sum()) for part in nats_N.split([len(one) for _, one in rows])]


def _write_answers(model: Any, items: Sequence[Item], part: ItemGroup, template: Template) -> list[str]:
    """Greedy answer of each item, without the token that ended it."""
    texts = [""] * len(items)
    asked = [at for at, item in enumerate(items) if item.write]
    for batch in _batches([len(items[at].prompt) + items[at].write for at in asked]):
        places = [asked[n] for n in batch]
        prompts, most = [items[at].prompt for at in places], max(items[at].write for at in places)
        for at, ids in zip(places, greedy(model, prompts, part.stop_ids, part.pad_id, most), strict=True):
            ids = ids[: items[at].write]
            end = next((place for place, token in enumerate(ids) if token in part.stop_ids), len(ids))
            texts[at] = template.decode(ids[:end]).strip()
    return texts


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Places of rows of similar length, so many as `BATCH_TOKENS` and `BATCH_ROWS` hold."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        if batch and (len(batch) == BATCH_ROWS or (len(batch) + 1) * lengths[batch[0]] > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
