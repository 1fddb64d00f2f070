"""Conversations: rendered by `chat.render`, retrieved passages among them where `data.context` asks for them."""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from trl import SFTConfig, SFTTrainer

from graftwork import retrieval
from graftwork.config import canonical_json
from graftwork.datasets import rows as data
from graftwork.datasets.row_keys import KeyCheck
from graftwork.datasets.rows import DatasetRow
from graftwork.prompts import render as chat
from graftwork.prompts.render import Passage, Prompt
from graftwork.prompts.template import Template
from graftwork.training.objectives.row_cache import Rows, RowWriter, kept_rows
from graftwork.training.objectives.rows import (
    AnsweredRows,
    PackedRows,
    Part,
    ReadPart,
    answered,
    groups_of,
    noted,
    nothing_left,
    pack_rows,
    read_prompt,
    too_long,
)
from graftwork.training.objectives.spec import SftSpec
from graftwork.training.objectives.trainer import (
    BuiltTrainer,
    TrainerContext,
    arguments,
    held_out_answers,
    require_apart,
    share,
    strip_callbacks,
    trained_logits,
    without_history,
)
from graftwork.training.spec import TrainSpec

# TRL's SFTTrainer, fed with rows that are already tokenised.
#
# Measured on the 135M base (nf4, LoRA r16 on all linear layers, 2 workers of 1 thread, rows of about 90 tokens, CPU
# seconds a step): SFTTrainer as it comes 12.5; with adapters kept in fp32 7.2; scoring trained positions alone as well
# 4.9; a bare PyTorch loop doing the same 4.8.


class MaskedSftTrainer(without_history(SFTTrainer)):  # type: ignore[misc]  # trl has no types
    """SFTTrainer that, on a CPU, sends only trained positions through the output head.

    TRL 1.16 scores every position on devices without Triton (`compact` in trl/trainer/utils.py add_fused_lm_head) and
    scores them again in the backward pass: with a 49k vocabulary and half of the tokens trained a quarter of the step.
    On CUDA TRL's own fused head is used.
    """

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Summed loss over the step's trained tokens, times the number of processes because DDP averages gradients."""
        head = self.model.get_output_embeddings()
        fused = inputs["labels"].is_cuda and isinstance(head, torch.nn.Linear)  # not with trained rows in it
        if fused or return_outputs or self.aux_loss_enabled:  # TRL adds the router's loss of a base with experts
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        logits_NV, targets_N = trained_logits(model, head, inputs)
        total = torch.nn.functional.cross_entropy(logits_NV.float(), targets_N, reduction="sum")
        trained = targets_N.numel() if num_items_in_batch is None else num_items_in_batch
        return total / trained * (self.accelerator.num_processes if num_items_in_batch is not None else 1)


def trainer_on(setting: TrainerContext, kind: type[Any], tokenizer: Any) -> Any:
    """A trainer of that class, of SFTTrainer's kind, that takes the setting's rows as they are."""
    return kind(
        model=setting.model,
        args=SFTConfig(
            **arguments(setting), packing=False, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}
        ),
        train_dataset=setting.dataset(),
        data_collator=setting.collate,
        processing_class=tokenizer,
        callbacks=[setting.callback],
    )


def build(setting: TrainerContext) -> BuiltTrainer:
    """Supervised finetuning on the setting's rows, and the mean loss of the held-out ones."""
    tokenizer = setting.tokenizer()
    if isinstance(setting.job.data.train, PackedRows):
        require_apart(setting.model)
    trainer = trainer_on(setting, MaskedSftTrainer, tokenizer)
    data, micro_batch, objective = setting.job.data, setting.plan.micro_batch, setting.job.spec.objective
    answers = objective.answers if isinstance(objective, SftSpec) else None

    def evaluate() -> Mapping[str, float]:
        assert data.eval is not None, "asked where the spec has data.eval"
        loss = {"loss": held_out_loss(trainer, data.eval, data.pad_id, micro_batch)}
        if answers is None:
            return loss
        assert isinstance(data.eval, AnsweredRows), "what rows.sft gives where answers are asked for"
        return {**loss, **held_out_answers(trainer, data.eval, tokenizer, data.pad_id, answers.max_new_tokens)}

    return BuiltTrainer(strip_callbacks(trainer), evaluate, evaluate_first=answers is not None)


@torch.no_grad()
def held_out_loss(trainer: Any, rows: Rows, pad_id: int, micro_batch: int) -> float:
    """Mean loss in nats over the trained tokens of all rows; each process scores its share. Called on all ranks."""
    model, accelerator = trainer.model, trainer.accelerator
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    model.eval()
    for batch in share(rows.lengths_N, micro_batch, accelerator.process_index, accelerator.num_processes):
        inputs = {key: value.to(accelerator.device) for key, value in rows.collate(batch, pad_id).items()}
        with accelerator.autocast():
            logits_NV, targets_N = trained_logits(model, model.get_output_embeddings(), inputs)
        sums[0] += torch.nn.functional.cross_entropy(logits_NV.float(), targets_N, reduction="sum").double()
        sums[1] += targets_N.numel()
    model.train()
    total, tokens = accelerator.reduce(sums, reduction="sum").tolist()
    return float(total / tokens)


