"""Words of a text as the lexical index sees them: codes, stop words, the words that a query is made of."""

import re

_SILENT_WORDS = """
a about all also am an and any are as at be been by can could did do does for from get give had has have how i if in
into is it its like look me more my need no not of on one or our please said says should show so some tell than that the
their them then there these they this those to up us was we were what when where which who whose why will with would you
your
"""
STOP_WORDS = frozenset(_SILENT_WORDS.split())
"""Words that say nothing of the topic; dropped from queries unless written in capitals, as a code may be."""
_WORD = re.compile(r"[^\W_]+")
_NO_SMALL_LETTER = re.compile(r"(?<![^\W_])[^\W_a-z]{2,}(?![^\W_])")
"""Words that may be codes: few, so that most of a text is passed over at the speed of the expression."""


def words_of(text: str) -> list[str]:
    """Runs of letters and digits, as they are written."""
    return _WORD.findall(text)


def codes_of(text: str) -> str:
    """Codes of a text, as the index's own column of them holds them."""
    return " ".join(code_token(word) for word in _NO_SMALL_LETTER.findall(text) if is_code(word))


def is_code(word: str) -> bool:
    """Capitals and digits, at least two characters and one capital: ZPPP, A320, not 42 and not Paris."""
    return len(word) > 1 and word.upper() == word and any(char.isupper() for char in word)


def code_token(word: str) -> str:
    """The closing digit keeps the stemmer off."""
    return word.lower() + "0"


def is_telling(word: str) -> bool:
    """Whether a query's word says something of its topic."""
    return is_code(word) or word.lower() not in STOP_WORDS
