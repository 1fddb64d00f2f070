"""Validation of a value against a structural schema, as an API server does it under strict field validation.

Own code and no JSON schema library: an unknown field, a null and a default mean other things there.
"""

import difflib
import functools
import importlib.util
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from graftwork.cluster.jobs.models import Finding, Findings, refuse, warn
from graftwork.cluster.kuberay.object_view import KubeObject, KubeView, dig, mapping

# `python -m graftwork.cluster.kuberay.schema CRD_DIR [FOLDER]`: the schemas that are shipped, from KubeRay's CRDs.
#
# Names, types, enums, requirements and bounds of `spec` alone. Pod templates and Services are cut out: they are
# Kubernetes' own, and `kubernetes-validate` knows them.


KINDS = {"RayJob": "rayjobs", "RayService": "rayservices", "RayCluster": "rayclusters"}
FOLDER = Path(__file__).with_name("schemas")
CRD_VERSION = "v1"
CUT = "x-graftwork-cut"
"""Marks what was cut out, by the kind that it is."""
KEYWORDS = frozenset(
    {
        *("type", "required", "enum", "minimum", "maximum", "minItems", "maxItems", "minLength", "maxLength"),
        *("pattern", "nullable", "default", "x-kubernetes-int-or-string", "x-kubernetes-preserve-unknown-fields"),
        *("x-kubernetes-list-type", "x-kubernetes-list-map-keys"),
    }
)
"""Keywords of a schema that are shipped."""


def reduced(schema: KubeView) -> KubeObject:
    """A schema without words, Kubernetes' own kinds cut out."""
    fields = schema.get("properties", {})
    inner = fields.get("spec", {}).get("properties", {})
    kind = "PodTemplateSpec" if "containers" in inner else "Service" if "clusterIP" in inner else None
    if kind is not None:
        return {"type": "object", "x-kubernetes-preserve-unknown-fields": True, CUT: kind}
    left = {key: value for key, value in schema.items() if key in KEYWORDS}
    if "int32" in schema.get("format", ""):
        left["format"] = "int32"
    if fields:
        left["properties"] = {name: reduced(inner) for name, inner in fields.items()}
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), Mapping):
            left[key] = reduced(schema[key])
    return left


def schema_of(crd: KubeView, version: str) -> KubeView | None:
    """The schema of a served version of a CRD; None where it is not served."""
    versions = {found["name"]: found for found in crd["spec"]["versions"] if found.get("served")}
    schema: KubeView | None = versions.get(version, {}).get("schema", {}).get("openAPIV3Schema")
    return schema


