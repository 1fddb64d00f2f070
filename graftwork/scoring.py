"""Scoring of one answer against texts, patterns, a JSON schema or a gold object. No judge, no network."""

import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import jsonschema
import referencing.exceptions
import referencing.jsonschema
import regex
from pydantic import AfterValidator
from referencing import Registry, Resource

from graftwork.datasets.rows import DatasetRow, read_text
from graftwork.errors import ConfigError, DataError


@dataclass(frozen=True)
class Choices:
    """A row's possible answers. `signs`: 1 as a stereotype has it, -1 against it, 0 neither."""

    texts: tuple[str, ...]
    right: int
    signs: tuple[int, ...]

    @classmethod
    def from_row(cls, row: DatasetRow) -> "Choices":
        """From the row's `gold`. Raises DataError."""
        gold = row.gold or {}
        texts, right, signs = gold.get("choices"), gold.get("right"), gold.get("signs", [])
        if not isinstance(texts, list) or not texts or not all(isinstance(one, str) and one for one in texts):
            raise DataError(
                f"row {row.id}: gold.choices",
                f"found {texts!r}"[:80],
                "a row to be weighed lists its possible answers as texts",
            )
        if not isinstance(right, int) or isinstance(right, bool) or not 0 <= right < len(texts):
            raise DataError(f"row {row.id}: gold.right", f"found {right!r}", "the place of the right choice, from 0")
        if not isinstance(signs, list) or (signs and len(signs) != len(texts)):
            raise DataError(f"row {row.id}: gold.signs", f"found {signs!r}"[:80], "one sign for each choice")
        return cls(tuple(texts), right, tuple(signs) or (0,) * len(texts))


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
    """Location of the right text of a row."""

    field: str | None

    def find_texts(self, gold: Mapping[str, Any] | None, reference: str | None, row: str = "") -> tuple[str, ...]:
        """The right texts: any of them will do. Raises DataError where there is none."""
        if self.field is None and reference is not None:
            return (reference,)
        found = self._value(gold or {})
        texts = found if isinstance(found, list) else [found]
        if not texts or not all(isinstance(text, str | int | float) and str(text).strip() for text in texts):
            raise DataError(
                f"row {row!r}: gold" + (f".{self.field}" if self.field else ""),
                f"found {found!r}",
                "the right text is a string, or a list of them",
                "name the scorer's `field`, or end the row with the right answer",
            )
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
            contains=any(_contains_words(words, reference) for reference in references),
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


def _contains_words(words: Sequence[str], part: Sequence[str]) -> bool:
    if not part:
        return not words
    return any(words[start : start + len(part)] == part for start in range(len(words) - len(part) + 1))


def matches(answer: str, pattern: str, *, whole: bool) -> bool:
    """Return whether the answer, or a part of it, matches a regular expression within `REGEX_TIMEOUT_S`."""
    compiled = regex.compile(pattern)  # the package caches what it compiled
    try:
        return (compiled.fullmatch if whole else compiled.search)(answer, timeout=REGEX_TIMEOUT_S) is not None
    except TimeoutError:
        return False


class AnswerSchema:
    """A JSON schema that a whole answer must satisfy. References outside the schema are rejected, never fetched."""

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
        """Return whether the object validates."""
        return bool(self._validator.is_valid(answer))


def _refs(tree: object) -> Iterator[str]:
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            if name in ("$ref", "$dynamicRef") and isinstance(value, str):
                yield value
            yield from _refs(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _refs(value)


# Scores against a gold object: `form`, `facts`, `both`, `field_accuracy`, each within 0..1.
#
# Facts are looked for at their key when the answer is a JSON object, else anywhere in the text. Looking anywhere
# flatters arms that answer in prose: a number may stand there for another reason. So `facts` compares what arms know,
# and only `both` says whether an answer can be used.


EMPTY: tuple[object, ...] = (None, "", [], {})
"""Gold values with nothing to be found: `facts` leaves them out, for a text that lacks a value says nothing of it."""


@dataclass(frozen=True)
class FieldScores:
    """One answer, scored."""

    form: float
    facts: float
    both: float
    field_accuracy: float
    is_json: bool
    """The answer is one JSON object, valid against the schema or not."""


@dataclass(frozen=True)
class GoldAnswer:
    """The gold answer of one question. `given` are the fields that the question itself gives away."""

    gold: Mapping[str, Any]
    given: frozenset[str]

    @classmethod
    def from_row(cls, row: DatasetRow) -> "GoldAnswer":
        """From an evaluation row. Raises DataError where there is nothing to be found."""
        if not row.gold:
            raise DataError(f"row {row.id!r}: gold", "missing or empty", "a compared row has a gold object of fields")
        key = cls(row.gold, frozenset(row.given_fields))
        if not key.wanted:
            found = f"every field is null or given away by the question (given_fields: {sorted(key.given)})"
            raise DataError(f"row {row.id!r}: gold", found, "facts need at least one field to be found")
        return key

    @cached_property
    def wanted(self) -> tuple[str, ...]:
        """Fields whose value is to be found: neither given away nor null or empty."""
        return tuple(name for name, value in self.gold.items() if name not in self.given and value not in EMPTY)


def score(text: str, key: GoldAnswer, schema: AnswerSchema | None) -> FieldScores:
    """The scores of one answer. An answer that is not one JSON object fails form, both and field_accuracy.

    Without a schema any JSON object has the right form.
    """
    answer = parse_object(text)
    form = answer is not None and (schema is None or schema.holds(answer))
    right = right_fields(answer or {}, key.gold)
    accuracy = right / len(key.gold) if form else 0.0
    return FieldScores(
        float(form), _facts(text, answer, key), float(form and right == len(key.gold)), accuracy, answer is not None
    )


def _facts(text: str, answer: Mapping[str, Any] | None, key: GoldAnswer) -> float:
    if answer is not None:
        pairs = ((leaves(answer.get(name)), leaves(key.gold[name])) for name in key.wanted)
        found = sum([*map(tokens, given)] == [*map(tokens, gold)] for given, gold in pairs)
    else:
        words = tokens(text)
        found = sum(all(_is_within(tokens(leaf), words) for leaf in leaves(key.gold[name])) for name in key.wanted)
    return found / len(key.wanted)


def _is_within(part: Sequence[str], whole: Sequence[str]) -> bool:
    """Return whether the text has the tokens, next to each other and in order."""
    n = len(part)
    return n > 0 and any(tuple(whole[i : i + n]) == tuple(part) for i in range(len(whole) - n + 1))


def right_fields(answer: Mapping[str, Any], gold: Mapping[str, Any]) -> int:
    """Return the count of gold fields that the answer has with exactly gold's value."""
    return sum(name in answer and exactly(answer[name], value) for name, value in gold.items())


def field_f1(answer: Mapping[str, Any], gold: Mapping[str, Any]) -> float:
    """Harmonic mean of the share of the answer's fields that are right and the share of gold's that are found."""
    return 2 * right_fields(answer, gold) / (len(answer) + len(gold))


# Parsing of answers, their words, and equality of values.


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
