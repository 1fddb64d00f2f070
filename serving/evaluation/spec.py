"""Spec of a comparison: arms, held-out questions, scorers, a declared baseline, probes and judge."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from graftwork.base.source import BaseSpec
from graftwork.config import Spec
from graftwork.planning.hardware import AUTO, Gpus, resolved_count
from graftwork.quantization import QuantSpec
from graftwork.serving.evaluation.scorers.json_answer import FieldsSpec
from graftwork.serving.evaluation.scorers.load import ScorerSpec
from graftwork.serving.evaluation.scorers.plugin import OwnSpec
from graftwork.serving.spec import ArmSpec, EngineSpec
from graftwork.storage.store import ALIAS_PATTERN, DEFAULT_ROOT, NAME_PATTERN


class JudgeSpec(Spec):
    """An LLM judge. Without `url` it is the served base, or an adapter of it."""

    criteria: str = Field(
        default="It answers the question rightly and completely, in the form asked for.", min_length=1
    )
    """Criteria of the better answer, in words for the judge."""
    adapter: Annotated[str, Field(pattern=ALIAS_PATTERN)] | None = None
    """`task@alias` of an adapter that was trained to judge."""
    url: str | None = Field(default=None, pattern=r"^https?://")
    """Another endpoint with an OpenAI-compatible `/v1/chat/completions`."""
    model: str | None = None
    """Its model."""
    token_env: str | None = None
    """Environment variable with its token."""
    limit: int | None = Field(default=None, ge=1)
    """Judge the first N questions; null judges all."""

    @model_validator(mode="after")
    def _one_judge(self) -> Self:
        if (self.url is None) != (self.model is None):
            raise ValueError("judge.url and judge.model go together")
        if self.url is None and self.token_env is not None:
            raise ValueError("judge.token_env cannot take effect without judge.url")
        if self.url is not None and self.adapter is not None:
            raise ValueError("judge.adapter is of the served base; judge.url asks another endpoint")
        return self


class ProbeSpec(Spec):
    """Probes of failures. `probes: true` takes the defaults."""

    corpus: str | None = None
    """Gold passages (by `doc_id`): JSONL of passages; null takes the first retriever's corpus."""
    arms: tuple[str, ...] = ()
    """Whose failures are probed; none named: all arms'."""
    reference: str | None = None
    """The arm whose failures the card is about; null takes the best prompted base (no adapter, no retriever), else the
    baseline."""
    max_failures: int = Field(default=100, ge=1)
    """Failures probed per arm, drawn by the seed where there are more."""
    distractors: int = Field(default=19, ge=1, le=64)
    """Other rows' right answers that the gold answer is compared with: a model that knows nothing prefers the gold
    answer to 19 others once in 20."""
    min_share: float = Field(default=0.1, gt=0, lt=1)
    """Smallest share of the failures that counts. A cause matters if its share is shown to be above this, and is
    dismissed if shown to be below."""


class ContrastSpec(Spec):
    """A claim declared before the answers are seen: arm `a` against arm `b` on one metric."""

    a: str
    b: str
    metric: str
    """A metric of one of the scorers."""


