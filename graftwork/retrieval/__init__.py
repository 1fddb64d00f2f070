"""Retrieval of passages for a question, used by serving and by RAFT-style training for its distractors."""

from graftwork.retrieval.bm25 import STOP_WORDS, LexicalIndex, corpus_digest, open_lexical
from graftwork.retrieval.index import Hit, Retriever
from graftwork.retrieval.retriever import RerankSpec, RetrieverSpec, open_retriever, training_context

__all__ = [
    "STOP_WORDS",
    "Hit",
    "LexicalIndex",
    "RerankSpec",
    "Retriever",
    "RetrieverSpec",
    "corpus_digest",
    "open_lexical",
    "open_retriever",
    "training_context",
]
