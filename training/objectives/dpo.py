"""Preference optimisation on pairs of answers, with the reference's likelihoods computed once a pair.

TRL would keep a second copy of the adapter (or of the whole model) as the reference and run it beside the policy in
each step, or compute its likelihoods for every row of the dataset, which here lists a pair once an epoch. What training
begins from is in this process when the trainer is built, so it scores each pair once then; nothing is kept beside it.
"""

from __future__ import annotations

import functools
import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from graftwork.config import Spec, canonical_json
from graftwork.datasets.examples import Example, iter_examples
from graftwork.datasets.keys import PREFERENCE_LOSS, KeyCheck
from graftwork.datasets.rows import naming
from graftwork.datasets.turns import turn_content
from graftwork.prompts.render import Message, Prompt, Thinking, render
from graftwork.training.objectives.preference import answer_logps, reference_logps
from graftwork.training.objectives.protocol import Part, Traits, check_pairs, nothing_left, too_long
from graftwork.training.objectives.rows import IGNORED, ReadPart, TokenRows, data_of, read_prompt

if TYPE_CHECKING:
    import torch

    from graftwork.prompts.template import Template
    from graftwork.training.objectives.trainer import BuiltTrainer, TrainerContext
    from graftwork.training.spec import TrainSpec

SIDES = ("ref_chosen_logps", "ref_rejected_logps")
Scored = tuple[Sequence[int], Sequence[bool]]
"""Ids of a conversation, and which of them are the answer's."""


class DpoSpec(Spec):
    """Direct preference optimisation on `chosen` and `rejected` answers (arXiv 2305.18290)."""

    kind: Literal["dpo"] = "dpo"
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference: what training began from, the base or `init_from`."""
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust"] = "sigmoid"
    """sigmoid: DPO; hinge: SLiC (arXiv 2305.10425); ipo: arXiv 2310.12036; robust: arXiv 2403.00409."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs whose labels are taken to be swapped; of loss_type=robust alone."""

    @model_validator(mode="after")
    def _takes_effect(self) -> Self:
        if (self.loss_type == "robust") != (self.label_smoothing > 0):
            raise ValueError(
                f"label_smoothing={self.label_smoothing:g} with loss_type={self.loss_type}: it belongs to "
                "loss_type=robust, which needs one above 0"
            )
        return self

    @property
    def traits(self) -> Traits:
        return Traits(sequences=2, head="fused", conversations=False, scored_before=1)

    def check(self, run: TrainSpec) -> None:
        check_pairs(run, self.kind)

    def read(self, spec: TrainSpec, template: Template, part: Part) -> ReadPart:
        """Read the pairs of which both conversations fit. Raises DataError, StorageError."""
        return read_pairs(spec, template, part)

    def build(self, setting: TrainerContext) -> BuiltTrainer:
        """Preference learning on the setting's pairs; the reference is the model as it is now."""
        import torch

        from graftwork.training.objectives.trainer import BuiltTrainer

        spec, data, plan = setting.job.spec, setting.job.data, setting.plan
        micro_batch = spec.optim.rows_per_pass
        references: dict[str, NDArray[np.float32]] = {}

        def collate(batch: list[dict[str, int]]) -> dict[str, torch.Tensor]:
            rows = [item["row"] for item in batch]
            reference_N2 = references["train"]
            sides = {key: torch.from_numpy(reference_N2[rows, side]) for side, key in enumerate(SIDES)}
            return {**setting.collate(batch), **sides}

        trainer = _trainer(setting, self, collate)
        references["train"] = reference_logps(setting, "train", trainer, data.train, np.unique(plan.rows_SR))
        if data.eval is not None:
            references["eval"] = reference_logps(setting, "eval", trainer, data.eval, np.arange(len(data.eval)))

        def evaluate() -> Mapping[str, float]:
            assert data.eval is not None, "asked where the spec has data.eval"
            return evaluate_pairs(trainer, self, data.eval, references["eval"], data.pad_id, micro_batch)

        held = 0 if data.eval is None else len(data.eval)
        every = setting.job.eval_every or spec.eval_every
        evaluations = plan.steps // every + (plan.steps % every > 0)
        once, again = len(np.unique(plan.rows_SR)) + held, plan.rows_SR.size + held * evaluations
        note = f"reference: {once} pairs scored once, {again} would be scored with the policy"
        return BuiltTrainer(trainer, evaluate, (note,))


