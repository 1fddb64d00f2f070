"""Two rankings become one: weighted reciprocal rank fusion (Cormack, Clarke, Buettcher, SIGIR 2009)."""

from collections.abc import Sequence
from dataclasses import dataclass

from graftwork.chat import Passage
from graftwork.retrieval.hit import Hit, Retriever

RANK_OFFSET = 60
"""k of the paper: how little the first ranks differ."""
_DEPTH = 50
"""Passages taken from each ranking."""


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
