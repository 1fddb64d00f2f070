"""Supervised finetuning on conversations, rendered once with their retrieved passages: spec, rows and trainer."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from graftwork import retrieval
from graftwork.config import Spec, canonical_json
from graftwork.datasets.rows import (
    DatasetRow,
    iter_rows,
    key_check,
    passage_keys,
    prompt_content,
    read_fields,
    read_passages,
    render_row,
)
from graftwork.datasets.rows import fingerprint as data_fingerprint
from graftwork.errors import DataError
from graftwork.prompts.render import Prompt, fit_passages
from graftwork.training.objectives.protocol import (
    Packing,
    Part,
    Rows,
    Traits,
    check_generates,
    nothing_left,
    passages_left_out,
    too_long,
)
from graftwork.training.objectives.rows import (
    AnsweredRows,
    PackedRows,
    ReadPart,
    RowWriter,
    answered,
    cached_rows,
    check_packing,
    data_of,
    groups_of,
    noted,
    pack_rows,
    read_prompt,
)

if TYPE_CHECKING:
    from graftwork.datasets.keys import KeyCheck
    from graftwork.prompts.template import Template
    from graftwork.training.objectives.trainer import BuiltTrainer, TrainerContext
    from graftwork.training.spec import TrainSpec

FORM = 4
"""Version of the rendered rows; raised when the same rows are rendered differently."""


class AnswersSpec(Spec):
    """Held-out answers are generated too, greedily, and counted where they are the row's answer to the letter."""

    by: tuple[str, ...] = ()
    """Fields of the rows that part them into groups, each with a share of its own: `[length, depth]`."""
    max_new_tokens: int = Field(default=32, ge=1)
    """Most tokens generated for an answer."""


