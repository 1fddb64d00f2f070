"""Hybrid retrieval: weighted reciprocal rank fusion of BM25 and vectors (Cormack, Clarke, Buettcher, SIGIR 2009)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from graftwork.prompts.render import Passage
from graftwork.retrieval.bm25 import LexicalIndex
from graftwork.retrieval.dense import VectorKind
from graftwork.retrieval.protocol import Hit, Retriever

RANK_OFFSET = 60
"""k of the paper: how little the first ranks differ."""
_DEPTH = 50
"""Passages taken from each ranking."""
DenseWeight = Annotated[float, Field(gt=0, le=1)]
"""Weight of a rank among the vectors, relative to one among the words."""


class HybridSpec(VectorKind):
    """Lexical and dense search, fused by rank."""

    kind: Literal["hybrid"]
    dense_weight: DenseWeight = 0.25
    """Weight of a rank among the vectors, relative to one among the words."""

    def open(self, lexical: LexicalIndex, folder: Path | None) -> Retriever:
        """Return both searches of the corpus as one."""
        return HybridIndex(lexical, self.open_dense(lexical, folder), self.dense_weight)


@dataclass(frozen=True)
class HybridIndex:
    """Lexical and dense search of the same corpus, fused by rank."""

    lexical: Retriever
    dense: Retriever
    dense_weight: float

    def search(self, query: str, k: int) -> list[Hit]:
        """The k passages of the largest sum of weight / (60 + rank); equal ones in the order of the lexical ranking."""
        depth = max(_DEPTH, k)
        rankings = (self.lexical.search(query, depth), self.dense.search(query, depth))
        return fuse(rankings, (1.0, self.dense_weight))[:k]

    def get(self, passage_id: str) -> Passage | None:
        """A passage by id."""
        return self.lexical.get(passage_id)


def fuse(rankings: Sequence[Sequence[Hit]], weights: Sequence[float]) -> list[Hit]:
    """All passages of the rankings, best first."""
    scores: dict[Passage, float] = {}
    for ranking, weight in zip(rankings, weights, strict=True):
        for rank, hit in enumerate(ranking, start=1):
            scores[hit.passage] = scores.get(hit.passage, 0.0) + weight / (RANK_OFFSET + rank)
    return [Hit(passage, score) for passage, score in sorted(scores.items(), key=lambda item: -item[1])]
