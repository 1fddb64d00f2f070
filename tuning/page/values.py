"""Values of a trial as a page shows them and as a command line takes them."""

import shlex
from collections.abc import Mapping

import yaml
from pydantic import JsonValue

from graftwork.config import canonical_json
from graftwork.report.sweep_records import Plain


def to_plain(value: JsonValue) -> Plain:
    """Lists and mappings as text: a kind by its name, with what else is set."""
    if isinstance(value, Mapping):
        kind, more = value.get("kind"), {key: other for key, other in value.items() if key != "kind"}
        said = ", ".join(f"{key}={to_plain(other)}" for key, other in more.items())
        return " ".join(part for part in (str(kind) if kind else "", said) if part) or "{}"
    if isinstance(value, list):
        return ", ".join(str(to_plain(item)) for item in value) or "[]"
    return value


def settings(values: Mapping[str, JsonValue]) -> str:
    """`--set key=value ...` as a shell takes it."""
    return " ".join(f"--set {shlex.quote(f'{key}={_text(value)}')}" for key, value in values.items())


def _text(value: JsonValue) -> str:
    """What `--set` reads back as the value: YAML, of which JSON is a part."""
    return value if isinstance(value, str) and yaml.safe_load(value) == value else canonical_json(value)
