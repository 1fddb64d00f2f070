"""Distillation: the student's next-token distributions drawn to a teacher's, on the rows' answers or its own samples.

TRL 1.16's DistillationTrainer learns from samples alone, orders its own batches and calls the layers below PEFT; its
GKDTrainer keeps the logits of all positions of both models. So this is TRL's SFTTrainer with TRL's chunked divergence
(`kernels.chunked_divergence`: tiles of at most 4096 tokens by 32,768 words, neither model's logits ever exist whole) on
the positions that are trained.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from graftwork.base.load import template as base_template
from graftwork.base.source import BaseSpec
from graftwork.config import Spec
from graftwork.datasets.rows import DataSpec
from graftwork.quantization import QuantSpec
from graftwork.storage.store import ALIAS_PATTERN
from graftwork.training.objectives.protocol import Part, Rows, SecondModel, Traits, WrappedRows, check_no_zero3
from graftwork.training.objectives.rows import IGNORED, TokenRows, pad_left
from graftwork.training.objectives.sft import SftSpec, sft_trainer, trainer_on
from graftwork.training.rewards import RewardFunctionSpec, RewardModelReward

if TYPE_CHECKING:
    import torch

    from graftwork.prompts.template import Template
    from graftwork.training.distill_teacher import Teacher
    from graftwork.training.objectives.rows import ReadPart
    from graftwork.training.objectives.trainer import BuiltTrainer, TrainerContext
    from graftwork.training.spec import TrainSpec

    Batch = dict[str, torch.Tensor]


class TeacherSpec(Spec):
    """A model to learn from. In YAML a plain string is its `adapter` (`task@alias`) or else its `base`."""

    base: BaseSpec | None = None
    """null is the run's own base. Its tokenizer must be the student's."""
    adapter: Annotated[str, Field(pattern=ALIAS_PATTERN)] | None = None
    """A published adapter of the run's root, on that base."""
    quant: QuantSpec | None = None
    """null is the run's own."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return {"adapter": value} if re.fullmatch(ALIAS_PATTERN, value) else {"base": value}

    @model_validator(mode="after")
    def _check_named(self) -> Self:
        if self.base is None and self.adapter is None:
            raise ValueError("a teacher is a base, an adapter, or both: name one")
        return self


class GenerateSpec(Spec):
    """Answers to the training rows' questions: written once, filtered, kept under the root, learned as in sft."""

    url: Annotated[str, Field(pattern=r"^https?://")] | None = None
    """An OpenAI-compatible endpoint (`http://HOST:8000/v1`); null lets `teacher` write, in the driver."""
    model: str | None = None
    """The model's name there."""
    api_key_env: str | None = None
    """Environment variable with the endpoint's key."""
    temperature: float = Field(default=0.0, ge=0, le=2)
    max_new_tokens: int = Field(default=128, ge=1)
    """An answer that has not ended by then is left out."""
    samples: int = Field(default=1, ge=1, le=64)
    """Answers to each question, of which the best is learned."""
    keep: RewardFunctionSpec | None = None
    """What an answer is held against, one of the reward functions of grpo; null keeps each one that has ended."""
    at_least: float = 1.0
    """Least value of `keep` that is learned."""
    concurrency: int = Field(default=8, ge=1, le=256)
    """Requests to the endpoint at a time, or rows that the teacher writes at once."""

    @model_validator(mode="after")
    def _takes_effect(self) -> Self:
        if (self.url is None) != (self.model is None):
            raise ValueError("url and model go together: an endpoint is asked for a model by name")
        if self.api_key_env is not None and self.url is None:
            raise ValueError("api_key_env can't take effect without url")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples={self.samples} with temperature=0 are all the same: raise temperature")
        if isinstance(self.keep, RewardModelReward):
            raise ValueError("keep takes a function of the answer's text, no reward model")
        if "at_least" in self.model_fields_set and self.keep is None:
            raise ValueError("at_least can't take effect without keep")
        return self


