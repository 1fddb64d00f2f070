"""Objects against schemas, as an API server under strict field validation would judge them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from graftwork.cluster.kuberay.objects import build_disruption_budget
from graftwork.cluster.kuberay.schema import FOLDER, KINDS, check_schema
from tests.kuberay_objects import GONE, GPUS, changed, cluster, job, rayjob, rayservice

JOB = rayjob(workers=[GPUS])
PART = "spec.rayClusterSpec"
POD = f"{PART}.headGroupSpec.template.spec"
BAD: list[tuple[str, str, dict[str, Any]]] = [
    ("E-SCHEMA-UNKNOWN", "spec.entryPoint", {"spec.entryPoint": "python"}),
    ("E-SCHEMA-UNKNOWN", "spec.rayClusterSpec.workerGroupSpecs[0].replica", {f"{PART}.workerGroupSpecs.0.replica": 1}),
    ("E-SCHEMA-UNKNOWN", "metadata.label", {"metadata.label": {}}),
    ("E-SCHEMA-UNKNOWN", "sepc", {"sepc": {}}),
    ("E-SCHEMA-UNKNOWN", f"{PART}.headGroupSpec.template.kind", {f"{PART}.headGroupSpec.template.kind": "Pod"}),
    ("E-SCHEMA-TYPE", "spec.ttlSecondsAfterFinished", {"spec.ttlSecondsAfterFinished": "10"}),
    ("E-SCHEMA-TYPE", "spec.ttlSecondsAfterFinished", {"spec.ttlSecondsAfterFinished": 1.5}),
    ("E-SCHEMA-TYPE", "spec.suspend", {"spec.suspend": "true"}),
    ("E-SCHEMA-TYPE", "spec.backoffLimit", {"spec.backoffLimit": True}),
    ("E-SCHEMA-TYPE", "spec.entrypoint", {"spec.entrypoint": ["python", "a.py"]}),
    ("E-SCHEMA-TYPE", f"{PART}.headGroupSpec.rayStartParams.a", {f"{PART}.headGroupSpec.rayStartParams": {"a": 0}}),
    ("E-SCHEMA-TYPE", f"{PART}.headGroupSpec.template.metadata", {f"{PART}.headGroupSpec.template.metadata": 1}),
    ("E-SCHEMA-TYPE", "metadata.labels.a", {"metadata.labels.a": 1}),
    ("E-SCHEMA-ENUM", f"{PART}.authOptions.mode", {f"{PART}.authOptions.mode": "tokens"}),
    ("E-SCHEMA-REQUIRED", f"{PART}.headGroupSpec", {f"{PART}.headGroupSpec": GONE}),
    ("E-SCHEMA-REQUIRED", f"{PART}.headGroupSpec.template", {f"{PART}.headGroupSpec.template": None}),
    ("E-SCHEMA-REQUIRED", f"{PART}.workerGroupSpecs[0].groupName", {f"{PART}.workerGroupSpecs.0.groupName": GONE}),
    ("E-SCHEMA-BOUNDS", "spec.preRunningDeadlineSeconds", {"spec.preRunningDeadlineSeconds": 0}),
    ("E-SCHEMA-BOUNDS", "spec.activeDeadlineSeconds", {"spec.activeDeadlineSeconds": 2**31}),
    ("E-SCHEMA-BOUNDS", f"{POD}.volumes[2].emptyDir.sizeLimit", {f"{POD}.volumes.2.emptyDir.sizeLimit": 2**63}),
    ("E-SCHEMA-BOUNDS", "spec.deletionStrategy.deletionRules", {"spec.deletionStrategy": {"deletionRules": []}}),
    (
        "E-SCHEMA-PATTERN",
        f"{PART}.gcsFaultToleranceOptions.storage.size",
        {f"{PART}.gcsFaultToleranceOptions": {"storage": {"size": "1 Gi"}}},
    ),
    ("E-SCHEMA-UNKNOWN", f"{POD}.hostNetWork", {f"{POD}.hostNetWork": True}),
    ("E-SCHEMA-TYPE", f"{POD}.containers", {f"{POD}.containers": {}}),
    ("E-SCHEMA-REQUIRED", f"{POD}.containers[0].name", {f"{POD}.containers.0.name": GONE}),
    ("E-SCHEMA-TWICE", f"{POD}.volumes[1]", {f"{POD}.volumes.1.name": "tmp"}),
    (
        "E-SCHEMA-PATTERN",
        f"{POD}.containers[0].resources.limits.memory",
        {f"{POD}.containers.0.resources.limits.memory": "16GB"},
    ),
    ("E-SCHEMA-TYPE", f"{POD}.tolerations[0]", {f"{POD}.tolerations": ["nvidia.com/gpu"]}),
]
GOOD: list[dict[str, Any]] = [
    {},
    {"spec.suspend": None},  # the server takes a null for nothing
    {"spec.backoffLimit": None},
    {f"{PART}.headGroupSpec.rayStartParams": {"a": None}},
    {f"{PART}.workerGroupSpecs.0.minReplicas": GONE},  # required, and has a default
    {f"{PART}.gcsFaultToleranceOptions": {"backend": "rocksdb", "storage": {"size": 1}}},
    {"spec.entrypointNumCpus": 1},
    {f"{PART}.headGroupSpec.template": {}},  # the operator refuses it: rules/groups.py
    {"metadata.ownerReferences": []},
    {"status": {"anything": 1}},
]


@pytest.mark.parametrize(("code", "where", "changes"), BAD, ids=[f"{index}-{bad[0]}" for index, bad in enumerate(BAD)])
def test_what_the_server_refuses(code: str, where: str, changes: dict[str, Any]) -> None:
    found = check_schema(changed(JOB, changes))
    assert [(one.code, one.level) for one in found] == [(code, "error")]
    assert found[0].where == where


@pytest.mark.parametrize("changes", GOOD)
def test_what_the_server_takes(changes: dict[str, Any]) -> None:
    assert check_schema(changed(JOB, changes)) == []


def test_a_wrong_name_is_told_with_the_nearest() -> None:
    (found,) = check_schema(changed(JOB, {"spec.entryPoint": "python"}))
    assert found.hint == "remove it, or rename it to entrypoint"


def test_a_service_and_its_disruption_budget() -> None:
    assert check_schema(rayservice(workers=[{**GPUS, "max_count": 4}])) == []
    budget = build_disruption_budget(job(cluster(), kind="serve"), "team-a")
    assert check_schema(budget) == []
    (found,) = check_schema(changed(budget, {"spec.minAvailible": 1}))
    assert (found.code, found.hint) == ("E-SCHEMA-UNKNOWN", "remove it, or rename it to minAvailable")


def live_crd(spec: dict[str, Any], version: str = "v1") -> dict[str, Any]:
    """A CustomResourceDefinition as a server shows it."""
    schema = {
        "type": "object",
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": {"type": "object", "properties": spec},
            "status": {"type": "object"},
        },
    }
    served = [{"name": version, "served": True, "schema": {"openAPIV3Schema": schema}}]
    return {"spec": {"group": "ray.io", "names": {"kind": "RayJob"}, "versions": served}}


def test_the_live_definition_comes_first() -> None:
    """An older KubeRay does not know a field: this is told before the server tells it."""
    older = live_crd(
        {name: {"x-kubernetes-preserve-unknown-fields": True} for name in JOB["spec"]}
        | {"submitterConfig": {"type": "object"}}
    )
    del older["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["jobId"]
    found = {(one.code, one.where) for one in check_schema(JOB, older)}
    assert found == {("E-SCHEMA-UNKNOWN", "spec.jobId"), ("E-SCHEMA-UNKNOWN", "spec.submitterConfig.backoffLimit")}


def test_a_definition_that_does_not_serve_our_version() -> None:
    (found,) = check_schema(JOB, live_crd({}, "v1alpha1"))
    assert (found.code, found.rule) == ("E-CRD-VERSION", "the cluster serves ray.io/v1alpha1")


def test_pods_are_said_to_be_unchecked_where_nothing_checks_them() -> None:
    code = (
        "import json, sys, importlib.util\n"
        "importlib.util.find_spec = lambda name: None\n"
        "from graftwork.cluster.kuberay.schema import check_schema\n"
        "print([found.code for found in check_schema(json.load(sys.stdin))])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(JOB), capture_output=True, text=True, check=True
    )
    assert set(json.loads(done.stdout.replace("'", '"'))) == {"W-POD-UNCHECKED"}


def test_the_shipped_schemas_say_where_they_are_from(tmp_path: Path) -> None:
    for kind in KINDS:
        shipped = json.loads((FOLDER / f"{kind.lower()}.json").read_text(encoding="utf-8"))
        assert "kuberay, tag v1.7.0" in shipped["source"]
        assert "description" not in json.dumps(shipped)
        assert (FOLDER / f"{kind.lower()}.json").stat().st_size < 30_000


def test_schemas_are_reduced_from_definitions(tmp_path: Path) -> None:
    (tmp_path / "SOURCE").write_text("example, tag v0, unmodified\n")
    pod = {"properties": {"spec": {"properties": {"containers": {"type": "array"}}}}, "type": "object"}
    for kind, plural in KINDS.items():
        crd = live_crd({"a": {"type": "string", "description": "words", "enum": ["x"]}, "template": pod})
        crd["spec"]["names"]["kind"] = kind
        (tmp_path / f"ray.io_{plural}.yaml").write_text(yaml.safe_dump(crd))
    subprocess.run([sys.executable, "-m", "graftwork.cluster.kuberay.schema", str(tmp_path), str(tmp_path)], check=True)
    made = json.loads((tmp_path / "rayjob.json").read_text())
    assert made["source"] == "example, tag v0"
    assert made["spec"]["properties"]["a"] == {"type": "string", "enum": ["x"]}
    assert made["spec"]["properties"]["template"]["x-graftwork-cut"] == "PodTemplateSpec"