class CompareSpec(Spec):
    """All arms answer all questions through the served handle; verdicts come with intervals."""

    kind: Literal["compare"] = "compare"
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    root: str = DEFAULT_ROOT
    base: BaseSpec
    quant: QuantSpec = QuantSpec()
    eval: str
    """JSONL of questions with `id` and `gold`: a path, `file://`, `s3://` or `recipe://`."""
    limit: int | None = Field(default=None, ge=1)
    """Take the first N rows; null takes all."""
    answer_schema: str | None = None
    """JSON schema of a valid answer: a path or `recipe://NAME/schema.json`. The scorers `fields` and `json_schema` and
    the form probe compare answers with it."""
    scorers: tuple[ScorerSpec, ...] = (FieldsSpec(kind="fields"),)
    """Scorers of the answers."""
    primary: str | None = None
    """The metric that the verdict is about; null takes `both` where there is one, else the first score."""
    slices: tuple[str, ...] = ()
    """Fields of the rows, or of their gold, whose values part the questions: looked at on the primary metric (BH)."""
    slice_min: int = Field(default=20, ge=2)
    """Fewest questions of a slice; values with fewer are taken together as `(other)`."""
    cluster: str | None = None
    """Field of the rows (say doc_id) whose equal values make questions depend on each other: intervals and tests then
    draw whole clusters."""
    arms: Annotated[tuple[ArmSpec, ...], Field(min_length=2)]
    baseline: str
    """The arm that the others are tested against."""
    contrasts: tuple[ContrastSpec, ...] = ()
    """Claims to be tested next to the baseline's: declared here, so before the answers (Holm over all of them)."""
    alpha: float = Field(default=0.05, gt=0, lt=1)
    """Two-sided error rate of each family of tests (Holm within the family)."""
    equivalence_margin: float = Field(default=0.03, gt=0, lt=1)
    """Differences smaller than this count as none (TOST)."""
    probes: ProbeSpec | None = None
    """Ask why the failures fail, and advise by it: `true`, or how. Needs `doc_id` in the rows to tell what retrieval
    would do."""
    judge: JudgeSpec | None = None
    """An LLM that compares each arm's answers with the baseline's, in both orders. No part of the verdict."""
    concurrency: int = Field(default=128, ge=1)
    """Questions in flight at once, over all arms."""
    samples: int = Field(default=3, ge=0)
    """Questions that the report shows with every arm's answer, drawn by the seed."""
    engine: EngineSpec = EngineSpec()
    num_cpus: float = Field(default=2.0, gt=0)
    num_gpus: Gpus = AUTO
    """GPUs of the engine; 0 computes on the CPU. auto: 1 where the target has GPUs, else 0; with engine.kind vllm
    engine.tensor_parallel_size."""
    seed: int = 0

    @property
    def gpus(self) -> float:
        """GPUs of the engine."""
        return resolved_count(self.num_gpus)

    @model_validator(mode="after")
    def _arms_stand(self) -> Self:
        self.engine.require_gpus(self.num_gpus)
        names = [arm.name for arm in self.arms]
        if len(set(names)) != len(names):
            raise ValueError(f"arms: names must differ, found {names}")
        if self.baseline not in names:
            raise ValueError(f"baseline={self.baseline!r} is none of the arms {names}")
        for contrast in self.contrasts:
            for side in (contrast.a, contrast.b):
                if side not in names:
                    raise ValueError(f"contrasts: {side!r} is none of the arms {names}")
            if contrast.a == contrast.b:
                raise ValueError(f"contrasts: {contrast.a!r} is compared with itself")
        return self

    @field_validator("probes", mode="before")
    @classmethod
    def _true_takes_defaults(cls, value: object) -> object:
        return ({} if value else None) if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _probed_arms_stand(self) -> Self:
        names = {arm.name for arm in self.arms}
        asked = (*self.probes.arms, *([self.probes.reference] if self.probes.reference else [])) if self.probes else ()
        for name in asked:
            if name not in names:
                raise ValueError(f"probes: {name!r} is none of the arms {sorted(names)}")
        if self.probes and self.probes.reference and self.probes.arms and self.probes.reference not in self.probes.arms:
            raise ValueError(f"probes.reference={self.probes.reference!r} is not among probes.arms")
        return self

    @model_validator(mode="after")
    def _metrics_stand(self) -> Self:
        """Scorers of kind `own` have their metric only when they are loaded: `require_metrics` is called again then."""
        if not self.scorers:
            raise ValueError("scorers is empty: a comparison scores answers on something")
        measured = [name for scorer in self.scorers for name in scorer.metric_names if scorer.kind != "latency"]
        if not any(isinstance(scorer, OwnSpec) for scorer in self.scorers):
            self.require_metrics(measured)
        if any(isinstance(scorer, FieldsSpec) for scorer in self.scorers) and self.answer_schema is None:
            raise ValueError("answer_schema is missing: the scorer fields compares answers with it")
        return self

    def require_metrics(self, measured: Sequence[str]) -> None:
        """Raises ValueError for a metric that no scorer measures. A time is measured and not tested."""
        asked = [("primary", self.primary)] if self.primary else []
        asked += [("contrasts", contrast.metric) for contrast in self.contrasts]
        for key, name in asked:
            if name in ("latency_ms", "ttft_ms"):
                raise ValueError(f"{key}: {name} is measured with each arm alone and not tested; name another metric")
            if name not in measured:
                raise ValueError(f"{key}: no scorer measures {name!r}, only {', '.join(measured)}")
