"""How failures are probed."""

from pydantic import Field

from graftwork.config import Spec


class ProbeSpec(Spec):
    """`probes: true` takes the defaults."""

    corpus: str | None = None
    """Where gold passages are (by `doc_id`): JSONL of passages; null takes the first retriever's corpus."""
    arms: tuple[str, ...] = ()
    """Whose failures are probed; none named: all arms'."""
    reference: str | None = None
    """The arm whose failures the card is about; null takes the best prompted base (no adapter, no retriever), else the
    baseline."""
    max_failures: int = Field(default=100, ge=1)
    """Failures probed per arm, drawn by the seed where there are more."""
    distractors: int = Field(default=19, ge=1, le=64)
    """Other rows' right answers that the gold answer is held against: a model that knows nothing prefers the gold
    answer to 19 others once in 20."""
    min_share: float = Field(default=0.1, gt=0, lt=1)
    """Smallest share of the failures that counts. A cause matters if its share is shown to be above this, and is
    dismissed if shown to be below."""