@dataclass(frozen=True)
class PairRows:
    """Pairs of equal number and order; the two conversations of a pair begin with the same prompt ids."""

    chosen: TokenRows
    rejected: TokenRows

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def lengths_N(self) -> NDArray[np.int64]:
        """Tokens of both conversations."""
        return self.chosen.lengths_N + self.rejected.lengths_N

    @property
    def scored_N(self) -> NDArray[np.int64]:
        """Tokens of both answers."""
        return self.chosen.scored_N + self.rejected.scored_N

    @property
    def widths_N(self) -> NDArray[np.int64]:
        """Tokens of the longer conversation."""
        return np.maximum(self.chosen.lengths_N, self.rejected.lengths_N)

    def digest(self) -> str:
        """sha256 hex over both sides."""
        return hashlib.sha256((self.chosen.digest() + self.rejected.digest()).encode()).hexdigest()

    def collate(self, indices: Sequence[int], pad_id: int) -> dict[str, torch.Tensor]:
        """TRL's form: ids, attention and completion mask (2B, T), first all chosen ones, then all rejected ones."""
        import torch

        sides = [side.collate(indices, pad_id) for side in (self.chosen, self.rejected)]
        width = max(side["input_ids"].shape[1] for side in sides)

        def joined(key: str, fill: int) -> torch.Tensor:
            return torch.cat([torch.nn.functional.pad(s[key], (0, width - s[key].shape[1]), value=fill) for s in sides])

        return {
            "input_ids": joined("input_ids", pad_id),
            "attention_mask": joined("attention_mask", 0),
            "completion_mask": (joined("labels", IGNORED) != IGNORED).long(),
        }


def read_pairs(spec: TrainSpec, template: Template, part: Part) -> ReadPart:
    """The pairs of which both conversations fit. Raises DataError, StorageError."""
    source, limit = data_of(spec, part)
    prompt, shots = read_prompt(spec, part)
    keys, contents = KeyCheck(more=PREFERENCE_LOSS), array("q")
    chosen: list[Scored] = []
    rejected: list[Scored] = []
    dropped, raw = 0, hashlib.sha256()
    numbers = []
    for number, pair in enumerate(iter_examples(source, "pairs", limit=limit, keys=keys), start=1):
        contents.append(pair.content_hash())
        raw.update(_canonical(pair) + b"\n")
        better, worse = (
            answered(pair, answer, template, prompt, spec.data.thinking) for answer in (pair.chosen, pair.rejected)
        )
        longest = max(len(better[0]), len(worse[0]))
        if longest <= spec.max_length:
            chosen.append(better)
            rejected.append(worse)
            numbers.append(number)
            continue
        dropped += 1
        if spec.on_overlong == "refuse":
            raise too_long(spec, part, number, pair.id, longest)
    if not chosen:
        raise nothing_left(spec, part, dropped)
    rows = PairRows(TokenRows.from_pairs(chosen), TokenRows.from_pairs(rejected))
    warnings = (*keys.note(f"data.{part}"), *shots)
    return ReadPart(rows, dropped, raw.hexdigest(), (), (), warnings, contents, keys, tuple(numbers))


def answered(pair: Example, answer: Message | None, template: Template, prompt: Prompt, thinking: Thinking) -> Scored:
    """A conversation up to the token that ends the answer, and which of its ids are the answer's."""
    assert answer is not None, "an example that was read as a pair"
    as_written = functools.partial(
        render, prompt=prompt, tools=pair.tools, template_kwargs=pair.template_kwargs, thinking=thinking
    )
    with naming(pair):
        asked = as_written(pair.messages, template, generate=True)
        whole = as_written([*pair.messages, answer], template, generate=False)
    start = len(asked.ids)
    assert whole.ids[:start] == asked.ids, "a prompt is a prefix of what it grows into (render)"
    end = max(place for place, learned in enumerate(whole.loss_mask, start=1) if learned)
    return whole.ids[:end], (False,) * start + whole.loss_mask[start:end]


