"""A JSON schema that a whole answer must satisfy. It stands alone: nothing is ever fetched."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema
import referencing.exceptions
import referencing.jsonschema
from referencing import Registry, Resource

from graftwork.data import read_text
from graftwork.errors import ConfigError


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


def _refs(tree: object) -> Iterator[str]:
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            if name in ("$ref", "$dynamicRef") and isinstance(value, str):
                yield value
            yield from _refs(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _refs(value)
