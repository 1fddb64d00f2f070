"""Distillation: the student's next-token distributions drawn to a teacher's, on the rows' answers or its own samples.

TRL 1.16's DistillationTrainer learns from samples alone, orders its own batches and calls the layers below PEFT; its
GKDTrainer keeps the logits of all positions of both models. So this is TRL's SFTTrainer with TRL's chunked divergence
(`kernels.chunked_divergence`: tiles of at most 4096 tokens by 32,768 words, neither model's logits ever exist whole) on
the positions that are trained.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from trl import SFTTrainer
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.models.utils import disable_gradient_checkpointing

from graftwork.base import load as base_model
from graftwork.compat.hf import step_figures
from graftwork.prompts.template import Template
from graftwork.training.distill_teacher import Teacher, load_or_generate, load_teacher, pinned, require_vocabulary
from graftwork.training.objectives import sft
from graftwork.training.objectives.row_cache import IGNORED, Rows, TokenRows
from graftwork.training.objectives.rows import Part, ReadPart
from graftwork.training.objectives.spec import DistillSpec, SftSpec
from graftwork.training.objectives.trainer import BuiltTrainer, TrainerContext, share, strip_callbacks, without_history
from graftwork.training.spec import TrainSpec

Batch = dict[str, torch.Tensor]


class TaughtTrainer(without_history(SFTTrainer)):  # type: ignore[misc]  # trl has no types
    """SFTTrainer whose loss is the divergence from `teacher`; `build` sets the fields below."""

    teacher: Any
    objective: DistillSpec
    run_seed: int
    pad_id: int
    stop_ids: frozenset[int]

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean divergence in nats over the step's trained tokens; over a pass's, where the student sampled them.

        The first is multiplied by the number of processes, the second divided by the passes of a step, because DDP
        averages gradients and the trainer adds the passes up.
        """
        samples = self.samples()
        if samples:
            inputs = self.sampled(inputs)
        divergence_N, entropy_N = self.divergences(model, inputs)
        figures = step_figures(self)
        figures["entropy"].append(self.accelerator.reduce(entropy_N.mean(), reduction="mean").item())
        figures["on_policy"].append(float(samples))
        if samples or num_items_in_batch is None:
            return divergence_N.mean() / self.current_gradient_accumulation_steps
        return divergence_N.sum() / num_items_in_batch * self.accelerator.num_processes

    def samples(self) -> bool:
        """Whether the student writes the answers of this step; every rank, and a resumed run, finds the same."""
        chance = np.random.default_rng([self.run_seed, self.state.global_step])
        return bool(chance.random() < self.objective.on_policy)

    def divergences(self, model: Any, inputs: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Divergence and student's entropy (N) at each trained position."""
        student_NH = trained_hidden(model, self.model.get_output_embeddings(), inputs)
        head, theirs = self.model.get_output_embeddings(), self.teacher.get_output_embeddings()
        with torch.no_grad():
            teacher_NH = trained_hidden(self.teacher, theirs, inputs)
        (scale, cap), (their_scale, their_cap) = (_logit_form(one.config) for one in (self.model, self.teacher))
        objective = self.objective
        found: tuple[torch.Tensor, torch.Tensor] = ChunkedDivergenceFunction.apply(
            student_NH,
            head.weight,
            head.bias,
            teacher_NH,
            theirs.weight,
            theirs.bias,
            objective.beta,
            objective.temperature,
            scale,
            cap,
            their_scale,
            their_cap,
        )
        return found

    @torch.no_grad()
    def sampled(self, inputs: Batch) -> Batch:
        """The same prompts with answers that the student samples now, up to a stop token."""
        prompts = [list(_prompt(*row)) for row in zip(inputs["input_ids"], inputs["labels"], strict=True)]
        width = max(len(prompt) for prompt in prompts)
        ids_BT = torch.tensor([[self.pad_id] * (width - len(prompt)) + prompt for prompt in prompts])
        mask_BT = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        device = inputs["input_ids"].device
        with writing(self.model), self.accelerator.autocast():
            whole_BT = self.model.generate(
                input_ids=ids_BT.to(device),
                attention_mask=mask_BT.to(device),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                max_new_tokens=self.objective.max_new_tokens,
                pad_token_id=self.pad_id,
                eos_token_id=sorted(self.stop_ids),
            )
        answers = [self._up_to_stop(row[width:].tolist()) for row in whole_BT]
        rows = [
            (prompt + answer, [False] * len(prompt) + [True] * len(answer))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        batch = TokenRows.from_pairs(rows).collate(range(len(rows)), self.pad_id)
        return {key: value.to(device) for key, value in batch.items()}

    def _up_to_stop(self, ids: list[int]) -> list[int]:
        end = next((place for place, token in enumerate(ids, start=1) if token in self.stop_ids), len(ids))
        return ids[:end]


def build(setting: TrainerContext) -> BuiltTrainer:
    """Distillation on the setting's rows, and the mean divergence and likelihood loss of the held-out ones.

    What a teacher wrote beforehand is learned as any conversation is.
    """
    spec, data = setting.job.spec, setting.job.data
    assert isinstance(spec.objective, DistillSpec), "registered for this kind"
    if spec.objective.generate is not None:
        return sft.build(setting)
    assert isinstance(data.train, TaughtRows), "rows of this kind"
    trainer = sft.trainer_on(setting, TaughtTrainer, setting.tokenizer())
    trainer.teacher = load_teacher(data.train.teacher, spec.root, trainer.accelerator.device)
    trainer.objective, trainer.run_seed, trainer.pad_id = spec.objective, spec.seed, data.pad_id
    trainer.stop_ids = base_model.template(setting.base).stop_ids

    def evaluate() -> Mapping[str, float]:
        assert data.eval is not None, "asked where the spec has data.eval"
        return held_out(trainer, data.eval, data.pad_id, spec.optim.rows_per_pass)

    return BuiltTrainer(strip_callbacks(trainer), evaluate, evaluate_first=data.eval is not None)


def trained_hidden(model: Any, head: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What goes into the output head (N, H) at the positions whose next token is trained, by the model's own forward.

    A hook takes it and lets one position through to the head, whose logits nobody needs.
    """
    labels_BT = inputs["labels"]
    keep_BT = torch.zeros_like(labels_BT, dtype=torch.bool)
    keep_BT[:, :-1] = labels_BT[:, 1:] != IGNORED
    taken: list[torch.Tensor] = []

    def take(_head: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        width = keep_BT.shape[1]  # a trained prefix puts no positions into the output
        taken.append(args[0][:, -width:][keep_BT])
        return (args[0][:, :1], *args[1:])

    hook = head.register_forward_pre_hook(take)
    try:
        model(**{key: value for key, value in inputs.items() if key != "labels"}, use_cache=False)
    finally:
        hook.remove()
    return taken[0]


@torch.no_grad()
def held_out(trainer: Any, rows: Rows, pad_id: int, micro_batch: int) -> Mapping[str, float]:
    """Mean divergence (`loss`) and negative log-likelihood of the rows' own tokens (`nll`), in nats. On all ranks."""
    accelerator, head = trainer.accelerator, trainer.model.get_output_embeddings()
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    trainer.model.eval()
    for batch in share(rows.lengths_N, micro_batch, accelerator.process_index, accelerator.num_processes):
        inputs = {key: value.to(accelerator.device) for key, value in rows.collate(batch, pad_id).items()}
        with accelerator.autocast():
            divergence_N, _ = trainer.divergences(trainer.model, inputs)
            logits_NV = head(trained_hidden(trainer.model, head, inputs))
        targets_N = inputs["labels"][:, 1:][inputs["labels"][:, 1:] != IGNORED]
        sums[0] += divergence_N.double().sum()
        sums[1] += torch.nn.functional.cross_entropy(logits_NV.float(), targets_N, reduction="sum").double()
        sums[2] += targets_N.numel()
    trainer.model.train()
    divergence, nll, tokens = accelerator.reduce(sums, reduction="sum").tolist()
    return {"loss": divergence / tokens, "nll": nll / tokens}


@contextmanager
def writing(model: Any) -> Iterator[None]:
    """The model ready to generate: without dropout and without recomputed blocks, which keep no cache."""
    model.eval()
    with disable_gradient_checkpointing(model, {"use_reentrant": False}):
        yield
    model.train()


def _prompt(ids_T: torch.Tensor, labels_T: torch.Tensor) -> list[int]:
    """Ids before the last answer of a row."""
    trained = (labels_T != IGNORED).tolist()
    end = len(trained) - 1 - trained[::-1].index(True)
    start = next((place + 1 for place in range(end, -1, -1) if not trained[place]), 0)
    ids: list[int] = ids_T[:start].tolist()
    return ids


def _logit_form(config: Any) -> tuple[float, float | None]:
    """(factor on the logits, soft cap) of an architecture, as its config names them (Cohere, Granite, Gemma)."""
    text = config.get_text_config()
    scale, divisor = getattr(text, "logit_scale", None), getattr(text, "logits_scaling", None)
    if scale is None and divisor is not None:
        scale = 1 / divisor
    return 1.0 if scale is None else scale, getattr(text, "final_logit_softcapping", None)


# Conversations to distil on: with the teacher whose distributions are learned, or with the answers that it wrote.


@dataclass(frozen=True)
class TaughtRows:
    """Rows of SFT's form, and who teaches on them."""

    rows: Rows
    teacher: Teacher

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths_N(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        return self.rows.lengths_N

    @property
    def scored_N(self) -> NDArray[np.int64]:
        """Trained tokens of each row."""
        return self.rows.scored_N

    @property
    def widths_N(self) -> NDArray[np.int64]:
        """A row is one sequence."""
        return self.rows.widths_N

    def digest(self) -> str:
        """sha256 hex over rows and teacher."""
        return hashlib.sha256((self.rows.digest() + self.teacher.digest()).encode()).hexdigest()

    def collate(self, indices: Sequence[int], pad_id: int) -> "dict[str, torch.Tensor]":
        """As SFT's rows."""
        return self.rows.collate(indices, pad_id)


def read(spec: TrainSpec, template: Template, part: Part) -> ReadPart:
    """The rows that fit. Raises DataError, StorageError; ArtifactError and BaseModelError of the teacher.

    Of training rows the teacher writes the answers first, where the spec says so; held-out rows keep their own.
    """
    objective = spec.objective
    assert isinstance(objective, DistillSpec), "registered for this kind"
    as_sft = spec.model_copy(update={"objective": SftSpec()})
    if objective.generate is not None:
        if part == "eval":
            return sft.read(as_sft, template, part)
        texts = load_or_generate(spec, objective.generate)
        found = sft.read(as_sft.with_({"data.train": texts.uri, "data.train_rows": None}), template, part)
        notes, warnings = (*texts.notes, *found.notes), (*texts.warnings, *found.warnings)
        return replace(found, notes=notes, warnings=warnings, contents=texts.contents)
    assert objective.teacher is not None, "one of the two is given"
    teacher = pinned(spec, objective.teacher)
    require_vocabulary(spec, teacher, template)
    found = sft.read(as_sft, template, part)
    return replace(found, rows=TaughtRows(found.rows, teacher))
