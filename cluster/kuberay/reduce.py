"""`python -m graftwork.cluster.kuberay.reduce CRD_DIR [FOLDER]`: the schemas that are shipped, from KubeRay's CRDs.

Names, types, enums, requirements and bounds of `spec` alone. Pod templates and Services are cut out: they are
Kubernetes' own, and `kubernetes-validate` knows them.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

KINDS = {"RayJob": "rayjobs", "RayService": "rayservices", "RayCluster": "rayclusters"}
FOLDER = Path(__file__).with_name("schemas")
VERSION = "v1"
CUT = "x-graftwork-cut"
"""Marks what was cut out, by the kind that it is."""
KEPT = frozenset({
    "type", "required", "enum", "minimum", "maximum", "minItems", "maxItems", "minLength", "maxLength", "pattern",
    "nullable", "default", "x-kubernetes-int-or-string", "x-kubernetes-preserve-unknown-fields",
    "x-kubernetes-list-type", "x-kubernetes-list-map-keys",
})  # fmt: skip


def reduced(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema without words, Kubernetes' own kinds cut out."""
    fields = schema.get("properties", {})
    kind = _known(fields)
    if kind is not None:
        return {"type": "object", "x-kubernetes-preserve-unknown-fields": True, CUT: kind}
    left = {key: value for key, value in schema.items() if key in KEPT}
    if "int32" in schema.get("format", ""):
        left["format"] = "int32"
    if fields:
        left["properties"] = {name: reduced(inner) for name, inner in fields.items()}
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), Mapping):
            left[key] = reduced(schema[key])
    return left


def schema_of(crd: Mapping[str, Any], version: str) -> Mapping[str, Any] | None:
    """The schema of a served version of a CRD; None where it is not served."""
    versions = {found["name"]: found for found in crd["spec"]["versions"] if found.get("served")}
    schema: Mapping[str, Any] | None = versions.get(version, {}).get("schema", {}).get("openAPIV3Schema")
    return schema


def write(crds: Path, folder: Path) -> None:
    """Read the CRDs and write one file a kind."""
    source = (crds / "SOURCE").read_text(encoding="utf-8")
    for kind, plural in KINDS.items():
        crd = yaml.load((crds / f"ray.io_{plural}.yaml").read_text(encoding="utf-8"), Loader=_loader())
        schema = schema_of(crd, VERSION)
        assert schema is not None, f"{plural} has no {VERSION}"
        whole = {
            "source": source.split(", unmodified")[0].strip(), "license": "Apache-2.0", "kind": kind,
            "spec": reduced(schema["properties"]["spec"]),
        }  # fmt: skip
        text = json.dumps(whole, sort_keys=True, separators=(",", ":"))
        (folder / f"{kind.lower()}.json").write_text(f"{text}\n", encoding="utf-8")


def _known(fields: Mapping[str, Any]) -> str | None:
    """Which kind of Kubernetes' the fields are, of those that are cut out."""
    inner = fields.get("spec", {}).get("properties", {})
    if "containers" in inner:
        return "PodTemplateSpec"
    return "Service" if "clusterIP" in inner else None


def _loader() -> Any:
    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # 8 times as fast where libyaml is there


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else FOLDER)
