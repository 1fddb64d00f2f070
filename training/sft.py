"""TRL's SFTTrainer, fed with rows that are already tokenised. The only module that imports trl.

Measured on the 135M base (nf4, LoRA r16 on all linear layers, 2 workers of 1 thread, rows of about 90 tokens, CPU
seconds a step): SFTTrainer as it comes 12.5; with adapters kept in fp32 7.2; scoring trained positions alone as well
4.9; a bare PyTorch loop doing the same 4.8.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from graftwork.base_model import LoadedBase, ResolvedBase
from graftwork.errors import ConfigError
from graftwork.training.batches import IGNORED, StepPlan, collate
from graftwork.training.data import PreparedData, TokenRows
from graftwork.training.spec import LoraSpec, TrainSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

ATTENTION_WORDS = ("attn", "attention")
MLP_WORDS = ("mlp", "feed_forward", "ffn", "fc")


class MaskedSftTrainer(SFTTrainer):  # type: ignore[misc]  # trl has no types
    """SFTTrainer that, on a CPU, sends only trained positions through the output head.

    TRL 1.16 scores every position on devices without Triton (`compact` in trl/trainer/utils.py add_fused_lm_head) and
    scores them again in the backward pass: with a 49k vocabulary and half of the tokens trained a quarter of the step.
    On CUDA TRL's own fused head is used.
    """

    control: Any

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Summed loss over the step's trained tokens, times the number of processes because DDP averages gradients."""
        if inputs["labels"].is_cuda or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        logits_NV, targets_N = trained_logits(model, self.model.get_output_embeddings(), inputs)
        total = torch.nn.functional.cross_entropy(logits_NV.float(), targets_N, reduction="sum")
        trained = targets_N.numel() if num_items_in_batch is None else num_items_in_batch
        return total / trained * (self.accelerator.num_processes if num_items_in_batch is not None else 1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hand a step's figures to the callbacks; keep no history (it would grow in every checkpoint)."""
        self._metrics["train"].clear()
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No README in a checkpoint: the adapter's manifest says it all."""


def trained_logits(
    model: Any, head: torch.nn.Module, inputs: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, V) and targets (N) of the positions whose next token is trained, through the model's own forward.

    A hook drops the other positions just before the output head, so that scaling or soft-capping after it still apply.
    """
    labels_BT = inputs["labels"]
    keep_BT = torch.zeros_like(labels_BT, dtype=torch.bool)
    keep_BT[:, :-1] = labels_BT[:, 1:] != IGNORED
    hook = head.register_forward_pre_hook(lambda _head, args: (args[0][keep_BT], *args[1:]))
    try:
        output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
    finally:
        hook.remove()
    return output.logits, labels_BT[:, 1:][keep_BT[:, :-1]]


def build_trainer(
    spec: TrainSpec,
    data: PreparedData,
    plan: StepPlan,
    base: ResolvedBase,
    loaded: LoadedBase,
    folder: Path,
    callback: TrainerCallback,
) -> MaskedSftTrainer:
    """A trainer that takes the plan's steps in order and writes `folder/checkpoint-STEP` when told to."""
    trainer = MaskedSftTrainer(
        model=loaded.model,
        args=_arguments(spec, plan, folder),
        train_dataset=Dataset.from_dict({"row": plan.rows_SR.reshape(-1)}),
        data_collator=lambda batch: collate(data.train, [item["row"] for item in batch], data.pad_id),
        processing_class=AutoTokenizer.from_pretrained(base.folder),
        peft_config=lora_config(spec.adapter, loaded.model),
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.processing_class = None  # it had to be given; kept, each checkpoint would hold a copy of the tokenizer
    for parameter in trainer.model.parameters():
        # TRL 1.16 casts adapters on a quantised base to bf16. Without bf16 units that makes a step 1.7 times as long,
        # and small updates are lost in 8 bits of mantissa. fp32 is PEFT's default; on CUDA autocast multiplies in bf16.
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer


def take_weights(model: Any, adapter: Path) -> None:
    """Set the adapter's weights to those of a published one. The folder was verified by `artifact.fetch`."""
    outcome = set_peft_model_state_dict(model, load_file(adapter / "adapter_model.safetensors"))
    unused = list(outcome.unexpected_keys) + [key for key in outcome.missing_keys if "lora_" in key]
    assert not unused, f"weights of another shape of adapter: {unused[:3]}"  # method and base were compared before


def _arguments(spec: TrainSpec, plan: StepPlan, folder: Path) -> SFTConfig:
    optim, cuda = spec.optim, spec.gpus_per_worker > 0
    return SFTConfig(
        output_dir=str(folder),
        max_steps=plan.steps,
        per_device_train_batch_size=plan.micro_batch,
        gradient_accumulation_steps=plan.accumulation,
        train_sampling_strategy="sequential",  # the plan is the order
        learning_rate=optim.lr,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(optim.schedule, optim.schedule),
        warmup_steps=int(np.ceil(optim.warmup_ratio * plan.steps)),
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
        seed=spec.seed,
        use_cpu=not cuda,
        bf16=cuda,
        ddp_backend=torch.distributed.get_backend() if torch.distributed.is_initialized() else None,
        ddp_find_unused_parameters=False,
        gradient_checkpointing=False,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,  # a NaN must stop the run, not be averaged away
        save_strategy="no",  # the callback says when
        eval_strategy="no",
        packing=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
    )


def lora_config(adapter: LoraSpec, model: Any) -> LoraConfig:
    """PEFT's form of the adapter. Raises ConfigError when the model has no layer of the asked kind."""
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules="all-linear" if adapter.targets == "all-linear" else _targets(adapter.targets, model),
        task_type="CAUSAL_LM",
    )


def _targets(kind: str, model: Any) -> list[str]:
    """Full names of the linear layers of the attention or of the MLP blocks."""
    words = ATTENTION_WORDS if kind == "attention" else MLP_WORDS
    head = model.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if module is not head and (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D")
    ]
    found = [name for name in linear if any(word in name.lower() for word in words)]
    if not found:
        known = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise ConfigError(
            f"adapter.targets={kind}",
            f"no linear layer of {type(model).__name__} lies in such a block",
            f"its linear layers: {', '.join(known)}",
            "set adapter.targets=all-linear",
        )
    return found


@torch.no_grad()
def held_out_loss(trainer: MaskedSftTrainer, rows: TokenRows, pad_id: int, micro_batch: int) -> float:
    """Mean loss in nats over the trained tokens of all rows; each process scores its share. Called on all ranks."""
    model, accelerator = trainer.model, trainer.accelerator
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    model.eval()
    for batch in _share(rows.lengths_N, micro_batch, accelerator.process_index, accelerator.num_processes):
        inputs = {key: value.to(accelerator.device) for key, value in collate(rows, batch, pad_id).items()}
        with accelerator.autocast():
            logits_NV, targets_N = trained_logits(model, model.get_output_embeddings(), inputs)
        sums[0] += torch.nn.functional.cross_entropy(logits_NV.float(), targets_N, reduction="sum").double()
        sums[1] += targets_N.numel()
    model.train()
    total, tokens = accelerator.reduce(sums, reduction="sum").tolist()
    return float(total / tokens)


def _share(lengths_N: "NDArray[np.int64]", micro: int, rank: int, world: int) -> list[Sequence[int]]:
    """Batches of similar length that this rank scores."""
    order = np.argsort(lengths_N, kind="stable").tolist()
    batches: list[Sequence[int]] = [order[i : i + micro] for i in range(0, len(order), micro)]
    return batches[rank::world]
