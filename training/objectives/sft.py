"""TRL's SFTTrainer, fed with rows that are already tokenised.

Measured on the 135M base (nf4, LoRA r16 on all linear layers, 2 workers of 1 thread, rows of about 90 tokens, CPU
seconds a step): SFTTrainer as it comes 12.5; with adapters kept in fp32 7.2; scoring trained positions alone as well
4.9; a bare PyTorch loop doing the same 4.8.
"""

from collections.abc import Mapping
from typing import Any

import torch
from trl import SFTConfig, SFTTrainer

from graftwork.training.logits import trained_logits
from graftwork.training.objective_spec import SftSpec
from graftwork.training.objectives.answers import held_out_answers
from graftwork.training.objectives.apart import require_apart
from graftwork.training.objectives.setting import (
    BuiltTrainer,
    TrainerContext,
    arguments,
    strip_callbacks,
    without_history,
)
from graftwork.training.objectives.share import share
from graftwork.training.rows.answered import AnsweredRows
from graftwork.training.rows.packed import PackedRows
from graftwork.training.rows.token_rows import Rows


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
