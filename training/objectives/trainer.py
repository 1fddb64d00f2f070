"""Parts of every objective's trainer: its context, arguments, logits of trained positions, generated answers."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoTokenizer, GenerationConfig, PrinterCallback, TrainerCallback

from graftwork.base.load import ResolvedBase
from graftwork.base.support import PROBE_LENGTH, mixed_share, most_mixed, probe_ids
from graftwork.compat.hf import step_figures
from graftwork.errors import ConfigError
from graftwork.training.loop import StepPlan
from graftwork.training.lr_schedule import scheduler_of
from graftwork.training.objectives.rows import IGNORED, AnsweredRows, pad_left
from graftwork.training.optimizers import optimizer_arguments, set_optimizer
from graftwork.training.strategies import strategy_arguments
from graftwork.training.worker_messages import TrainJob, rank_and_world

if TYPE_CHECKING:
    from numpy.typing import NDArray


def trained_logits(
    model: Any, head: torch.nn.Module, inputs: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, V) and targets (N) of the positions whose next token is trained, through the model's own forward.

    labels (B, T), or (B, T + 1) where the row goes on behind the batch's last position.

    A hook drops the other positions just before the output head, so that scaling or soft-capping after it still apply.
    """
    labels_BT = inputs["labels"]
    next_BT = labels_BT[:, 1:]
    keep_BT = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    keep_BT[:, : next_BT.shape[1]] = next_BT != IGNORED
    hook = head.register_forward_pre_hook(lambda _head, args: (args[0][keep_BT], *args[1:]))
    try:
        output = model(**{key: value for key, value in inputs.items() if key != "labels"}, use_cache=False)
    finally:
        hook.remove()
    return output.logits, next_BT[next_BT != IGNORED]


def router_loss(
    trainer: Any, output: Any, mask_BT: torch.Tensor | None, *, whole: bool = False, processes: int = 1
) -> torch.Tensor | float:
    """Share of this pass in the load-balancing loss of a base with experts; 0 for other bases.

    The step's loss is the mean of its passes, as in TRL's SFTTrainer. output: of the model's forward on tokens with
    this mask. whole: the pass is no part of a step. processes: by which the caller multiplies the loss. Adds the figure
    `aux_loss`, without the coefficient. Called on all ranks.
    """
    if not trainer.aux_loss_enabled:
        return 0.0
    balance = output.aux_loss
    if balance is None:  # Llama-4's forward computes none
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        text = trainer.model.config.get_text_config()
        balance = load_balancing_loss_func(output.router_logits, text.num_experts, text.num_experts_per_tok, mask_BT)
    mean = trainer.accelerator.reduce(balance.detach(), reduction="mean")
    step_figures(trainer)["aux_loss"].append(mean.item())
    passes = 1 if whole else trainer.current_gradient_accumulation_steps * processes
    weighted: torch.Tensor = trainer.router_aux_loss_coef * balance / passes
    return weighted


BATCH = 8
"""Prompts that are answered at once."""


@torch.no_grad()
def sample_eval_answers(
    trainer: Any, rows: AnsweredRows, tokenizer: Any, pad_id: int, most: int
) -> Mapping[str, float]:
    """Shares from 0 to 1: `exact_match`, `edit_similarity` (mean), and `exact_match[GROUP]` of each group.

    most: tokens generated for an answer at the most. Called on all ranks.
    """
    model, accelerator = trainer.model, trainer.accelerator
    groups = sorted(set(rows.groups_N))
    sums = torch.zeros(2 + len(groups), 2, dtype=torch.float64, device=accelerator.device)
    training = model.training
    model.eval()
    for batch in share(rows.starts_N, BATCH, accelerator.process_index, accelerator.num_processes):
        with accelerator.autocast():
            ends = [rows.answer(index)[-1] for index in batch]
            said = greedy(model, [rows.prompt(index) for index in batch], ends, pad_id, most)
        for index, end, ids in zip(batch, ends, said, strict=True):
            text = tokenizer.decode(ids[: ids.index(end)] if end in ids else ids)
            right = tokenizer.decode(rows.answer(index)[:-1])
            exact = float(text == right)
            sums[0] += torch.tensor([exact, 1.0])
            sums[1] += torch.tensor([edit_similarity(text, right), 1.0])
            if groups:
                sums[2 + groups.index(rows.groups_N[index])] += torch.tensor([exact, 1.0])
    model.train(training)
    shares = accelerator.reduce(sums, reduction="sum").cpu()
    shares = (shares[:, 0] / shares[:, 1]).tolist()
    by_group = {f"exact_match[{group}]": value for group, value in zip(groups, shares[2:], strict=True)}
    return {"exact_match": shares[0], "edit_similarity": shares[1], **by_group}