def write(crds: Path, folder: Path) -> None:
    """Read the CRDs and write one file a kind."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # 8 times as fast where libyaml is there
    source = (crds / "SOURCE").read_text(encoding="utf-8")
    for kind, plural in KINDS.items():
        crd = yaml.load((crds / f"ray.io_{plural}.yaml").read_text(encoding="utf-8"), Loader=loader)
        schema = schema_of(crd, CRD_VERSION)
        assert schema is not None, f"{plural} has no {CRD_VERSION}"
        whole = {
            "source": source.split(", unmodified")[0].strip(),
            "license": "Apache-2.0",
            "kind": kind,
            "spec": reduced(schema["properties"]["spec"]),
        }
        text = json.dumps(whole, sort_keys=True, separators=(",", ":"))
        (folder / f"{kind.lower()}.json").write_text(f"{text}\n", encoding="utf-8")


# An object against its schema: the live CRD's where there is one, else the shipped one and Kubernetes' own of pods.


METADATA = frozenset(
    {
        *("name", "namespace", "labels", "annotations", "finalizers", "generateName", "ownerReferences"),
        *("uid", "resourceVersion", "generation", "creationTimestamp", "deletionTimestamp"),
        *("deletionGracePeriodSeconds", "managedFields", "selfLink"),
    }
)
TOP = frozenset({"apiVersion", "kind", "metadata", "spec", "status"})


def check_schema(made: KubeView, crd: KubeView | None = None) -> list[Finding]:
    """All findings on an object of any kind. `crd` is the CustomResourceDefinition as the server shows it."""
    found = list(_envelope_findings(made))
    kind = str(made.get("kind"))
    if kind not in KINDS:
        return found + list(_core_findings(made))
    if crd is not None:
        return found + list(_live_findings(made, crd))
    spec = _shipped_schema(kind)
    found += check(made.get("spec"), spec, "spec")
    for where, cut, inner in cut_out(made.get("spec"), spec, "spec"):
        found += _template_findings(where, cut, inner)
    return list(dict.fromkeys(found))


def cut_out(value: Any, schema: KubeView, where: str) -> Iterator[tuple[str, str, KubeView]]:
    """What the shipped schema does not know: path, kind and value."""
    if isinstance(value, Mapping) and CUT in schema:
        yield where, schema[CUT], value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from cut_out(inner, schema.get("properties", {}).get(name, {}), f"{where}.{name}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from cut_out(inner, schema.get("items", {}), f"{where}[{index}]")


def _envelope_findings(made: KubeView) -> Findings:
    for name in made.keys() - TOP:
        yield refuse(
            "SCHEMA-UNKNOWN",
            str(name),
            "no such field",
            "an object has the fields apiVersion, kind, metadata and spec",
            f"remove {name}",
        )
    metadata = mapping(made.get("metadata"))
    for name in metadata.keys() - METADATA:
        yield refuse(
            "SCHEMA-UNKNOWN",
            f"metadata.{name}",
            "no such field",
            "the server refuses fields that are not in its schema",
            f"remove metadata.{name}",
        )
    for field in ("labels", "annotations"):
        for key, value in mapping(metadata.get(field)).items():
            if not isinstance(value, str):
                yield refuse(
                    "SCHEMA-TYPE",
                    f"metadata.{field}.{key}",
                    f"{type(value).__name__} {value!r}",
                    "labels and annotations are strings",
                    f'quote the value: {key}: "{value}"',
                )


def _live_findings(made: KubeView, crd: KubeView) -> Findings:
    api = str(made.get("apiVersion"))
    group, _, version = api.partition("/")
    schema = schema_of(crd, version) if dig(crd, "spec", "group") == group else None
    if schema is None:
        served = [f"{dig(crd, 'spec', 'group')}/{one['name']}" for one in crd["spec"]["versions"] if one.get("served")]
        yield refuse(
            "CRD-VERSION",
            "apiVersion",
            api,
            f"the cluster serves {', '.join(served) or 'none'}",
            "upgrade KubeRay's CRDs to 1.7",
        )
        return
    fields = {name: inner for name, inner in schema["properties"].items() if name not in ("metadata", "status")}
    asked = {name: inner for name, inner in made.items() if name in fields}
    for finding in check(asked, {**schema, "properties": fields}, ""):
        yield replace(finding, where=finding.where.removeprefix("."))


def _template_findings(where: str, cut: str, value: KubeView) -> Findings:
    if cut == "PodTemplateSpec":
        metadata = value.get("metadata", {})
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata}
        whole |= {"spec": value["spec"]} if "spec" in value else {}
        for name in value.keys() - {"metadata", "spec"}:
            yield refuse(
                "SCHEMA-UNKNOWN",
                f"{where}.{name}",
                "no such field",
                "a pod template has the fields metadata and spec",
                f"remove {where}.{name}",
            )
    else:
        whole = {"apiVersion": "v1", "kind": cut, **value}
    for finding in _core_findings(whole):
        yield replace(finding, where=f"{where}.{finding.where}")


def _core_findings(made: KubeView) -> Findings:
    schema = core_schema(str(made.get("kind")))
    if schema is not None:
        for finding in check(made, schema, ""):
            yield replace(finding, where=finding.where.removeprefix("."))
        return
    yield warn(
        "POD-UNCHECKED",
        "spec",
        f"not validated against a schema of {made.get('kind')}",
        "kubernetes-validate, which has the schema, is not installed",
        "pip install 'kubernetes-validate>=1.34'",
    )


@functools.cache
def _shipped_schema(kind: str) -> KubeView:
    spec: KubeView = json.loads((FOLDER / f"{kind.lower()}.json").read_text(encoding="utf-8"))["spec"]
    return spec


INT64 = (-(2**63), 2**63 - 1)
INT_BOUNDS = {"int32": (-(2**31), 2**31 - 1), "int64": INT64}
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (Mapping,),
    "array": (list, tuple),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
}


def check(value: Any, schema: KubeView, where: str) -> Findings:
    """All findings on a value. The server fills in defaults: a field that has one is never missing."""
    if value is None:
        if not schema.get("nullable"):
            yield refuse(
                "SCHEMA-TYPE",
                where,
                "null",
                f"{schema.get('type', 'a value')}",
                f"remove {where}, or set it to a value of type {schema.get('type', 'object')}",
            )
        return
    if schema.get("x-kubernetes-int-or-string"):
        if isinstance(value, bool) or not isinstance(value, int | str):
            yield refuse(
                "SCHEMA-TYPE",
                where,
                _short_repr(value),
                "a whole number or a string",
                f"set {where} to a number or a string",
            )
            return
    elif (kind := schema.get("type")) is not None and not (
        kind == "boolean" if isinstance(value, bool) else isinstance(value, _TYPES[kind])
    ):
        yield refuse(
            "SCHEMA-TYPE",
            where,
            _short_repr(value),
            f"the type is {schema['type']}",
            f"set {where} to a value of type {schema['type']}",
        )
        return
    if isinstance(value, int) and not INT64[0] <= value <= INT64[1] and schema.get("type") != "number":
        yield refuse(
            "SCHEMA-BOUNDS",
            where,
            f"{value}",
            "an integer has 64 bits; the server reads a larger one as a float",
            f"set {where} to a value between -2**63 and 2**63 - 1",
        )
    elif isinstance(value, Mapping):
        yield from _object_findings(value, schema, where)
    elif isinstance(value, list | tuple):
        yield from _array_findings(value, schema, where)
    else:
        yield from _scalar_findings(value, schema, where)


def _object_findings(value: KubeView, schema: KubeView, where: str) -> Findings:
    fields, rest = schema.get("properties", {}), schema.get("additionalProperties")
    given = {name: (inner, fields.get(name, rest)) for name, inner in value.items()}
    value = {  # the server takes a null as not given where none may be
        name: inner
        for name, (inner, part) in given.items()
        if inner is not None or not isinstance(part, Mapping) or part.get("nullable")
    }
    for name in schema.get("required", ()):
        if name not in value and "default" not in fields.get(name, {}):
            yield refuse(
                "SCHEMA-REQUIRED", f"{where}.{name}", "nothing", "the server requires the field", f"add {where}.{name}"
            )
    for name, inner in value.items():
        path = f"{where}.{name}"
        if name in fields:
            yield from check(inner, fields[name], path)
        elif isinstance(rest, Mapping):
            yield from check(inner, rest, path)
        elif not (rest or schema.get("x-kubernetes-preserve-unknown-fields")):
            near = difflib.get_close_matches(str(name), fields, 1)
            yield refuse(
                "SCHEMA-UNKNOWN",
                path,
                "no such field",
                "the server refuses fields that it does not know",
                f"remove it, or rename it to {near[0]}" if near else f"remove {path}",
            )


def _array_findings(value: list[Any] | tuple[Any, ...], schema: KubeView, where: str) -> Findings:
    if len(value) < schema.get("minItems", 0):
        yield refuse(
            "SCHEMA-BOUNDS",
            where,
            f"{len(value)} entries",
            f"at least {schema['minItems']} entries",
            f"add entries until there are {schema['minItems']}",
        )
    if len(value) > schema.get("maxItems", len(value)):
        yield refuse(
            "SCHEMA-BOUNDS",
            where,
            f"{len(value)} entries",
            f"at most {schema['maxItems']} entries",
            f"remove entries until there are {schema['maxItems']}",
        )
    keys = schema.get("x-kubernetes-list-map-keys")
    if schema.get("x-kubernetes-list-type") == "map" and keys:
        yield from _check_keys_differ(value, keys, schema.get("items", {}).get("properties", {}), where)
    for index, inner in enumerate(value):
        yield from check(inner, schema.get("items", {}), f"{where}[{index}]")


def _check_keys_differ(value: list[Any] | tuple[Any, ...], keys: list[str], fields: KubeView, where: str) -> Findings:
    seen = set()
    for index, entry in enumerate(value):
        if not isinstance(entry, Mapping):
            continue
        key = tuple(str(entry.get(name, fields.get(name, {}).get("default"))) for name in keys)
        if key in seen:
            yield refuse(
                "SCHEMA-TWICE",
                f"{where}[{index}]",
                f"{', '.join(keys)} = {', '.join(key)} again",
                "each key appears once in the list",
                f"remove entry {index}, or give it another {' and '.join(keys)}",
            )
        seen.add(key)


def _scalar_findings(value: Any, schema: KubeView, where: str) -> Findings:
    if "enum" in schema and value not in schema["enum"]:
        near = difflib.get_close_matches(str(value), [str(one) for one in schema["enum"]], 1, 0.4)
        yield refuse(
            "SCHEMA-ENUM",
            where,
            repr(value),
            f"one of {', '.join(map(str, schema['enum']))}",
            f"set {where}: {near[0] if near else schema['enum'][0]}",
        )
    if isinstance(value, str):
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
            yield refuse(
                "SCHEMA-BOUNDS",
                where,
                f"{len(value)} characters",
                f"{schema.get('minLength', 0)} to {schema.get('maxLength', 'any number of')} characters",
                f"set {where} to a text of that length",
            )
        if "pattern" in schema and not re.search(schema["pattern"], value):
            yield refuse(
                "SCHEMA-PATTERN",
                where,
                repr(value),
                f"the value matches {schema['pattern']}",
                f"change {where} to a value that matches {schema['pattern']}",
            )
        return
    least, most = INT_BOUNDS.get(str(schema.get("format")), (value, value))
    least, most = max(least, schema.get("minimum", least)), min(most, schema.get("maximum", most))
    if not least <= value <= most:
        yield refuse(
            "SCHEMA-BOUNDS", where, f"{value}", f"{least} to {most}", f"set {where} to {min(max(value, least), most)}"
        )


def _short_repr(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


# Structural schemas of Kubernetes' own kinds, from the files of `kubernetes-validate` where it is installed. The
# package's own check compiles 1.5 MB per call (0.1 to 0.4 s) and reports only the first finding.


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
def core_schema(kind: str) -> KubeView | None:
    """The schema of a kind; None where it is not among `KINDS` or nothing here knows it."""
    package = importlib.util.find_spec("kubernetes_validate")
    if package is None or package.origin is None or kind not in CORE_KINDS:
        return None
    definitions = json.loads((Path(package.origin).parent / FILE).read_text(encoding="utf-8"))["$defs"]
    return _plain_schema({"$ref": _REF + CORE_KINDS[kind]}, definitions, {})


def _plain_schema(schema: KubeView, known: KubeView, done: dict[str, KubeObject]) -> KubeObject:
    """As the definition of a custom kind would say it. Kinds that hold themselves are one and the same mapping."""
    name = schema.get("$ref", "").removeprefix(_REF)
    if name:
        if name not in done:
            done[name] = {}
            done[name].update(_plain_schema(known[name], known, done))
            done[name] |= {"pattern": QUANTITY_PATTERN} if name == QUANTITY else {}
        return done[name]
    if "oneOf" in schema:
        return {"x-kubernetes-int-or-string": True}
    kind = schema.get("type")
    made = {key: schema[key] for key in _SAME if key in schema}
    made["type"] = kind[0] if isinstance(kind, list) else kind
    fields = schema.get("properties", {})
    if fields:
        made["properties"] = {field: _plain_schema(inner, known, done) for field, inner in fields.items()}
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), Mapping):
            made[key] = _plain_schema(schema[key], known, done)
    if kind == ["object", "null"] and not fields and "additionalProperties" not in schema:
        made["x-kubernetes-preserve-unknown-fields"] = True
    return made


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else FOLDER)
