"""Evaluation in a worker, before the first step and after the last: continuations are scored, answers generated.

Legend: B rows, T tokens, N scored positions, V vocabulary.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from graftwork.base import load as base_model
from graftwork.base.load import ResolvedBase
from graftwork.config import canonical_json
from graftwork.planning.memory import BATCH_ROWS, BATCH_TOKENS
from graftwork.prompts.template import Template
from graftwork.quantization import import_bitsandbytes
from graftwork.storage.store import Store
from graftwork.training.adapters.attach import attach, load_adapter_weights
from graftwork.training.checkpoint import Checkpoints
from graftwork.training.evaluation import report as record
from graftwork.training.evaluation.spec import Item, ItemGroup, ItemOutput, shares
from graftwork.training.objectives.row_cache import IGNORED
from graftwork.training.objectives.trainer import trained_logits
from graftwork.training.worker_messages import StepReport, TrainJob

BEFORE, AFTER = "before_", "eval_"
_GROUP = re.compile(r"(?P<name>\w+)\[(?P<row>[^,]*)(, (?P<cell>.*))?\]")
"""A figure of a group of rows: `exact_match[length=512, depth=50]`."""


def before_after(steps: Sequence[StepReport]) -> tuple[str, ...]:
    """A line a figure that the first step notes as `before_NAME` and the last as `eval_NAME`.

    Groups stand in a table: a line for each value of their first field.
    """
    if not steps:
        return ()
    before = {key.removeprefix(BEFORE): value for key, value in steps[0].metrics.items() if key.startswith(BEFORE)}
    after = {key.removeprefix(AFTER): value for key, value in steps[-1].metrics.items() if key.startswith(AFTER)}
    if steps[-1].eval_loss is not None:
        after["loss"] = steps[-1].eval_loss
    both = {name: (value, after[name]) for name, value in before.items() if name in after}
    whole = [
        f"held-out {name.replace('_', ' ')}: {was:.4g} before, {now:.4g} after"
        for name, (was, now) in both.items()
        if not _GROUP.fullmatch(name)
    ]
    return tuple(whole + _table(both))


def _table(both: Mapping[str, tuple[float, float]]) -> list[str]:
    rows: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for key, (was, now) in both.items():
        if found := _GROUP.fullmatch(key):
            cells = rows.setdefault((found["name"], found["row"]), [])
            cells.append((found["cell"] or "", f"{was:.2g} to {now:.2g}"))
    return [
        f"held-out {name.replace('_', ' ')}, {row}: "
        + ", ".join(
            f"{cell} {change}".strip() for cell, change in sorted(rows[name, row], key=lambda c: _natural(c[0]))
        )
        for name, row in sorted(rows, key=lambda key: _natural(" ".join(key)))
    ]


def _natural(text: str) -> list[tuple[int, str]]:
    """Sorts 512 before 1024."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", text)]


# `before` is the base without any adapter, measured as it was loaded. It depends on base, precision and questions
# alone,
# so it is kept in the root and shared by all runs: <root>/outcomes/<key>.json. `after` ends in the run's outcomes.json.


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
    import_bitsandbytes()
    torch.set_num_threads(max(1, int(spec.cpus_per_worker)))
    base = base_model.resolve(spec.base)
    loaded = base_model.load(base, spec.quant, device=device, purpose="train")
    outcomes = Measuring(job, base, rank, world)
    outcomes.before(loaded.model)
    with Checkpoints(job.run).adapter(step) as folder:
        if spec.adapter.trains_base:
            model = type(loaded.model).from_pretrained(folder, dtype=torch.float32).to(device)
        else:
            model = attach(loaded.model, spec.adapter)
            load_adapter_weights(model, folder)
    outcomes.after(model)


@torch.no_grad()
def answers(model: Any, part: ItemGroup, places: Sequence[int], template: Template) -> list[ItemOutput]:
    """What the model says to the items at `places`, in that order. Leaves the model in the mode it was in."""
    items = [part.items[at] for at in places]
    training = model.training
    model.eval()
    try:
        logprobs = _weighed(model, items, part.pad_id)
        texts = _written(model, items, part, template)
    finally:
        model.train(training)
    return [ItemOutput(tuple(logprobs[at]), texts[at]) for at in range(len(items))]


def _weighed(model: Any, items: Sequence[Item], pad_id: int) -> list[list[float]]:
    """Log-probability of each continuation of each item."""
    rows = [(at, item.prompt, one) for at, item in enumerate(items) for one in item.continuations]
    found = [0.0] * len(rows)
    for batch in _batches([len(prompt) + len(one) for _, prompt, one in rows]):
        sums = _sums(model, [(rows[n][1], rows[n][2]) for n in batch], pad_id)
        for n, value in zip(batch, sums, strict=True):
            found[n] = value
    told: list[list[float]] = [[] for _ in items]
    for (at, _, _), value in zip(rows, found, strict=True):
        told[at].append(value)
    return told


def _sums(model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int) -> list[float]:
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


def _written(model: Any, items: Sequence[Item], part: ItemGroup, template: Template) -> list[str]:
    texts = [""] * len(items)
    asked = [at for at, item in enumerate(items) if item.write]
    for batch in _batches([len(items[at].prompt) + items[at].write for at in asked]):
        places = [asked[n] for n in batch]
        written = _generated(model, [items[at] for at in places], part)
        for at, ids in zip(places, written, strict=True):
            texts[at] = template.decode(ids).strip()
    return texts


def _generated(model: Any, items: Sequence[Item], part: ItemGroup) -> list[list[int]]:
    """Greedy ids of each item's answer, the token that ended it left out."""
    from transformers import GenerationConfig

    width, most = max(len(item.prompt) for item in items), max(item.write for item in items)
    ids_BT = torch.full((len(items), width), part.pad_id, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for place, item in enumerate(items):
        ids_BT[place, width - len(item.prompt) :] = torch.tensor([*item.prompt])
        mask_BT[place, width - len(item.prompt) :] = 1
    greedy = GenerationConfig(
        max_new_tokens=most, do_sample=False, use_cache=True, eos_token_id=list(part.stop_ids), pad_token_id=part.pad_id
    )
    out_BT = model.generate(
        input_ids=ids_BT.to(model.device), attention_mask=mask_BT.to(model.device), generation_config=greedy
    )
    return [
        _until_stop(row[: item.write], part.stop_ids)
        for row, item in zip(out_BT[:, width:].tolist(), items, strict=True)
    ]


def _until_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    return ids[: next((at for at, token in enumerate(ids) if token in stop_ids), len(ids))]


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