class SftSpec(Spec):
    """Supervised finetuning: the loss falls on the assistant's turns, by the mask of `graftwork.prompts.render`."""

    kind: Literal["sft"] = "sft"
    packing: Packing = "none"
    """best_fit: several whole conversations a row, none sees another. No padding, so fewer tokens to compute."""
    answers: AnswersSpec | None = None
    """Generate the answers of held-out rows as well, before the first step and at each evaluation."""

    @property
    def traits(self) -> Traits:
        return Traits(packing=self.packing)

    def check(self, run: TrainSpec) -> None:
        check_packing(run, self.packing)
        if self.answers is None:
            return
        if run.data.eval is None:
            raise ValueError("objective.answers is set but data.eval is not given, so it cannot take effect")
        check_generates(run, "objective.answers")
        if run.data.thinking == "mask":
            raise ValueError(
                "objective.answers can't be combined with data.thinking=mask: it would be part of the prompt "
                "of the generated answer. Set data.thinking=keep or drop"
            )

    def read(self, spec: TrainSpec, template: Template, part: Part) -> ReadPart:
        """The rows that fit, as ids and loss masks. Raises DataError, StorageError.

        All rows are read and checked each time; they are rendered once, until something
        changes that decides the outcome.
        """
        source, limit = data_of(spec, part)
        answers = self.answers if part == "eval" else None
        names = answers.by if answers is not None else ()

        keys, contents = key_check("train", names), array("q")
        checked = iter_rows(source, limit=limit, need="train", keys=keys)
        fingerprint = data_fingerprint(noted(checked, contents))
        prompt, shots = read_prompt(spec, part)
        warnings = (*keys.note(f"data.{part}"), *shots)
        seed = spec.seed if part == "train" else spec.seed + 1

        def fill(writer: RowWriter) -> dict[str, Any]:
            rows = iter_rows(source, limit=limit, need="train", keys=key_check("train", names))
            return self._render(spec, template, prompt, rows, seed, writer)

        passages = passage_keys()
        found, about = cached_rows(self._key(spec, template, prompt, fingerprint, seed, passages), fill)
        warnings += passages.note("data.context.corpus") if part == "train" else ()
        if about["too_long"] and spec.on_overlong == "refuse":
            raise too_long(spec, part, *about["too_long"][0])
        if not len(found):
            raise nothing_left(spec, part, about["dropped"])
        notes = passages_left_out(spec, about["left_out"]) if about["left_out"] else ()
        if answers is not None:
            numbers = about["numbers"] or range(1, len(found) + 1)
            groups = groups_of(read_fields(source, names, limit=limit), numbers) if names else ()
            rows: Rows = answered(found, groups)
        else:
            rows, packing = pack_rows(found, self.packing, spec.max_length)
            notes = (*notes, *packing)
        return ReadPart(
            rows,
            about["dropped"],
            fingerprint,
            notes,
            warnings=warnings,
            contents=contents,
            keys=keys,
            numbers=tuple(about["numbers"]),
        )

    def _render(
        self,
        spec: TrainSpec,
        template: Template,
        prompt: Prompt,
        rows: Iterable[DatasetRow],
        seed: int,
        writer: RowWriter,
    ) -> dict[str, Any]:
        """Every row that fits to the writer; the note `about` it: `too_long` names the first as (number, id, tokens).

        `numbers` has the number (from 1) of the row that each written one came from; empty where each gave one.
        """
        context = spec.data.context
        draw = retrieval.training_context(context, seed) if context else None
        left_out, dropped = 0, 0
        first: list[tuple[int, str, int]] = []
        numbers: list[int] = []
        for number, row in enumerate(rows, start=1):
            room = context.context_tokens if context else None
            passages, without = fit_passages(draw(row) if draw else (), template, prompt, room)
            left_out += len(without)
            if self.answers is not None:
                _check_answer(row)
            for rendered in render_row(row, template, prompt, passages, spec.data.thinking):
                if len(rendered.ids) <= spec.max_length:
                    writer.add(rendered.ids, rendered.loss_mask)
                    numbers.append(number)
                    continue
                dropped += 1
                first = first or [(number, row.id, len(rendered.ids))]
        one_each = numbers == list(range(1, len(numbers) + 1))
        numbers = [] if one_each and not dropped else numbers
        return {"dropped": dropped, "left_out": left_out, "too_long": first, "numbers": numbers}

    def _key(
        self, spec: TrainSpec, template: Template, prompt: Prompt, fingerprint: str, seed: int, keys: KeyCheck
    ) -> str:
        """32 hex digits over everything that decides the rendered rows. keys: counts ignored keys of the corpus."""
        context = None
        if spec.data.context is not None:
            passages = [asdict(passage) for passage in read_passages(spec.data.context.corpus, keys)]
            chosen = spec.data.context.model_dump(mode="json", exclude={"corpus"})
            context = {**chosen, "seed": seed, "corpus": hashlib.sha256(canonical_json(passages).encode()).hexdigest()}
        decides = {
            "form": FORM,
            "rows": fingerprint,
            "template": template.digest,
            "tokenizer": template.tokenizer_digest,
            "date": str(template.date),
            "prompt": prompt_content(prompt),
            **({"thinking": spec.data.thinking} if spec.data.thinking != "keep" else {}),
            "max_length": spec.max_length,
            "context": context,
        }
        return hashlib.sha256(canonical_json(decides).encode()).hexdigest()[:32]

    def build(self, setting: TrainerContext) -> BuiltTrainer:
        """Build a trainer on the rows; held-out rows give the mean loss, and the generated answers where asked for."""
        return sft_trainer(setting, self.answers)


def _check_answer(row: DatasetRow) -> None:
    """Raise DataError for a held-out row whose last turn is not learned whole, so that no answer can be generated."""
    last = row.messages[-1]
    if not last.trained or last.thinking == "mask":
        key, value = ("thinking_mode", "mask") if last.trained else ("weight", 0)
        raise DataError(
            f"{row.where}: messages[{len(row.messages) - 1}].{key}",
            f"found {value!r}",
            "objective.answers generates the last turn of each held-out row and compares it with the whole turn",
            "change the key, or leave the row or objective.answers out",
        )


def sft_trainer(setting: TrainerContext, answers: AnswersSpec | None = None) -> BuiltTrainer:
    """Build the trainer of next-token loss on rows of token ids; objectives with other rows use it too."""
    from graftwork.training.objectives.trainer import BuiltTrainer, require_apart, sample_eval_answers

    if isinstance(setting.job.data.train, PackedRows):
        require_apart(setting.model)
    trainer = trainer_on(setting, masked_sft_trainer())
    tokenizer = trainer.processing_class
    data, micro_batch = setting.job.data, setting.plan.micro_batch

    def evaluate() -> Mapping[str, float]:
        assert data.eval is not None, "called where the spec has data.eval"
        loss = {"loss": held_out_loss(trainer, data.eval, data.pad_id, micro_batch)}
        if answers is None:
            return loss
        assert isinstance(data.eval, AnsweredRows), "the rows that `read` returns where answers are generated"
        return {**loss, **sample_eval_answers(trainer, data.eval, tokenizer, data.pad_id, answers.max_new_tokens)}

    return BuiltTrainer(trainer, evaluate, evaluate_first=answers is not None)


