"""Difference between an index and a changed corpus, the result type of a search, and the retriever protocol."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from graftwork.prompts.render import Passage

STRIDE = 64
"""Between the numbers of neighbours, so that others fit in between. Below 128 a step takes one byte of the index."""

Numbered = tuple[int, Passage]


@dataclass(frozen=True)
class Changes:
    """Passages by the number that they have, or get, in the index. A changed text leaves and comes."""

    removed: tuple[Numbered, ...]
    added: tuple[Numbered, ...]
    kept: int


def numbered(passages: Sequence[Passage]) -> tuple[Numbered, ...]:
    """Numbers of a corpus that is indexed from scratch."""
    return tuple((STRIDE * place, passage) for place, passage in enumerate(passages, start=1))


def changes(old: Sequence[Numbered], new: Sequence[Passage]) -> Changes | None:
    """From `old` to `new`, numbers rising along `new`; None where that can't be had: what stays changed its order, or
    more came between two neighbours than fit.
    """
    known = {passage: number for number, passage in old}
    numbers = [known.get(passage) for passage in new]
    stay = [number for number in numbers if number is not None]
    if any(after <= before for before, after in zip(stay, stay[1:], strict=False)):
        return None
    added: list[Numbered] = []
    for start, end, floor, ceiling in _gaps(numbers):
        places = _spread(floor, ceiling, end - start)
        if places is None:
            return None
        added += zip(places, new[start:end], strict=True)
    still = set(stay)
    removed = tuple(pair for pair in old if pair[0] not in still)
    return Changes(removed, tuple(added), len(stay))


def _gaps(numbers: Sequence[int | None]) -> Iterator[tuple[int, int, int, int | None]]:
    """Runs without a number as [start, end), with the numbers before and behind them; None: nothing is behind."""
    floor, start = 0, 0
    for place, number in enumerate([*numbers, None]):
        last = place == len(numbers)
        if number is None and not last:
            continue
        if start < place:
            yield start, place, floor, number
        floor, start = number or 0, place + 1


def _spread(floor: int, ceiling: int | None, count: int) -> list[int] | None:
    """`count` numbers between the two, evenly; None where they don't fit."""
    if ceiling is None:
        return [floor + STRIDE * place for place in range(1, count + 1)]
    if ceiling - floor <= count:
        return None
    return [floor + (ceiling - floor) * place // (count + 1) for place in range(1, count + 1)]


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
