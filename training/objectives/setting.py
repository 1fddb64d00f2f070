"""What every kind's trainer is built from, and the settings that all of them share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback

from graftwork.base_model import ResolvedBase
from graftwork.compat.hf import step_figures
from graftwork.step_plan import StepPlan
from graftwork.training.job import TrainJob
from graftwork.training.strategies.arguments import strategy_arguments


@dataclass(frozen=True)
class TrainerContext:
    """What one worker has when its trainer is built."""

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

    def dataset(self) -> Dataset:
        """The row numbers of all steps, in order."""
        return Dataset.from_dict({"row": self.plan.rows_SR.reshape(-1)})

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
    """What was resolved or saved, for the run's report."""
    evaluate_first: bool = False
    """Held-out rows are measured before the first step as well; its report has the figures as `before_NAME`."""


def arguments(setting: TrainerContext) -> dict[str, Any]:
    """TrainingArguments that no kind decides for itself: steps, optimizer, precision, processes; no logs, no saving.

    For TRL's config classes, which are TrainingArguments.
    """
    spec, plan = setting.job.spec, setting.plan
    optim, cuda = spec.optim, spec.gpus > 0
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    shared = {
        "output_dir": str(setting.folder),
        "max_steps": plan.steps,
        "per_device_train_batch_size": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "train_sampling_strategy": "sequential",  # the plan is the order
        "learning_rate": optim.lr,
        "lr_scheduler_type": {"constant": "constant_with_warmup"}.get(optim.schedule, optim.schedule),
        "warmup_steps": int(np.ceil(optim.warmup_ratio * plan.steps)),
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


def strip_callbacks(trainer: Any) -> Any:
    """The trainer without its printer, and without the tokenizer, which each checkpoint would hold a copy of."""
    trainer.remove_callback(PrinterCallback)
    trainer.processing_class = None
    return trainer
