"""Structural schemas of Kubernetes' own kinds, read from the files of `kubernetes-validate` where it is installed.

The package's own check compiles 1.5 MB per call (0.1 to 0.4 s) and reports only the first finding, so only its data is
used.
"""

import functools
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CORE_VERSION = "1.34.0"
FILE = f"kubernetes-json-schema/v{CORE_VERSION}-local-strict/_definitions.json"
CORE_KINDS = {
    "Pod": "io.k8s.api.core.v1.Pod",
    "Service": "io.k8s.api.core.v1.Service",
    "PodDisruptionBudget": "io.k8s.api.policy.v1.PodDisruptionBudget",
}
QUANTITY = "io.k8s.apimachinery.pkg.api.resource.Quantity"
QUANTITY_PATTERN = r"^[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]+)?$"
_REF = "#/$defs/"
_SAME = ("required", "enum", "format", "x-kubernetes-list-type", "x-kubernetes-list-map-keys")


@functools.cache
def core_schema(kind: str) -> Mapping[str, Any] | None:
    """The schema of a kind; None where it is not among `KINDS` or nothing here knows it."""
    definitions = _definitions()
    return _plain({"$ref": _REF + CORE_KINDS[kind]}, definitions, {}) if definitions and kind in CORE_KINDS else None


def _definitions() -> Mapping[str, Any]:
    found = importlib.util.find_spec("kubernetes_validate")
    if found is None or found.origin is None:
        return {}
    whole = json.loads((Path(found.origin).parent / FILE).read_text(encoding="utf-8"))
    definitions: Mapping[str, Any] = whole["$defs"]
    return definitions


def _plain(schema: Mapping[str, Any], known: Mapping[str, Any], done: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """As the definition of a custom kind would say it. Kinds that hold themselves are one and the same mapping."""
    name = schema.get("$ref", "").removeprefix(_REF)
    if name:
        if name not in done:
            done[name] = {}
            done[name].update(_plain(known[name], known, done))
            done[name] |= {"pattern": QUANTITY_PATTERN} if name == QUANTITY else {}
        return done[name]
    if "oneOf" in schema:
        return {"x-kubernetes-int-or-string": True}
    kind = schema.get("type")
    made = {key: schema[key] for key in _SAME if key in schema}
    made["type"] = kind[0] if isinstance(kind, list) else kind
    fields = schema.get("properties", {})
    if fields:
        made["properties"] = {field: _plain(inner, known, done) for field, inner in fields.items()}
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), Mapping):
            made[key] = _plain(schema[key], known, done)
    if kind == ["object", "null"] and not fields and "additionalProperties" not in schema:
        made["x-kubernetes-preserve-unknown-fields"] = True
    return made