class DistillSpec(Spec):
    """Learning a teacher's next-token distributions (GKD, arXiv 2306.13649), or its filtered texts."""

    kind: Literal["distill"] = "distill"
    teacher: TeacherSpec | None = None
    """Whose distributions are learned: a base, or a published adapter (`task@alias`) on the run's base."""
    generate: GenerateSpec | None = None
    """Learn texts that the teacher, or a model behind an endpoint, writes beforehand; null learns its distributions."""
    beta: float = Field(default=0.0, ge=0, le=1)
    """0: KL(teacher, student); 1: KL(student, teacher); between: generalised Jensen-Shannon, teacher weighted by it."""
    temperature: float = Field(default=1.0, gt=0)
    """Both distributions are softened by it before they are compared."""
    on_policy: float = Field(default=0.0, ge=0, le=1)
    """Share of the steps that learn from answers which the student samples, in place of the rows' own."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Longest sampled answer."""

    @model_validator(mode="after")
    def _takes_effect(self) -> Self:
        asked = self.generate is not None and self.generate.url is not None
        if (self.teacher is not None) == asked:
            raise ValueError("name one teacher: `teacher` (a base or an adapter), or `generate.url` (an endpoint)")
        for key in ("beta", "temperature", "on_policy", "max_new_tokens"):
            if self.generate is not None and key in self.model_fields_set:
                raise ValueError(f"{key} can't take effect with generate: its answers are learned as in sft")
        return self

    @property
    def traits(self) -> Traits:
        if self.teacher is None or self.generate is not None:
            return Traits()
        return Traits(head="fused_trained", second_model=SecondModel(self.teacher.base, self.teacher.quant))

    def check(self, run: TrainSpec) -> None:
        if self.generate is None:
            check_no_zero3(run, self.kind)
        elif run.data.context is not None:
            raise ValueError("data.context can't take effect with objective.generate: the teacher answers without it")
        teacher = self.teacher
        alike = teacher is not None and teacher.adapter is None and teacher.quant in (None, run.quant)
        if teacher is not None and alike and teacher.base == run.base:
            raise ValueError(
                "objective.teacher is the run's own base, from which nothing can be learned: name another "
                "base, an adapter or another quant"
            )
        if run.strategy.kind == "fsdp2" and self.on_policy > 0:
            raise ValueError(
                f"objective.on_policy={self.on_policy:g} can't go with strategy.kind=fsdp2: the workers' samples end "
                "after different numbers of passes. Set objective.on_policy=0, or strategy.kind=zero2"
            )

    def read(self, spec: TrainSpec, template: Template, part: Part) -> ReadPart:
        """The rows that fit. Raises DataError, StorageError; ArtifactError and BaseModelError of the teacher.

        Of training rows the teacher writes the answers first, where the spec says so; held-out rows keep their own.
        """
        from graftwork.training.distill_teacher import load_or_generate, pinned, require_vocabulary

        as_sft = spec.model_copy(update={"objective": SftSpec()})
        if self.generate is not None:
            if part == "eval":
                return SftSpec().read(as_sft, template, part)
            texts = load_or_generate(spec, self.generate)
            written = DataSpec(train=texts.uri, thinking=spec.data.thinking)
            found = SftSpec().read(as_sft.model_copy(update={"data": written}), template, part)
            notes, warnings = (*texts.notes, *found.notes), (*texts.warnings, *found.warnings)
            return replace(found, notes=notes, warnings=warnings, contents=texts.contents)
        assert self.teacher is not None, "one of the two is given"
        teacher = pinned(spec, self.teacher)
        require_vocabulary(spec, teacher, template)
        found = SftSpec().read(as_sft, template, part)
        return replace(found, rows=TaughtRows(found.rows, teacher))

    def build(self, setting: TrainerContext) -> BuiltTrainer:
        """Distillation on the setting's rows, and the mean divergence and likelihood loss of the held-out ones.

        What a teacher wrote beforehand is learned as any conversation is.
        """
        from graftwork.training.distill_teacher import load_teacher
        from graftwork.training.objectives.trainer import BuiltTrainer

        spec, data = setting.job.spec, setting.job.data
        if self.generate is not None:
            return sft_trainer(setting)
        assert isinstance(data.train, TaughtRows), "rows of this kind"
        trainer = trainer_on(setting, taught_trainer())
        trainer.teacher = load_teacher(data.train.teacher, spec.root, trainer.accelerator.device)
        trainer.objective, trainer.run_seed, trainer.pad_id = self, spec.seed, data.pad_id
        trainer.stop_ids = base_template(setting.base).stop_ids

        def evaluate() -> Mapping[str, float]:
            assert data.eval is not None, "asked where the spec has data.eval"
            return evaluate_rows(trainer, data.eval, data.pad_id, spec.optim.rows_per_pass)

        return BuiltTrainer(trainer, evaluate, evaluate_first=data.eval is not None)


@dataclass(frozen=True)
class TaughtRows(WrappedRows):
    """Rows of SFT's form, and their teacher."""

    teacher: Teacher

    def digest(self) -> str:
        """sha256 hex over rows and teacher."""
        return hashlib.sha256((self.rows.digest() + self.teacher.digest()).encode()).hexdigest()


