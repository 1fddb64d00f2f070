"""An object against its schema: the live CRD's where there is one, else the shipped one and Kubernetes' own of pods."""

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from graftwork.cluster.backend import Finding
from graftwork.cluster.kuberay.core_kinds import core_schema
from graftwork.cluster.kuberay.findings import Found, dig, mapping, refuse, warn
from graftwork.cluster.kuberay.reduce import CUT, FOLDER, KINDS, schema_of
from graftwork.cluster.kuberay.structural import check

METADATA = frozenset({
    "name", "namespace", "labels", "annotations", "finalizers", "generateName", "ownerReferences", "uid",
    "resourceVersion", "generation", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds",
    "managedFields", "selfLink",
})  # fmt: skip
TOP = frozenset({"apiVersion", "kind", "metadata", "spec", "status"})


def check_schema(made: Mapping[str, Any], crd: Mapping[str, Any] | None = None) -> list[Finding]:
    """All findings on an object of any kind. `crd` is the CustomResourceDefinition as the server shows it."""
    found = list(_envelope(made))
    kind = str(made.get("kind"))
    if kind not in KINDS:
        return found + list(_core(made))
    if crd is not None:
        return found + list(_live(made, crd))
    spec = _shipped(kind)
    found += check(made.get("spec"), spec, "spec")
    for where, cut, inner in cut_out(made.get("spec"), spec, "spec"):
        found += _template(where, cut, inner)
    return list(dict.fromkeys(found))


def cut_out(value: Any, schema: Mapping[str, Any], where: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """What the shipped schema does not know: path, kind and value."""
    if isinstance(value, Mapping) and CUT in schema:
        yield where, schema[CUT], value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from cut_out(inner, schema.get("properties", {}).get(name, {}), f"{where}.{name}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from cut_out(inner, schema.get("items", {}), f"{where}[{index}]")


def _envelope(made: Mapping[str, Any]) -> Found:
    for name in made.keys() - TOP:
        yield refuse("SCHEMA-UNKNOWN", str(name), "no such field", "apiVersion, kind, metadata, spec")
    metadata = mapping(made.get("metadata"))
    for name in metadata.keys() - METADATA:
        yield refuse(
            "SCHEMA-UNKNOWN", f"metadata.{name}", "no such field", "the server refuses fields it does not know"
        )
    for field in ("labels", "annotations"):
        for key, value in mapping(metadata.get(field)).items():
            if not isinstance(value, str):
                yield refuse("SCHEMA-TYPE", f"metadata.{field}.{key}", f"{type(value).__name__} {value!r}", "a text")


def _live(made: Mapping[str, Any], crd: Mapping[str, Any]) -> Found:
    api = str(made.get("apiVersion"))
    group, _, version = api.partition("/")
    schema = schema_of(crd, version) if dig(crd, "spec", "group") == group else None
    if schema is None:
        served = [f"{dig(crd, 'spec', 'group')}/{one['name']}" for one in crd["spec"]["versions"] if one.get("served")]
        yield refuse("CRD-VERSION", "apiVersion", api, f"the cluster serves {', '.join(served) or 'none'}",
                     "upgrade KubeRay's CRDs to 1.7")  # fmt: skip
        return
    fields = {name: inner for name, inner in schema["properties"].items() if name not in ("metadata", "status")}
    asked = {name: inner for name, inner in made.items() if name in fields}
    for finding in check(asked, {**schema, "properties": fields}, ""):
        yield replace(finding, where=finding.where.removeprefix("."))


def _template(where: str, cut: str, value: Mapping[str, Any]) -> Found:
    if cut == "PodTemplateSpec":
        metadata = value.get("metadata", {})
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata}
        whole |= {"spec": value["spec"]} if "spec" in value else {}
        for name in value.keys() - {"metadata", "spec"}:
            yield refuse("SCHEMA-UNKNOWN", f"{where}.{name}", "no such field", "metadata, spec")
    else:
        whole = {"apiVersion": "v1", "kind": cut, **value}
    for finding in _core(whole):
        yield replace(finding, where=f"{where}.{finding.where}")


def _core(made: Mapping[str, Any]) -> Found:
    schema = core_schema(str(made.get("kind")))
    if schema is not None:
        for finding in check(made, schema, ""):
            yield replace(finding, where=finding.where.removeprefix("."))
        return
    yield warn(
        "POD-UNCHECKED",
        "spec",
        f"no schema of {made.get('kind')} was held against it",
        "kubernetes-validate, which has it, is not installed",
        "pip install 'kubernetes-validate>=1.34'",
    )


@functools.cache
def _shipped(kind: str) -> Mapping[str, Any]:
    spec: Mapping[str, Any] = json.loads((FOLDER / f"{kind.lower()}.json").read_text(encoding="utf-8"))["spec"]
    return spec
