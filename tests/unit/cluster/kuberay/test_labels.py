"""Labels: of equal meaning on an object and on its pods, and different for different texts."""

from typing import Any

import pytest

from graftwork.cluster.kuberay.labels import JOB_LABEL, LABEL_VALUE, MAX_LABEL, label_value, pod_selector
from tests.kuberay_objects import rayjob, rayservice


@pytest.mark.parametrize("made", [rayjob(), rayservice()], ids=lambda made: str(made["kind"]))
def test_the_selector_of_an_objects_pods_finds_head_and_workers(made: dict[str, Any]) -> None:
    selector = pod_selector(made["kind"], made["metadata"]["labels"])
    assert selector is not None
    key, _, value = selector.partition("=")
    part = made["spec"].get("rayClusterSpec") or made["spec"]["rayClusterConfig"]
    templates = [part["headGroupSpec"]["template"], *(group["template"] for group in part["workerGroupSpecs"])]
    assert [template["metadata"]["labels"][key] for template in templates] == [value] * 2


def test_a_job_label_is_a_job_id_wherever_it_is() -> None:
    job, service = rayjob(), rayservice()
    pod = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    assert pod["metadata"]["labels"][JOB_LABEL] == job["metadata"]["labels"][JOB_LABEL] == "airport-ababababab"
    assert service["metadata"]["labels"][JOB_LABEL] == "airport-ababababab"
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]
    assert JOB_LABEL not in head["metadata"]["labels"]


def test_a_foreign_object_has_no_selector() -> None:
    assert pod_selector("RayJob", {}) is None


def test_long_texts_keep_different_label_values() -> None:
    begin = "a" * 62
    values = [label_value(begin + end) for end in ("-first", "-second", "", "b")]
    assert len(set(values)) == len(values)
    assert values[2:] == [begin, begin + "b"]
    assert all(LABEL_VALUE.fullmatch(value) and len(value) <= MAX_LABEL for value in values)


def test_a_label_value_has_only_allowed_characters() -> None:
    assert label_value("é/team a_") == "team-a"
