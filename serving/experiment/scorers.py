"""What an answer is worth: `form`, `facts`, `both`, `field_accuracy`, each within 0..1. No judge, no network.

Facts are looked for at their key when the answer is a JSON object, else anywhere in the text. Looking anywhere flatters
arms that answer in prose: a number may stand there for another reason. So `facts` compares what arms know, and only
`both` says whether an answer can be used.
"""

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jsonschema
import referencing.exceptions
import referencing.jsonschema
from referencing import Registry, Resource

from graftwork.data import Row, read_text
from graftwork.errors import ConfigError, DataError

_JSON_SPACE = " \t\n\r"
_TOKEN = re.compile(r"(?<![\w.])-\d+(?:\.\d+)?|\w+(?:\.\w+)*")
_UNIT = re.compile(r"(?<=\d)(?=(?:ft|feet|m|km|mi)\b)")
_THOUSANDS = re.compile(r"(?<=\d)[,\u00a0\u202f'](?=\d{3}(?!\d))")


@dataclass(frozen=True)
class Scores:
    """One answer, scored."""

    form: float
    facts: float
    both: float
    field_accuracy: float
    is_json: bool
    """The answer is one JSON object, valid against the schema or not."""


class AnswerSchema:
    """A JSON schema that a whole answer must satisfy."""

    def __init__(self, tree: dict[str, Any], where: str = "answer_schema") -> None:
        """Raises ConfigError: not a JSON schema, or one that points outside itself."""
        cls = jsonschema.validators.validator_for(tree, default=jsonschema.Draft202012Validator)
        try:
            cls.check_schema(tree)
        except jsonschema.SchemaError as error:
            raise ConfigError(f"answer_schema={where}", f"it is no JSON schema ({error.message})") from error
        resource = Resource.from_contents(tree, default_specification=referencing.jsonschema.DRAFT202012)
        base = resource.id() or ""
        registry = Registry().with_resource(base, resource)  # knows the schema alone: no reference is ever fetched
        for ref in _refs(tree):
            try:
                registry.resolver(base).lookup(ref)
            except referencing.exceptions.Unresolvable as error:
                found, rule = f"it refers to {ref!r}, which is not in it", "a schema stands alone: nothing is fetched"
                raise ConfigError(f"answer_schema={where}", found, rule, "put it under $defs") from error
        self._validator = cls(tree, registry=registry)

    @classmethod
    def load(cls, uri: str) -> "AnswerSchema":
        """From a path, `file://`, `s3://` or `recipe://NAME/FILE`. Raises ConfigError, DataError, StorageError."""
        try:
            tree = json.loads(read_text(uri))
        except ValueError as error:
            raise ConfigError(f"answer_schema={uri}", f"it is not JSON ({error})") from error
        if not isinstance(tree, dict):
            raise ConfigError(f"answer_schema={uri}", f"found {type(tree).__name__}", "a schema is a JSON object")
        return cls(tree, uri)

    def holds(self, answer: Mapping[str, Any]) -> bool:
        """Whether the object validates."""
        return bool(self._validator.is_valid(answer))


@dataclass(frozen=True)
class Key:
    """The gold answer of one question. `given` are the fields that the question itself gives away."""

    gold: Mapping[str, Any]
    given: frozenset[str]

    @classmethod
    def of(cls, row: Row) -> "Key":
        """From an evaluation row. Raises DataError where there is nothing to be found."""
        if not row.gold:
            raise DataError(f"row {row.id!r}: gold", "missing or empty", "a compared row has a gold object of fields")
        key = cls(row.gold, frozenset(row.asked))
        if not key.wanted:
            found = f"every field is null or given away by the question (asked: {sorted(key.given)})"
            raise DataError(f"row {row.id!r}: gold", found, "facts need at least one field to be found")
        return key

    @cached_property
    def wanted(self) -> tuple[str, ...]:
        """Fields whose value is to be found: neither given away nor null or empty."""
        return tuple(
            name for name, value in self.gold.items() if name not in self.given and value not in (None, "", [], {})
        )


def score(text: str, key: Key, schema: AnswerSchema) -> Scores:
    """The scores of one answer. An answer that is not one JSON object fails form, both and field_accuracy."""
    answer = parse_object(text)
    form = answer is not None and schema.holds(answer)
    right = sum(name in answer and exactly(answer[name], value) for name, value in key.gold.items()) if answer else 0
    accuracy = right / len(key.gold) if form else 0.0
    return Scores(
        float(form), _facts(text, answer, key), float(form and right == len(key.gold)), accuracy, answer is not None
    )


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


def _refs(tree: object) -> Iterator[str]:
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            if name in ("$ref", "$dynamicRef") and isinstance(value, str):
                yield value
            yield from _refs(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _refs(value)


def _facts(text: str, answer: Mapping[str, Any] | None, key: Key) -> float:
    if answer is not None:
        found = sum(_same_tokens(answer.get(name), key.gold[name]) for name in key.wanted)
    else:
        words = tokens(text)
        found = sum(all(_within(tokens(leaf), words) for leaf in _leaves(key.gold[name])) for name in key.wanted)
    return found / len(key.wanted)


def _same_tokens(found: object, gold: object) -> bool:
    return [tokens(leaf) for leaf in _leaves(found)] == [tokens(leaf) for leaf in _leaves(gold)]


def _leaves(value: object) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name in sorted(value):
            yield from _leaves(value[name])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _within(part: Sequence[str], whole: Sequence[str]) -> bool:
    """Whether the tokens stand in the text, next to each other and in order."""
    n = len(part)
    return n > 0 and any(tuple(whole[i : i + n]) == tuple(part) for i in range(len(whole) - n + 1))


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