FORM = 2
"""Counted up when the same rows are rendered otherwise than before."""

Context = Callable[[DatasetRow], tuple[Passage, ...]]


def read(spec: TrainSpec, template: Template, part: Part) -> ReadPart:
    """The rows that fit, as ids and loss masks. Raises DataError, StorageError.

    All rows are read and checked each time; they are rendered once, until something changes that decides the outcome.
    """
    uri, limit = (spec.data.train, spec.data.train_rows) if part == "train" else (spec.data.eval, spec.data.eval_rows)
    assert isinstance(spec.objective, SftSpec)
    assert uri is not None, "asked for a part that the spec has"

    answers = spec.objective.answers if part == "eval" else None
    by = answers.by if answers is not None else ()

    def rows() -> Iterator[DatasetRow]:
        return data.iter_rows(uri, limit=limit, need="train", keys=data.key_check("train", by))

    keys, contents = data.key_check("train", by), array("q")
    checked = data.iter_rows(uri, limit=limit, need="train", keys=keys)
    fingerprint = data.fingerprint(noted(checked, contents))
    prompt, shots = read_prompt(spec, part)
    warnings = (*keys.note(f"data.{part}"), *shots)
    seed = spec.seed if part == "train" else spec.seed + 1

    def render(writer: RowWriter) -> dict[str, Any]:
        context = retrieval.training_context(spec.data.context, seed) if spec.data.context else _no_context
        return _render(spec, template, prompt, rows(), context, writer)

    passages = data.passage_keys()
    found, about = kept_rows(_key(spec, template, prompt, fingerprint, seed, passages), render)
    warnings += passages.note("data.context.corpus") if part == "train" else ()
    if about["too_long"] and spec.on_overlong == "refuse":
        raise too_long(spec, part, *about["too_long"][0])
    if not len(found):
        raise nothing_left(spec, part, about["dropped"])
    notes = _notes(about["left_out"], spec)
    if answers is not None:
        names = answers.by
        groups = groups_of(data.read_fields(uri, names, limit=limit), about["numbers"]) if names else ()
        return ReadPart(answered(found, groups), about["dropped"], fingerprint, notes, (), warnings, contents)
    packs, packing = pack_rows(found, spec.objective.packing, spec.max_length)
    return ReadPart(packs, about["dropped"], fingerprint, (*notes, *packing), (), warnings, contents)


def _render(
    spec: TrainSpec, template: Template, prompt: Prompt, rows: Iterable[DatasetRow], context: Context, writer: RowWriter
) -> dict[str, Any]:
    """Every row that fits to the writer, and what was left out: `too_long` names the first as (number, id, tokens).

    Where answers are generated, `numbers` says of which of the rows (from 1) each written one is.
    """
    room = spec.data.context.context_tokens if spec.data.context else None
    left_out, dropped = 0, 0
    first: list[tuple[int, str, int]] = []
    numbers: list[int] = []
    for number, row in enumerate(rows, start=1):
        passages, without = chat.fit_passages(context(row), template, prompt, room)
        left_out += len(without)
        for messages in chat.training_rows(row.messages, template):
            rendered = chat.render(messages, template, prompt=prompt, context=passages, generate=False)
            if len(rendered.ids) <= spec.max_length:
                writer.add(rendered.ids, rendered.loss_mask)
                numbers += [number] if _numbered(spec) else []
                continue
            dropped += 1
            first = first or [(number, row.id, len(rendered.ids))]
    return {"dropped": dropped, "left_out": left_out, "too_long": first, "numbers": numbers}


def _numbered(spec: TrainSpec) -> bool:
    return isinstance(spec.objective, SftSpec) and spec.objective.answers is not None


def _key(spec: TrainSpec, template: Template, prompt: Prompt, fingerprint: str, seed: int, keys: KeyCheck) -> str:
    """32 hex digits over everything that decides the rendered rows. keys: counts ignored keys of the corpus."""
    context = None
    if spec.data.context is not None:
        passages = [asdict(passage) for passage in data.read_passages(spec.data.context.corpus, keys)]
        chosen = spec.data.context.model_dump(mode="json", exclude={"corpus"})
        context = {**chosen, "seed": seed, "corpus": hashlib.sha256(canonical_json(passages).encode()).hexdigest()}
    decides = {
        "form": FORM,
        "rows": fingerprint,
        "template": template.digest,
        "tokenizer": template.tokenizer_digest,
        "date": str(template.date),
        "prompt": asdict(prompt),
        "max_length": spec.max_length,
        "context": context,
        "numbered": _numbered(spec),
    }
    return hashlib.sha256(canonical_json(decides).encode()).hexdigest()[:32]


def _no_context(_: DatasetRow) -> tuple[Passage, ...]:
    return ()


def _notes(left_out: int, spec: TrainSpec) -> tuple[str, ...]:
    if not left_out or spec.data.context is None:
        return ()
    room = spec.data.context.context_tokens
    return (f"{left_out} passages left out (no room in data.context.context_tokens={room})",)