def taught_trainer() -> type[Any]:
    """TRL's SFTTrainer as a class whose loss is the divergence from a teacher."""
    from trl import SFTTrainer

    from graftwork.compat.hf import step_figures
    from graftwork.training.objectives.trainer import router_loss, without_history

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
            averages gradients and the trainer adds the passes up. Every rank, and a resumed run, draws the same steps.
            The load-balancing loss of a base with experts is added as in sft.
            """
            chance = np.random.default_rng([self.run_seed, self.state.global_step])
            samples = bool(chance.random() < self.objective.on_policy)
            batch = sampled(self, inputs) if samples else inputs
            divergence_N, entropy_N, output = divergences(self, model, batch)
            figures, router = step_figures(self), router_loss(self, output, batch.get("attention_mask"))
            figures["entropy"].append(self.accelerator.reduce(entropy_N.mean(), reduction="mean").item())
            figures["on_policy"].append(float(samples))
            if samples or num_items_in_batch is None:
                return divergence_N.mean() / self.current_gradient_accumulation_steps + router
            return divergence_N.sum() / num_items_in_batch * self.accelerator.num_processes + router

    return TaughtTrainer


def divergences(trainer: Any, model: Any, inputs: Batch) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Divergence from the teacher and the student's entropy (N) at each trained position, and the student's output."""
    import torch
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    head, theirs = trainer.model.get_output_embeddings(), trainer.teacher.get_output_embeddings()
    student_NH, output = trained_hidden(model, head, inputs)
    with torch.no_grad():
        teacher_NH, _ = trained_hidden(trainer.teacher, theirs, inputs)
    student, teacher = ((student_NH, head.weight, head.bias), (teacher_NH, theirs.weight, theirs.bias))
    forms = (*_logit_form(trainer.model.config), *_logit_form(trainer.teacher.config))
    divergence_N, entropy_N = ChunkedDivergenceFunction.apply(
        *student, *teacher, trainer.objective.beta, trainer.objective.temperature, *forms
    )
    return divergence_N, entropy_N, output


def sampled(trainer: Any, inputs: Batch) -> Batch:
    """The same prompts with answers that the student samples now, up to a stop token."""
    import torch
    from trl.models.utils import disable_gradient_checkpointing

    model, pad_id = trainer.model, trainer.pad_id
    prompts = [list(_prompt(*row)) for row in zip(inputs["input_ids"], inputs["labels"], strict=True)]
    device = inputs["input_ids"].device
    ids_BT, mask_BT = pad_left(prompts, pad_id, device)
    model.eval()  # without dropout and without recomputed blocks, which keep no cache
    no_checkpoints = disable_gradient_checkpointing(model, {"use_reentrant": False})
    with torch.no_grad(), no_checkpoints, trainer.accelerator.autocast():
        whole_BT = model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            max_new_tokens=trainer.objective.max_new_tokens,
            pad_token_id=pad_id,
            eos_token_id=sorted(trainer.stop_ids),
        )
    model.train()
    rows = []
    for prompt, answer in zip(prompts, whole_BT[:, ids_BT.shape[1] :].tolist(), strict=True):
        end = next((place for place, token in enumerate(answer, start=1) if token in trainer.stop_ids), len(answer))
        rows.append((prompt + answer[:end], [False] * len(prompt) + [True] * end))
    batch = TokenRows.from_pairs(rows).collate(range(len(rows)), pad_id)
    return {key: value.to(device) for key, value in batch.items()}


def trained_hidden(model: Any, head: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
    """Inputs of the output head (N, H) at the positions whose next token is trained, and the output of that forward.

    A hook takes them and lets one position through to the head, whose logits nothing needs.
    """
    import torch

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
        output = model(**{key: value for key, value in inputs.items() if key != "labels"}, use_cache=False)
    finally:
        hook.remove()
    return taken[0], output


def evaluate_rows(trainer: Any, rows: Rows, pad_id: int, micro_batch: int) -> Mapping[str, float]:
    """Mean divergence (`loss`) and negative log-likelihood of the rows' own tokens (`nll`), in nats. On all ranks."""
    import torch

    from graftwork.training.objectives.trainer import share

    accelerator, head = trainer.accelerator, trainer.model.get_output_embeddings()
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    trainer.model.eval()
    with torch.no_grad():
        for batch in share(rows.lengths_N, micro_batch, accelerator.process_index, accelerator.num_processes):
            inputs = {key: value.to(accelerator.device) for key, value in rows.collate(batch, pad_id).items()}
            with accelerator.autocast():
                divergence_N, _, _ = divergences(trainer, trainer.model, inputs)
                logits_NV = head(trained_hidden(trainer.model, head, inputs)[0])
            targets_N = inputs["labels"][:, 1:][inputs["labels"][:, 1:] != IGNORED]
            sums[0] += divergence_N.double().sum()
            sums[1] += torch.nn.functional.cross_entropy(logits_NV.float(), targets_N, reduction="sum").double()
            sums[2] += targets_N.numel()
    trainer.model.train()
    divergence, nll, tokens = accelerator.reduce(sums, reduction="sum").tolist()
    return {"loss": divergence / tokens, "nll": nll / tokens}


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
