"""What is learned: the kinds of finetuning; rows by `training.rows`, trainers by `training.objectives`."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from graftwork.base_model import BaseSpec, QuantSpec
from graftwork.config import Spec
from graftwork.storage import ALIAS_PATTERN
from graftwork.training.reward_spec import RewardFunctionSpec, RewardModelReward
from graftwork.training.rl_spec import RlSpec as RlSpec
from graftwork.training.text_spec import AnswersSpec, CptSpec, FimSpec, Packing


class SftSpec(Spec):
    """Supervised finetuning: the loss falls on the assistant's turns, by the mask of `chat.render`."""

    kind: Literal["sft"] = "sft"
    packing: Packing = "none"
    """best_fit: several whole conversations a row, none sees another. No padding, so fewer tokens to compute."""
    answers: AnswersSpec | None = None
    """Generate the answers of held-out rows as well, before the first step and at each evaluation."""


class DpoSpec(Spec):
    """Direct preference optimisation on `chosen` and `rejected` answers (arXiv 2305.18290)."""

    kind: Literal["dpo"] = "dpo"
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference: what training began from, the base or `init_from`."""
    loss: Literal["sigmoid", "hinge", "ipo", "robust"] = "sigmoid"
    """sigmoid: DPO; hinge: SLiC (arXiv 2305.10425); ipo: arXiv 2310.12036; robust: arXiv 2403.00409."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs whose labels are taken to be swapped; of loss=robust alone."""

    @model_validator(mode="after")
    def _takes_effect(self) -> Self:
        if (self.loss == "robust") != (self.label_smoothing > 0):
            raise ValueError(
                f"label_smoothing={self.label_smoothing:g} with loss={self.loss}: it belongs to loss=robust, which "
                "needs one above 0"
            )
        return self


class RewardSpec(Spec):
    """A reward model of `chosen` and `rejected` answers: Bradley-Terry."""

    kind: Literal["reward"] = "reward"
    centre: float = Field(default=0.0, ge=0)
    """Pull of the rewards' mean towards 0: this times (chosen + rejected) squared (arXiv 2312.09244); 0.01 is usual."""


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
    def _named(self) -> Self:
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


ObjectiveSpec = Annotated[
    SftSpec | CptSpec | FimSpec | DpoSpec | RewardSpec | RlSpec | DistillSpec, Field(discriminator="kind")
]
