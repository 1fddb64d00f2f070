"""Retrieval of passages for a question, used by serving and by RAFT-style training for its distractors."""

from graftwork.retrieval.bm25 import STOP_WORDS, LexicalIndex, LexicalSpec, corpus_digest
from graftwork.retrieval.protocol import Hit, Retriever
from graftwork.retrieval.retriever import RetrieverSpec, open_retriever, training_context

__all__ = [
    "STOP_WORDS",
    "Hit",
    "LexicalIndex",
    "LexicalSpec",
    "Retriever",
    "RetrieverSpec",
    "corpus_digest",
    "open_retriever",
    "training_context",
]