def _canonical(pair: Example) -> bytes:
    """The content of a pair, for the fingerprint: text alone where there is nothing else."""
    answers = [one for one in (pair.chosen, pair.rejected) if one is not None]
    content: list[Any] = [pair.id, [[m.role, m.content] for m in pair.messages], [one.content for one in answers]]
    turns = [*pair.messages, *answers]
    if pair.tools or pair.template_kwargs or any(turn_content(turn)[2:] != [None, None, []] for turn in turns):
        content += [list(map(turn_content, turns)), list(pair.tools), dict(pair.template_kwargs)]
    return canonical_json(content).encode()


def _trainer(setting: TrainerContext, objective: DpoSpec, collate: Any) -> Any:
    from peft import PeftModel
    from trl import DPOConfig, DPOTrainer

    from graftwork.compat.hf import takes_token_rows, without_reference_pass
    from graftwork.training.objectives.trainer import arguments, without_history

    peft = isinstance(setting.model, PeftModel)
    trainer_class = without_history(without_reference_pass(takes_token_rows(DPOTrainer)))
    trainer = trainer_class(
        args=DPOConfig(
            **arguments(setting),
            beta=objective.beta,
            loss_type=[objective.loss_type],
            label_smoothing=objective.label_smoothing,
            max_length=None,
            precompute_ref_log_probs=not peft,  # else TRL 1.16 loads the base a second time, by its name
        ),
        **{**setting.trainer_arguments(), "data_collator": collate},
    )
    if peft:
        trainer.model.delete_adapter("ref")  # TRL's copy of what training begins from
    trainer.precompute_ref_logps = True
    return trainer


def evaluate_pairs(
    trainer: Any, objective: DpoSpec, rows: Any, reference_N2: NDArray[np.float32], pad_id: int, micro: int
) -> Mapping[str, float]:
    """Loss, accuracy (the chosen answer's reward is the higher one), margin and rewards over all pairs."""
    import torch

    policy_N2 = answer_logps(trainer, rows, np.arange(len(rows)), pad_id, micro)
    ratios_N2 = torch.from_numpy(policy_N2 - reference_N2).double()
    lengths_N2 = torch.from_numpy(np.stack([rows.chosen.scored_N, rows.rejected.scored_N], axis=1))
    rewards_N2 = objective.beta * ratios_N2
    chosen, rejected = rewards_N2.unbind(1)
    return {
        "loss": pair_losses(objective, ratios_N2, lengths_N2).mean().item(),
        "accuracy": (chosen > rejected).double().mean().item(),
        "margin": (chosen - rejected).mean().item(),
        "rewards/chosen": chosen.mean().item(),
        "rewards/rejected": rejected.mean().item(),
    }


def pair_losses(objective: DpoSpec, ratios_N2: torch.Tensor, lengths_N2: torch.Tensor) -> torch.Tensor:
    """Loss of each pair from the log ratios of policy to reference: TRL's formulas, which its step keeps to itself."""
    import torch

    beta, smoothing = objective.beta, objective.label_smoothing
    delta_N = ratios_N2[:, 0] - ratios_N2[:, 1]
    logsigmoid = torch.nn.functional.logsigmoid
    if objective.loss_type == "hinge":
        return torch.relu(1 - beta * delta_N)
    if objective.loss_type == "ipo":
        means_N2 = ratios_N2 / lengths_N2
        return (means_N2[:, 0] - means_N2[:, 1] - 1 / (2 * beta)) ** 2
    swapped_N = -smoothing * logsigmoid(-beta * delta_N)
    return (-(1 - smoothing) * logsigmoid(beta * delta_N) - swapped_N) / (1 - 2 * smoothing)
