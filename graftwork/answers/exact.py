"""Right texts and patterns that an answer is held against."""

import unicodedata
from collections.abc import Mapping
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

    def of(self, gold: Mapping[str, Any] | None, reference: str | None, row: str = "") -> tuple[str, ...]:
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


def matches(answer: str, pattern: str, *, whole: bool) -> bool:
    """Whether the answer, or a part of it, matches a regular expression within `REGEX_TIMEOUT_S`."""
    compiled = regex.compile(pattern)  # the package caches what it compiled
    try:
        return (compiled.fullmatch if whole else compiled.search)(answer, timeout=REGEX_TIMEOUT_S) is not None
    except TimeoutError:
        return False
