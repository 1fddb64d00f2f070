"""The passage that holds a row's answer, and the answers that it is told from."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import count

from graftwork.answers.exact import GoldText
from graftwork.answers.text import leaves, tokens
from graftwork.chat import Message, Passage, PromptSpec, format_user_turn
from graftwork.data import DatasetRow
from graftwork.retrieval import RetrieverSpec, open_retriever
from graftwork.serving.experiment.answers import question


class GoldPassages:
    """Passages by document. A document in pieces (`guide.md#3`) gives the piece that says most of the gold answer."""

    def __init__(self, find: Callable[[str], Passage | None]) -> None:
        """find: a passage by its id."""
        self._find = find

    @classmethod
    def read(cls, corpus: str | None) -> "GoldPassages":
        """Of any corpus or index that a retriever takes. Raises DataError, StorageError."""
        return cls(open_retriever(RetrieverSpec(corpus=corpus)).get if corpus else lambda _: None)

    def find(self, row: DatasetRow) -> Passage | None:
        """None where the row names no document, or the corpus lacks it."""
        if not row.doc_id:
            return None
        whole = self._find(row.doc_id)
        pieces = [whole] if whole else list(self._pieces(row.doc_id))
        return max(pieces, key=lambda passage: _shared(passage.text, row), default=None)

    def _pieces(self, document: str) -> Iterator[Passage]:
        for number in count(1):
            passage = self._find(f"{document}#{number}")
            if passage is None:
                return
            yield passage


def with_context(row: DatasetRow, passage: Passage, prompt: PromptSpec) -> list[dict[str, str]]:
    """The row's question with one passage before it, as `chat.render` puts it for this prompt."""
    turns = question(row)
    last = max(i for i, turn in enumerate(turns) if turn["role"] == "user")
    turns[last] = {
        "role": "user",
        "content": format_user_turn(turns[last]["content"], [passage], prompt.context_header, prompt.citations),
    }
    return turns


def right_answer(row: DatasetRow, references: GoldText | None = None) -> str:
    """The text that a row wants: its first right text, where rows have right texts; else its last turn, else its gold
    as compact JSON.
    """
    if references is not None:
        return references.find_texts(row.gold, row.answer, row.id)[0]
    return row.answer or json.dumps(row.gold, ensure_ascii=False, separators=(",", ":"))


def distractors(
    row: DatasetRow, rows: Sequence[DatasetRow], most: int, seed: int, references: GoldText | None = None
) -> list[str]:
    """Right answers of other rows, with the fields that this row's question gives away kept as they are here.

    references: where the right texts of rows are; a text that is right here too is no distractor.
    """
    others = [other for other in rows if other.id != row.id]
    drawn = random.Random(f"{seed} {row.id}").sample(others, min(most, len(others)))
    if references is not None:
        texts, right = (
            [right_answer(other, references) for other in drawn],
            references.find_texts(row.gold, row.answer, row.id),
        )
    else:
        texts, right = [_as_if(row, other) for other in drawn], (right_answer(row),)
    return [text for text in dict.fromkeys(texts) if text not in right]


def _as_if(row: DatasetRow, other: DatasetRow) -> str:
    if not row.given_fields or set(row.gold or {}) != set(other.gold or {}):
        return right_answer(other)
    kept = {name: (row.gold or {})[name] for name in row.given_fields}
    tree = {name: kept.get(name, value) for name, value in (other.gold or {}).items()}
    return right_answer(DatasetRow(other.id, (Message("user", "?"),), gold=tree))


def _shared(text: str, row: DatasetRow) -> int:
    words = set(tokens(text))
    return sum(words.issuperset(tokens(leaf)) for leaf in leaves(dict(row.gold or {})))
