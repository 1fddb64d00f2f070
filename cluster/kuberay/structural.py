"""A value against a structural schema, as an API server judges it under strict field validation, with all findings.

Own code and no JSON schema library: an unknown field, a null and a default mean other things there.
"""

import difflib
import re
from collections.abc import Mapping
from typing import Any

from graftwork.cluster.kuberay.findings import Found, refuse

Schema = Mapping[str, Any]
INT64 = (-(2**63), 2**63 - 1)
INT_BOUNDS = {"int32": (-(2**31), 2**31 - 1), "int64": INT64}
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (Mapping,), "array": (list, tuple), "string": (str,), "integer": (int,), "number": (int, float),
    "boolean": (bool,),
}  # fmt: skip


def check(value: Any, schema: Schema, where: str) -> Found:
    """All findings on a value. Defaults are the server's to fill in: a field that has one is never missing."""
    if value is None:
        if not schema.get("nullable"):
            yield refuse("SCHEMA-TYPE", where, "null", f"{schema.get('type', 'a value')}", "leave the field out")
        return
    if schema.get("x-kubernetes-int-or-string"):
        if isinstance(value, bool) or not isinstance(value, int | str):
            yield refuse("SCHEMA-TYPE", where, _shown(value), "a whole number or a text")
            return
    elif not _is_a(value, schema.get("type")):
        yield refuse("SCHEMA-TYPE", where, _shown(value), f"{schema['type']}")
        return
    if isinstance(value, int) and not INT64[0] <= value <= INT64[1] and schema.get("type") != "number":
        yield refuse("SCHEMA-BOUNDS", where, f"{value}", "64 bits: the server reads it as a number with a fraction")
    elif isinstance(value, Mapping):
        yield from _object(value, schema, where)
    elif isinstance(value, list | tuple):
        yield from _array(value, schema, where)
    else:
        yield from _scalar(value, schema, where)


def _object(value: Mapping[str, Any], schema: Schema, where: str) -> Found:
    fields, rest = schema.get("properties", {}), schema.get("additionalProperties")
    value = {name: inner for name, inner in value.items() if not _dropped(inner, fields.get(name, rest))}
    for name in schema.get("required", ()):
        if name not in value and "default" not in fields.get(name, {}):
            yield refuse("SCHEMA-REQUIRED", f"{where}.{name}", "nothing", "the field is required")
    for name, inner in value.items():
        path = f"{where}.{name}"
        if name in fields:
            yield from check(inner, fields[name], path)
        elif isinstance(rest, Mapping):
            yield from check(inner, rest, path)
        elif not (rest or schema.get("x-kubernetes-preserve-unknown-fields")):
            near = difflib.get_close_matches(str(name), fields, 1)
            yield refuse("SCHEMA-UNKNOWN", path, "no such field", "the server refuses fields that it does not know",
                         f"did you mean {near[0]}?" if near else "")  # fmt: skip


def _array(value: list[Any] | tuple[Any, ...], schema: Schema, where: str) -> Found:
    if len(value) < schema.get("minItems", 0):
        yield refuse("SCHEMA-BOUNDS", where, f"{len(value)} entries", f"at least {schema['minItems']}")
    if len(value) > schema.get("maxItems", len(value)):
        yield refuse("SCHEMA-BOUNDS", where, f"{len(value)} entries", f"at most {schema['maxItems']}")
    keys = schema.get("x-kubernetes-list-map-keys")
    if schema.get("x-kubernetes-list-type") == "map" and keys:
        yield from _told_apart(value, keys, schema.get("items", {}).get("properties", {}), where)
    for index, inner in enumerate(value):
        yield from check(inner, schema.get("items", {}), f"{where}[{index}]")


def _told_apart(value: list[Any] | tuple[Any, ...], keys: list[str], fields: Schema, where: str) -> Found:
    seen = set()
    for index, entry in enumerate(value):
        if not isinstance(entry, Mapping):
            continue
        key = tuple(str(entry.get(name, fields.get(name, {}).get("default"))) for name in keys)
        if key in seen:
            yield refuse("SCHEMA-TWICE", f"{where}[{index}]", f"{', '.join(keys)} = {', '.join(key)} again", "once")
        seen.add(key)


def _scalar(value: Any, schema: Schema, where: str) -> Found:
    if "enum" in schema and value not in schema["enum"]:
        near = difflib.get_close_matches(str(value), [str(one) for one in schema["enum"]], 1, 0.4)
        yield refuse("SCHEMA-ENUM", where, repr(value), f"one of {', '.join(map(str, schema['enum']))}",
                     f"did you mean {near[0]}?" if near else "")  # fmt: skip
    if isinstance(value, str):
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
            yield refuse("SCHEMA-BOUNDS", where, f"{len(value)} characters",
                         f"{schema.get('minLength', 0)} to {schema.get('maxLength', 'any number')}")  # fmt: skip
        if "pattern" in schema and not re.search(schema["pattern"], value):
            yield refuse("SCHEMA-PATTERN", where, repr(value), f"the form {schema['pattern']}")
        return
    least, most = INT_BOUNDS.get(str(schema.get("format")), (value, value))
    least, most = max(least, schema.get("minimum", least)), min(most, schema.get("maximum", most))
    if not least <= value <= most:
        yield refuse("SCHEMA-BOUNDS", where, f"{value}", f"{least} to {most}")


def _dropped(value: Any, schema: Any) -> bool:
    """Whether the server takes a field as not given: a null where none may be."""
    return value is None and isinstance(schema, Mapping) and not schema.get("nullable")


def _is_a(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):
        return kind in ("boolean", None)
    return kind is None or isinstance(value, _TYPES[kind])


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
