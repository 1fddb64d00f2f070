"""Passages of a corpus for a question: serving asks, and RAFT-style training draws its distractors from it."""

from graftwork.retrieval.hit import Hit, Retriever
from graftwork.retrieval.lexical import LexicalIndex, corpus_digest, open_lexical
from graftwork.retrieval.retriever import open_retriever
from graftwork.retrieval.spec import RerankSpec, RetrieverSpec
from graftwork.retrieval.training import training_context
from graftwork.retrieval.words import STOP_WORDS

__all__ = ["STOP_WORDS", "Hit", "LexicalIndex", "RerankSpec", "Retriever", "RetrieverSpec", "corpus_digest",
           "open_lexical", "open_retriever", "training_context"]  # fmt: skip
