"""What is learned: the kinds of finetuning; rows by `training.rows`, trainers by `training.objectives`."""

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, JsonValue, Tag, model_validator

from graftwork.base.spec import BaseSpec
from graftwork.config import Spec
from graftwork.quantization.spec import QuantSpec
from graftwork.scoring import Pattern
from graftwork.storage.store import ALIAS_PATTERN, NAME_PATTERN
from graftwork.training.objectives.text_spec import AnswersSpec, CptSpec, FimSpec, Packing

if TYPE_CHECKING:
    from graftwork.training.spec import TrainSpec


# What an answer can be rewarded for, as a spec names it under `objective.rewards`. `- json` is `- {name: json}`.


class WeightedReward(Spec):
    """How much one reward counts."""

    weight: float = 1.0
    """The rewards of an answer are added up, each times its weight. Below 0 it punishes."""
    clip: tuple[float, float] | None = None
    """Lowest and highest value that is passed on, before the weight."""
    label: Annotated[str, Field(pattern=NAME_PATTERN)] | None = None
    """Its name in the figures; null takes `name`. Two rewards of one name need it."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.clip and not self.clip[0] < self.clip[1]:
            raise ValueError(f"clip={list(self.clip)} is empty: the lowest value comes first")
        return self


class JsonReward(WeightedReward):
    """1 where the answer is exactly one JSON object, else 0."""

    name: Literal["json"]


class JsonSchemaReward(WeightedReward):
    """1 where the answer is one JSON object that validates, else 0."""

    name: Literal["json_schema"]
    json_schema: str
    """A path, `file://`, `s3://` or `recipe://NAME/FILE`."""


class FormatReward(WeightedReward):
    """Share of gold's fields that the answer has with a value of gold's JSON type; 0 where it has other fields."""

    name: Literal["format"]


class FieldAccuracyReward(WeightedReward):
    """Share of gold's fields that the answer has with exactly gold's value."""

    name: Literal["field_accuracy"]
    json_schema: str | None = None
    """An answer that does not validate gets 0; null asks for one JSON object alone."""


class FieldF1Reward(WeightedReward):
    """F1 of the answer's fields against gold's: a field too many costs as one that is missing."""

    name: Literal["field_f1"]


class ExactReward(WeightedReward):
    """1 where the answer is one of the right texts, else 0."""

    name: Literal["exact"]
    field: str | None = None
    """Field of gold with the right text, or several; null takes the row's assistant turn, else gold's only field."""
    ignore_case: bool = False
    """Compare words alone: case, accents and punctuation do not count."""


class RegexReward(WeightedReward):
    """1 where the answer matches a regular expression, else 0."""

    name: Literal["regex"]
    pattern: Pattern
    """Python's syntax."""
    whole: bool = True
    """It matches the whole answer, not only somewhere in it."""


class LengthReward(WeightedReward):
    """0 up to `max_chars`, then falling evenly to -1 at twice as many."""

    name: Literal["length"]
    max_chars: int = Field(ge=1)


class RewardModelReward(WeightedReward):
    """What a reward model, published by a run with objective.kind=reward on the same base, says of the conversation."""

    name: Literal["reward_model"]
    model: Annotated[str, Field(pattern=ALIAS_PATTERN)]
    """`task@alias` or `task@version`; the version is looked up when the run starts."""


