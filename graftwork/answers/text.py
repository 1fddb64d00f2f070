"""What a text says: the object that it is, its words, and when two values are the same."""

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

_JSON_SPACE = " \t\n\r"
_TOKEN = re.compile(r"(?<![\w.])-\d+(?:\.\d+)?|\w+(?:\.\w+)*")
_UNIT = re.compile(r"(?<=\d)(?=(?:ft|feet|m|km|mi)\b)")
_THOUSANDS = re.compile(r"(?<=\d)[,\u00a0\u202f'](?=\d{3}(?!\d))")


def parse_object(text: str) -> dict[str, Any] | None:
    """The answer as an object when it is exactly one JSON object (whitespace around it allowed), else None.

    Strict as RFC 8259: no code fence, no trailing text, no NaN; an object that names a key twice is refused.
    """
    try:
        value = json.loads(text.strip(_JSON_SPACE), parse_constant=_refuse_constant, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def exactly(found: object, gold: object) -> bool:
    """Same JSON type and value; strings after Unicode NFC and outer whitespace, numbers by value (13 is 13.0)."""
    if isinstance(gold, str) and isinstance(found, str):
        return unicodedata.normalize("NFC", found).strip() == unicodedata.normalize("NFC", gold).strip()
    if isinstance(gold, bool) or isinstance(found, bool):
        return found is gold
    return found == gold


def tokens(text: str) -> tuple[str, ...]:
    """Words and numbers in comparable form: NFKC, case folded, accents dropped, `1,026ft` as 1026 ft, `13.0` as 13."""
    folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
    plain = "".join(char for char in folded if not unicodedata.combining(char))
    return tuple(_number(token) for token in _TOKEN.findall(_UNIT.sub(" ", _THOUSANDS.sub("", plain))))


def leaves(value: object) -> Iterator[str]:
    """The texts that a JSON value is made of, objects by key."""
    if isinstance(value, Mapping):
        for name in sorted(value):
            yield from leaves(value[name])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _number(token: str) -> str:
    if re.fullmatch(r"-?\d+\.\d+", token):
        return token.rstrip("0").rstrip(".")
    return token


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise ValueError("a key stands twice")
    return tree
