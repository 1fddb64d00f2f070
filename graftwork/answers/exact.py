"""Right texts and patterns that an answer is held against."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import regex
from pydantic import AfterValidator

from graftwork.answers.text import tokens
from graftwork.errors import DataError


def _compiles(pattern: str) -> str:
    try:
        regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"it is no regular expression ({error})") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]
"""A regular expression in a spec, in Python's syntax; refused where it is none."""
REGEX_TIMEOUT_S = 0.2
"""A pattern that backtracks for longer does not match: an answer may not hold up the endpoint."""


@dataclass(frozen=True)
class GoldText:
    """Where the right text of a row is."""

    field: str | None

    def find_texts(self, gold: Mapping[str, Any] | None, reference: str | None, row: str = "") -> tuple[str, ...]:
        """The right texts: any of them will do. Raises DataError where there is none."""
        if self.field is None and reference is not None:
            return (reference,)
        found = self._value(gold or {})
        texts = found if isinstance(found, list) else [found]
        if not texts or not all(isinstance(text, str | int | float) and str(text).strip() for text in texts):
            raise DataError(f"row {row!r}: gold" + (f".{self.field}" if self.field else ""), f"found {found!r}",
                            "the right text is a string, or a list of them",
                            "name the scorer's `field`, or end the row with the right answer")  # fmt: skip
        return tuple(str(text) for text in texts)

    def _value(self, gold: Mapping[str, Any]) -> Any:
        if self.field is not None:
            return gold.get(self.field)
        return next(iter(gold.values())) if len(gold) == 1 else None


def same_text(answer: str, right: str, *, ignore_case: bool) -> bool:
    """Equal but for outer whitespace; `ignore_case` compares words alone: case, accents, punctuation do not count."""
    if ignore_case:
        return tokens(answer) == tokens(right)
    return unicodedata.normalize("NFC", answer).strip() == unicodedata.normalize("NFC", right).strip()


@dataclass(frozen=True)
class TextMatch:
    """An answer compared with the right texts as SQuAD compares them; each figure is the best over the texts."""

    em: bool
    """The answer equals a right text after normalisation."""
    f1: float
    """F1 of the words that the answer shares with a right text, order ignored."""
    contains: bool
    """The words of a right text are in the answer, next to each other and in order; true wherever `em` is."""

    @classmethod
    def compare(cls, answer: str, right: Sequence[str]) -> "TextMatch":
        """Compare an answer with one or more right texts."""
        words = squad_words(answer)
        references = [squad_words(text) for text in right]
        return cls(
            em=words in references,
            f1=max(_shared_f1(words, reference) for reference in references),
            contains=any(_holds(words, reference) for reference in references),
        )


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad_words(text: str) -> list[str]:
    """Words of a text by SQuAD's normalisation: lower case, no ASCII punctuation, no English articles.

    `normalize_answer` of the official script (Rajpurkar et al. 2016, evaluate-v2.0.py), split at white space.
    """
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _shared_f1(a: Sequence[str], b: Sequence[str]) -> float:
    """SQuAD 2.0's F1: where one side has no words, 1 if both have none, else 0."""
    if not a or not b:
        return float(a == b)
    return 2 * (Counter(a) & Counter(b)).total() / (len(a) + len(b))


def _holds(words: Sequence[str], part: Sequence[str]) -> bool:
    if not part:
        return not words
    return any(words[start : start + len(part)] == part for start in range(len(words) - len(part) + 1))


def matches(answer: str, pattern: str, *, whole: bool) -> bool:
    """Whether the answer, or a part of it, matches a regular expression within `REGEX_TIMEOUT_S`."""
    compiled = regex.compile(pattern)  # the package caches what it compiled
    try:
        return (compiled.fullmatch if whole else compiled.search)(answer, timeout=REGEX_TIMEOUT_S) is not None
    except TimeoutError:
        return False
