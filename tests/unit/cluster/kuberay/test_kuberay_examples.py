"""The checked-in objects are the builder's, and Kubernetes' own schemas and our preflight take them."""

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kubernetes_validate
import pytest
import yaml

from graftwork.cluster.jobs.models import Attempt
from graftwork.cluster.kuberay.preflight import preflight

FOLDER = Path(__file__).parents[4] / "k8s" / "examples"
KUBERNETES = "1.34.0"


RENDER = SimpleNamespace(**runpy.run_path(str(FOLDER / "render.py")))
CLUSTERS = sorted(RENDER.CLUSTERS.glob("*.yaml"))


def test_the_files_are_what_the_builder_makes() -> None:
    """When this fails: `python k8s/examples/render.py`, and read what changed."""
    made = dict(RENDER.rendered())
    assert sorted(path.name for path in FOLDER.glob("*.yaml")) == sorted(made)
    for name, text in made.items():
        assert (FOLDER / name).read_text(encoding="utf-8") == text, name


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_the_examples_have_no_findings(path: Path) -> None:
    job = RENDER.a_job(path, "train")
    assert preflight(Attempt(job, 1), RENDER.NAMESPACE, objects=[RENDER.rayjob(path)]) == []


def test_the_served_example_has_no_findings() -> None:
    path = RENDER.CLUSTERS / "gpu.yaml"
    job = RENDER.a_job(path, "serve", grows=True)
    assert preflight(Attempt(job, 1), RENDER.NAMESPACE, objects=RENDER.service(path)) == []


def test_another_judge_takes_pods_and_budgets() -> None:
    """kubernetes-validate --strict, whose verdict is not ours, on one head, one worker and the disruption budget."""
    service, budget = RENDER.service(RENDER.CLUSTERS / "gpu.yaml")
    part: dict[str, Any] = service["spec"]["rayClusterConfig"]
    templates = [part["headGroupSpec"]["template"], part["workerGroupSpecs"][0]["template"]]
    pods = [{"apiVersion": "v1", "kind": "Pod", **template} for template in templates]
    for made in [*pods, budget]:
        kubernetes_validate.validate(made, KUBERNETES, strict=True)
    pods[0]["spec"]["hostNetWork"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pods[0], KUBERNETES, strict=True)


def test_no_file_has_a_secret_or_an_alias() -> None:
    for path in FOLDER.glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        assert "&id" not in text
        for made in yaml.safe_load_all(text):
            assert made["metadata"]["namespace"] == "graftwork"
