"""Spec of a study: the published result, the adapters that it needs, the measures and the claims."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from examples.studies.for_each import expand
from graftwork.base.source import BaseSpec
from graftwork.config import Spec
from graftwork.quantization import QuantSpec
from graftwork.serving.evaluation.spec import CompareSpec
from graftwork.serving.spec import ArmSpec
from graftwork.storage.store import DEFAULT_ROOT, NAME_PATTERN

SCORES = {"answers": ("facts", "form", "both", "field_accuracy"), "likelihood": ("nats", "choice", "bias")}


class AdapterSpec(Spec):
    """An adapter to train: a train spec's file, and the keys in which this one differs."""

    file: str
    """Relative to the study's file."""
    set: dict[str, Any] = {}
    """Dotted keys replaced in it."""


class MeasureSpec(Spec):
    """All arms on the same questions, through the served handle."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    kind: Literal["answers", "likelihood"] = "answers"
    """answers: greedy answers scored against the gold object and `answer_schema`. likelihood: how probable each of the
    row's `gold.choices` is as an answer; nothing is generated."""
    eval: str
    """JSONL of questions with `id` and `gold`: a path, `file://`, `s3://` or `recipe://`."""
    limit: int | None = Field(default=None, ge=1)
    """Take the first so many rows; null takes all."""
    answer_schema: str | None = None
    """JSON schema of a valid answer; for kind answers."""
    unit: Literal["id", "doc_id"] = "id"
    """What is independent: each question, or each document with all questions about it, whose scores are averaged."""
    by: str | None = None
    """A field of the rows that parts them into groups, which claims name by `of`."""
    metrics: Annotated[tuple[str, ...], Field(min_length=1)]
    """What is shown: facts, form, both, field_accuracy of answers; nats, choice, bias of likelihoods."""
    arms: Annotated[tuple[ArmSpec, ...], Field(min_length=2)]

    @model_validator(mode="after")
    def _stands(self) -> Self:
        names = [arm.name for arm in self.arms]
        if len(set(names)) != len(names):
            raise ValueError(f"arms: names must differ, found {names}")
        if unknown := [metric for metric in self.metrics if metric not in SCORES[self.kind]]:
            raise ValueError(f"metrics: {unknown[0]!r} is none of {', '.join(SCORES[self.kind])} of kind={self.kind!r}")
        if (self.kind == "answers") != (self.answer_schema is not None):
            raise ValueError("answer_schema: kind answers needs one, kind likelihood has none")
        return self


class ClaimSpec(Spec):
    """What the paper found, as a prediction: arm `a` against arm `b` on one metric, declared before the numbers."""

    statement: str
    """The claim as a sentence."""
    a: str
    b: str
    metric: str
    measure: str | None = None
    """Which measure; null is the first."""
    expect: Literal["higher", "lower", "not lower"]
    """a against b. `not lower`: by no more than `margin`."""
    of: str | int | None = None
    """Only the questions of this group of the measure's `by`."""
    than_of: str | int | None = None
    """The difference between a and b within `of` is itself compared with that within this group."""
    margin: float = Field(default=0.02, gt=0)
    """For `not lower`."""

    @model_validator(mode="after")
    def _two_sides(self) -> Self:
        if self.a == self.b:
            raise ValueError(f"claim: {self.a!r} is compared with itself")
        if self.than_of is not None and self.of is None:
            raise ValueError("than_of needs of, the group that it is compared with")
        return self


class StudySpec(Spec):
    """One published result scaled down: train, measure, and test each claim."""

    kind: Literal["study"] = "study"
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    title: str
    paper: str
    """Citation of the paper, and the result that it reports."""
    deviations: tuple[str, ...] = ()
    """Differences between this study and the paper."""
    root: str = DEFAULT_ROOT
    """Replaces the root of every adapter."""
    base: BaseSpec
    quant: QuantSpec = QuantSpec(kind="nf4")
    for_each: dict[str, list[str | int | float]] = {}
    """Swept keys: an adapter, arm or claim that says `{k}` stands once for every value of k."""
    adapters: tuple[AdapterSpec, ...] = ()
    """Trained in order; a finished run is reused. An arm's `task@alias` means the version trained here."""
    measures: Annotated[tuple[MeasureSpec, ...], Field(min_length=1)]
    claims: Annotated[tuple[ClaimSpec, ...], Field(min_length=1)]
    alpha: float = Field(default=0.05, gt=0, lt=1)
    """Two-sided error rate over all claims (Holm)."""
    equivalence_margin: float = Field(default=0.03, gt=0, lt=1)
    """A difference shown to be smaller counts as none."""
    num_cpus: float = Field(default=2.0, gt=0)
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _expanded(cls, tree: Any) -> Any:
        swept = tree.get("for_each") if isinstance(tree, dict) else None
        if not isinstance(swept, dict) or not all(isinstance(values, list) for values in swept.values()):
            return tree
        return {key: value if key == "for_each" else expand(value, swept) for key, value in tree.items()}

    @model_validator(mode="after")
    def _claims_stand(self) -> Self:
        names = [measure.name for measure in self.measures]
        if len(set(names)) != len(names):
            raise ValueError(f"measures: names must differ, found {names}")
        for claim in self.claims:
            measure = self.measure_of(claim)
            arms = [arm.name for arm in measure.arms]
            for side in (claim.a, claim.b):
                if side not in arms:
                    raise ValueError(f"claims: {side!r} is none of the arms {arms} of {measure.name!r}")
            if claim.metric not in SCORES[measure.kind]:
                raise ValueError(f"claims: metric={claim.metric!r} is none of {', '.join(SCORES[measure.kind])}")
            if claim.of is not None and measure.by is None:
                raise ValueError(f"claims: of={claim.of!r}, but {measure.name!r} has no `by` to part its questions")
        return self

    def comparison(self, measure: MeasureSpec) -> CompareSpec:
        """A measure of answers as the comparison that asks them."""
        return CompareSpec(
            name=f"{self.name}-{measure.name}"[:63],
            root=self.root,
            base=self.base,
            quant=self.quant,
            eval=measure.eval,
            limit=measure.limit,
            answer_schema=measure.answer_schema,
            arms=measure.arms,
            baseline=measure.arms[0].name,
            alpha=self.alpha,
            num_cpus=self.num_cpus,
            num_gpus=0,
            seed=self.seed,
        )

    def measure_of(self, claim: ClaimSpec) -> MeasureSpec:
        """The measure that a claim is about. Raises ValueError."""
        for measure in self.measures:
            if claim.measure in (None, measure.name):
                return measure
        raise ValueError(f"claims: measure={claim.measure!r} is none of {[measure.name for measure in self.measures]}")