def greedy(
    model: Any, prompts: Sequence[Sequence[int]], ends: Collection[int], pad_id: int, most: int
) -> list[list[int]]:
    """The most probable continuation of each prompt, of up to `most` tokens; stops at `ends`, then padding follows."""
    ids_BT, mask_BT = pad_left(prompts, pad_id, next(model.parameters()).device)
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=most, eos_token_id=sorted(set(ends)), pad_token_id=pad_id, use_cache=True
    )
    out_BT = model.generate(input_ids=ids_BT, attention_mask=mask_BT, generation_config=settings)
    answers: list[list[int]] = out_BT[:, ids_BT.shape[1] :].tolist()
    return answers


def edit_similarity(said: str, right: str) -> float:
    """1 less the edits (insert, delete, replace a character) over the length of the longer text; 1 for equal texts."""
    if said == right:
        return 1.0
    before = list(range(len(right) + 1))
    for row, char in enumerate(said, start=1):
        now = [row]
        for column, other in enumerate(right, start=1):
            now.append(min(before[column] + 1, now[-1] + 1, before[column - 1] + (char != other)))
        before = now
    return 1 - before[-1] / max(len(said), len(right))


@torch.no_grad()
def require_apart(model: Any) -> None:
    """Raise ConfigError where a document's logits depend on the one before it in its row.

    So do models with recurrent layers, or with positions that are no input. Weights that a strategy has sharded are
    not checked: they can't be before the first step.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids_T = torch.tensor(probe_ids(vocabulary), device=next(model.parameters()).device)
    places_T = torch.arange(PROBE_LENGTH, device=ids_T.device).repeat(2)
    training = model.training
    model.eval()
    alone = model(input_ids=ids_T[None, PROBE_LENGTH:], use_cache=False).logits[0]
    one = model(input_ids=ids_T[None], use_cache=False).logits[0, PROBE_LENGTH:]
    two = model(input_ids=ids_T[None], position_ids=places_T[None], use_cache=False).logits[0, PROBE_LENGTH:]
    model.train(training)
    mixed = mixed_share(alone=alone, one=one, two=two)
    if mixed <= most_mixed(model):
        return
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    raise ConfigError(
        "objective.packing=best_fit",
        f"{type(inner).__name__} lets documents of a row see each other ({mixed:.0%} as much as one document would)",
        "a packed document gets the logits that it gets alone",
        "set objective.packing=none",
    )


@dataclass(frozen=True)
class TrainerContext:
    """Input of an objective's `build` on one worker."""

    job: TrainJob
    plan: StepPlan
    base: ResolvedBase
    model: Any
    """The base with the adapter attached, in this process."""
    folder: Path
    """Where checkpoints are written."""
    callback: TrainerCallback
    universal: bool = False
    """The checkpoint that is gone on from is in DeepSpeed's universal form."""

    def tokenizer(self) -> Any:
        """The base's tokenizer, in transformers' form."""
        return AutoTokenizer.from_pretrained(self.base.folder)

    def trainer_arguments(self) -> dict[str, Any]:
        """Keyword arguments of TRL's trainers: model, row numbers of all steps in order, rows to batches, callback."""
        return {
            "model": self.model,
            "train_dataset": Dataset.from_dict({"row": self.rows_in_order()}),
            "data_collator": self.collate,
            "processing_class": self.tokenizer(),
            "callbacks": [self.callback],
        }

    def rows_in_order(self) -> "NDArray[np.int64]":
        """Row numbers as the data loader deals them to all workers, a pass of each in turn."""
        size = self.job.spec.strategy.context_parallel
        return self.plan.rows_SR.reshape(-1, self.plan.micro_batch).repeat(size, axis=0).reshape(-1)

    def collate(self, batch: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        """Rows of `dataset` -> a batch."""
        data = self.job.data
        return data.train.collate([item["row"] for item in batch], data.pad_id)


@dataclass(frozen=True)
class BuiltTrainer:
    """A trainer, ready to train."""

    trainer: Any
    evaluate: Callable[[], Mapping[str, float]]
    """Figures over all held-out rows, the same on every rank; `loss` is among them. Called on all ranks."""
    notes: tuple[str, ...] = ()
    """Notes for the run's report."""
    evaluate_first: bool = False
    """Held-out rows are measured before the first step as well; its report has the figures as `before_NAME`."""
    decodes: bool = False
    """The trainer decodes answers while it trains, so that it keeps its tokenizer."""


def arguments(setting: TrainerContext) -> dict[str, Any]:
    """TrainingArguments, for TRL's config classes: steps, optimizer, precision, processes; no logs, no saving."""
    spec, plan, world = setting.job.spec, setting.plan, rank_and_world()[1]
    optim, cuda = spec.optim, spec.gpus > 0
    scheduler = scheduler_of(optim, plan.steps)
    shared = {
        "output_dir": str(setting.folder),
        "max_steps": plan.steps,
        "per_device_train_batch_size": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "train_sampling_strategy": "sequential",  # the plan is the order
        "learning_rate": optim.lr,
        "lr_scheduler_type": scheduler.name,
        "lr_scheduler_kwargs": scheduler.kwargs,
        "warmup_steps": scheduler.warmup_steps,
        **optimizer_arguments(optim),
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.max_grad_norm,
        "seed": spec.seed,
        "use_cpu": not cuda,
        "bf16": cuda,
        "ddp_backend": torch.distributed.get_backend() if torch.distributed.is_initialized() else None,
        "ddp_find_unused_parameters": False,
        "activation_checkpointing": optim.gradient_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # a NaN must stop the run, not be averaged away
        "save_strategy": "no",  # the callback says when
        "eval_strategy": "no",
        "remove_unused_columns": False,
        "report_to": [],
        "disable_tqdm": True,
    }
    return {**shared, **strategy_arguments(spec, plan, world, setting.base, universal=setting.universal)}


def without_history(trainer_class: type[Any]) -> type[Any]:
    """TRL's trainer without what grows or is written for nobody: a history in every checkpoint, a model card."""

    class Plain(trainer_class):  # type: ignore[misc]  # trl has no types
        control: Any

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            """Hand a step's figures, TRL's own means among them, to the callbacks; keep no history."""
            means = {key: sum(values) / len(values) for key, values in step_figures(self).items() if values}
            step_figures(self).clear()
            self.control = self.callback_handler.on_log(self.args, self.state, self.control, {**means, **logs})

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """The adapter's manifest says it all."""

    Plain.__name__ = f"Plain{trainer_class.__name__}"
    return Plain


def build(setting: TrainerContext) -> BuiltTrainer:
    """The trainer of the setting's kind; imports trl (5 to 10 s). The adapter's weights stay as they came: in fp32.

    TRL 1.16 casts adapters on a quantised base to bf16. Without bf16 units that makes a step 1.7 times as long, and
    small updates are lost in 8 bits of mantissa. fp32 is PEFT's default; on CUDA autocast multiplies in bf16.
    """
    fp32 = [(parameter, parameter.data) for parameter in setting.model.parameters() if parameter.requires_grad]
    training = setting.job.spec.objective.build(setting)
    for parameter, data in fp32:
        parameter.data = data
    set_optimizer(training.trainer, setting.job.spec.optim)
    training.trainer.remove_callback(PrinterCallback)
    if not training.decodes:
        training.trainer.processing_class = None  # each checkpoint would hold a copy of the tokenizer
    return training


def share(lengths_N: "NDArray[np.int64]", micro: int, rank: int, world: int) -> list[Sequence[int]]:
    """Batches of similar length that this rank scores: equally many on each, where there are rows enough.

    Under ZeRO-3 and FSDP2 every forward pass is one of all ranks, so none may have a batch more than another.
    """
    order = np.argsort(lengths_N, kind="stable")
    each = max(1, min(math.ceil(len(order) / (micro * world)), len(order) // world))
    batches: list[Sequence[int]] = [part.tolist() for part in np.array_split(order, each * world) if len(part)]
    return batches[rank::world]
