"""What a comparison is asked to do: arms, held-out questions, a schema, a declared baseline."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from graftwork.base_model import BaseSpec, QuantSpec
from graftwork.config import Spec
from graftwork.serving.spec import ArmSpec, EngineSpec
from graftwork.storage import DEFAULT_ROOT, NAME_PATTERN


class ContrastSpec(Spec):
    """A claim declared before the answers are seen: arm `a` against arm `b` on one metric."""

    a: str
    b: str
    metric: Literal["facts", "form", "both", "field_accuracy"]


class CompareSpec(Spec):
    """All arms answer all questions through the served handle; verdicts come with intervals."""

    kind: Literal["compare"] = "compare"
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    root: str = DEFAULT_ROOT
    base: BaseSpec
    quant: QuantSpec = QuantSpec(kind="nf4")
    eval: str
    """JSONL of questions with `id` and `gold`: a path, `file://`, `s3://` or `recipe://`."""
    limit: int | None = Field(default=None, ge=1)
    """Take the first so many rows; null takes all."""
    answer_schema: str
    """JSON schema of a valid answer: a path or `recipe://NAME/schema.json`."""
    arms: Annotated[tuple[ArmSpec, ...], Field(min_length=2)]
    baseline: str
    """The arm that the others are tested against."""
    contrasts: tuple[ContrastSpec, ...] = ()
    """Claims to be tested beside the baseline's: declared here, so before the answers (Holm over all of them)."""
    alpha: float = Field(default=0.05, gt=0, lt=1)
    """Two-sided error rate of each family of tests (Holm within the family)."""
    equivalence_margin: float = Field(default=0.03, gt=0, lt=1)
    """Differences smaller than this count as none (TOST)."""
    concurrency: int = Field(default=128, ge=1)
    """Questions in flight at once, over all arms."""
    samples: int = Field(default=3, ge=0)
    """Questions that the report shows with every arm's answer, drawn by the seed."""
    engine: EngineSpec = EngineSpec()
    num_cpus: float = Field(default=2.0, gt=0)
    num_gpus: float = Field(default=0.0, ge=0)
    seed: int = 0

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