def masked_sft_trainer() -> type[Any]:
    """TRL's SFTTrainer on rows that are already tokenised, as a class that scores trained positions alone.

    Measured on the 135M base (nf4, LoRA r16 on all linear layers, 2 workers of 1 thread, rows of about 90 tokens, CPU
    seconds a step): SFTTrainer as it comes 12.5; with adapters in fp32 7.2; scoring trained positions alone as well
    4.9; a bare PyTorch loop doing the same 4.8.
    """
    import torch
    from trl import SFTTrainer

    from graftwork.training.objectives.trainer import trained_logits, without_history

    class MaskedSftTrainer(without_history(SFTTrainer)):  # type: ignore[misc]  # trl has no types
        """SFTTrainer that, on a CPU, sends only trained positions through the output head.

        TRL 1.16 scores every position on devices without Triton (`compact` in trl/trainer/utils.py add_fused_lm_head)
        and scores them again in the backward pass: with a 49k vocabulary and half of the tokens trained a quarter of
        the step. On CUDA TRL's own fused head is used.
        """

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            """Summed loss over the step's trained tokens, times the number of processes: DDP averages gradients."""
            head = self.model.get_output_embeddings()
            fused = inputs["labels"].is_cuda and isinstance(head, torch.nn.Linear)  # not with trained rows in it
            whole = inputs["labels"].shape == inputs["input_ids"].shape  # not a worker's part of the tokens
            if (
                (whole and fused) or return_outputs or self.aux_loss_enabled
            ):  # TRL adds the router's loss of a base with experts
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            logits_NV, targets_N = trained_logits(model, head, inputs)
            total = torch.nn.functional.cross_entropy(logits_NV.float(), targets_N, reduction="sum")
            trained = targets_N.numel() if num_items_in_batch is None else num_items_in_batch
            return total / trained * (self.accelerator.num_processes if num_items_in_batch is not None else 1)

    return MaskedSftTrainer


def trainer_on(setting: TrainerContext, kind: type[Any], collate: Any = None) -> Any:
    """Build a trainer of that subclass of SFTTrainer, which takes the run's rows of token ids.

    collate: rows of the data set to a batch; by default the batch of the run's rows.
    """
    from trl import SFTConfig

    from graftwork.training.objectives.trainer import arguments

    prepared = {"packing": False, "max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
    given = setting.trainer_arguments() | ({"data_collator": collate} if collate is not None else {})
    trainer = kind(args=SFTConfig(**arguments(setting), **prepared), **given)
    # Losses here and TRL's fused head are means over the step's tokens. Some models of images and text deny it of their
    # own loss (`accepts_loss_kwargs`, Gemma-4), for which transformers 5.24 takes the mean over passes.
    trainer.model_accepts_loss_kwargs = True
    return trainer


def held_out_loss(trainer: Any, rows: Rows, pad_id: int, micro_batch: int) -> float:
    """Mean loss in nats over the trained tokens of all rows; each process scores its share. Called on all ranks."""
    import torch

    from graftwork.training.context_parallel import replicas
    from graftwork.training.objectives.trainer import share, trained_logits

    model, accelerator = trainer.model, trainer.accelerator
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    model.eval()
    with torch.no_grad():
        number, of = replicas(rows, accelerator.process_index, accelerator.num_processes)
        for batch in share(rows.lengths_N, micro_batch, number, of):
            inputs = {key: value.to(accelerator.device) for key, value in rows.collate(batch, pad_id).items()}
            with accelerator.autocast():
                logits_NV, targets_N = trained_logits(model, model.get_output_embeddings(), inputs)
            sums[0] += torch.nn.functional.cross_entropy(logits_NV.float(), targets_N, reduction="sum").double()
            sums[1] += targets_N.numel()
    model.train()
    total, tokens = accelerator.reduce(sums, reduction="sum").tolist()
    return float(total / tokens)
