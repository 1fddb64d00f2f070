"""What a search returns, and what every retriever offers."""

from dataclasses import dataclass
from typing import Protocol

from graftwork.chat import Passage


@dataclass(frozen=True, slots=True)
class Hit:
    """A found passage; a higher score is a better match. Scores of different kinds of retrieval don't compare."""

    passage: Passage
    score: float


class Retriever(Protocol):
    """Searches one corpus. Safe to use from several threads."""

    def search(self, query: str, k: int) -> list[Hit]:
        """The k best passages, best first. Any text is a query."""
        ...

    def get(self, passage_id: str) -> Passage | None:
        """A passage by id."""
        ...