class OwnReward(WeightedReward):
    """A function `f(answer, row, **params) -> float` of an installed package, entry point group `graftwork.rewards`."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    params: dict[str, JsonValue] = {}
    """Passed on by name."""


_BUILT_IN: tuple[type[WeightedReward], ...] = (
    JsonReward,
    JsonSchemaReward,
    FormatReward,
    FieldAccuracyReward,
    FieldF1Reward,
    ExactReward,
    RegexReward,
    LengthReward,
    RewardModelReward,
)
BUILT_IN = tuple(kind.model_fields["name"].annotation.__args__[0] for kind in _BUILT_IN)  # type: ignore[union-attr]
"""Names that need no package."""


def _which(value: Any) -> str:
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return str(name) if name in BUILT_IN else "own"


def _short_form(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


RewardFunctionSpec = Annotated[
    Annotated[JsonReward, Tag("json")]
    | Annotated[JsonSchemaReward, Tag("json_schema")]
    | Annotated[FormatReward, Tag("format")]
    | Annotated[FieldAccuracyReward, Tag("field_accuracy")]
    | Annotated[FieldF1Reward, Tag("field_f1")]
    | Annotated[ExactReward, Tag("exact")]
    | Annotated[RegexReward, Tag("regex")]
    | Annotated[LengthReward, Tag("length")]
    | Annotated[RewardModelReward, Tag("reward_model")]
    | Annotated[OwnReward, Tag("own")],
    Discriminator(_which),
    BeforeValidator(_short_form),
]


# Reinforcement learning: answers are sampled, rewarded, and made likelier or less likely.


class RlSpec(Spec):
    """Reinforcement learning from rewards on sampled answers: GRPO (arXiv 2402.03300) or RLOO (arXiv 2402.14740).

    A row is a prompt: `optim.rows_per_step` prompts a step, `optim.micro_batch` prompts with all their answers a pass.
    """

    kind: Literal["grpo", "rloo"]
    generations: int = Field(default=4, ge=2, le=64)
    """Answers to each prompt: what one answer is worth is told by the others."""
    max_new_tokens: int = Field(default=128, ge=1, le=8192)
    """An answer that has not ended by then is cut, and counted as clipped."""
    temperature: float = Field(default=1.0, gt=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the likeliest tokens that hold this share."""
    beta: float = Field(default=0.04, ge=0)
    """Strength of the pull towards the reference: the adapter that training began from, or the base. 0: none."""
    epsilon: float = Field(default=0.2, gt=0, lt=1)
    """How far one update may move the likelihood of an answer before its gradient is cut: takes effect with
    `iterations` above 1."""
    iterations: int = Field(default=1, ge=1, le=16)
    """Optimizer steps on the same answers."""
    scale_rewards: Literal["group", "batch", "none"] | None = None
    """What rewards above the mean are divided by: the spread within a prompt's answers, that of the step, or nothing.
    null: group for grpo, none for rloo."""
    loss_type: Literal["dapo", "grpo", "dr_grpo", "bnpo"] | None = None
    """How tokens are averaged (grpo alone): over all tokens of the step (dapo, what null takes), each answer first
    (grpo), by `max_new_tokens` (dr_grpo, arXiv 2503.20783), within a pass (bnpo)."""
    rewards: tuple[RewardFunctionSpec, ...]

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        if self.kind == "rloo" and self.loss_type is not None:
            raise ValueError(f"loss_type={self.loss_type} is grpo's: rloo weighs whole answers")
        if self.kind == "rloo" and self.scale_rewards == "group":
            raise ValueError("scale_rewards=group is grpo's: rloo takes batch or none")
        if not self.rewards:
            raise ValueError("rewards is empty: name at least one, for example json")
        labels = [reward.label or reward.name for reward in self.rewards]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"two rewards are called {twice[0]!r}: give one of them a `label`")
        return self


def check_rl(spec: "TrainSpec") -> None:
    """Raise ValueError where the rest of the spec does not go with reinforcement learning."""
    objective, adapter = spec.objective, spec.adapter
    if not isinstance(objective, RlSpec):
        return
    where = f"objective.kind={objective.kind}"
    if adapter.virtual_tokens or adapter.trains_base:
        why = "its answers are sampled from a cache" if adapter.virtual_tokens else "its reference is the frozen base"
        raise ValueError(f"{where} does not train adapter.kind={adapter.kind}: {why}; use lora, ia3 or bottleneck")
    if adapter.input_dropout:
        raise ValueError(
            f"{where} with adapter.dropout={adapter.input_dropout:g}: an answer's likelihood would differ from "
            "one pass to the next; set adapter.dropout=0"
        )
    if spec.strategy.kind != "ddp":
        raise ValueError(
            f"{where} with strategy.kind={spec.strategy.kind}: every worker samples answers from a whole "
            "model; set strategy.kind=ddp, and quant.kind=nf4 where it must be smaller"
        )
    if objective.max_new_tokens >= spec.max_length:
        raise ValueError(
            f"objective.max_new_tokens={objective.max_new_tokens} leaves a prompt no room in "
            f"max_length={spec.max_length}: prompt and answer share it"
        )
    if spec.checkpoint_every % objective.iterations:
        raise ValueError(
            f"checkpoint_every={spec.checkpoint_every} must be a multiple of objective.iterations="
            f"{objective.iterations}: sampled answers are not kept in a checkpoint"
        )


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
