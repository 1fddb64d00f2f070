"""Client of a served endpoint in a live cluster: changed in place under its name, found by its label, removed whole.

The operator reports the state of the endpoint's replicas; there is no driver, so its job has no heartbeat.
"""

from collections.abc import Collection, Mapping
from typing import Any

from graftwork.cluster.jobs.models import ObservedState
from graftwork.cluster.kuberay.client import KubeApi, namespaced, remove
from graftwork.cluster.kuberay.live_checks import object_path
from graftwork.cluster.kuberay.object_view import dig, listed, mapping
from graftwork.cluster.kuberay.objects import JOB_LABEL, PLAN, label_value

RENEWED = ("RayService", "PodDisruptionBudget")
KINDS = (("ray.io/v1", "RayService"), ("policy/v1", "PodDisruptionBudget"))


def renew(api: KubeApi, planned: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Have an endpoint that is there be as planned; the operator changes what can be changed under load."""
    if planned["kind"] not in RENEWED or same_plan(planned, found):
        return
    path = object_path(api.place.namespace, planned)
    while True:
        metadata = {**planned["metadata"], "resourceVersion": found["metadata"]["resourceVersion"]}
        answer = api.ask("PUT", path, {**planned, "metadata": metadata}, {"fieldValidation": "Strict"})
        if answer.code != 409:  # else somebody wrote it meanwhile, the operator's status apart
            api.required(answer, f"change {planned['kind']} {planned['metadata']['name']}")
            return
        found = api.required(api.ask("GET", path), f"read {path}")


def same_plan(planned: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether an object was made of the same plan, by the hash among its annotations; by its spec without one."""
    plans = [dig(one, "metadata", "annotations", PLAN) for one in (planned, found)]
    return plans[0] == plans[1] if plans[0] else planned.get("spec") == found.get("spec")


def seen_services(api: KubeApi, attempt_ids: Collection[str], selector: str) -> dict[str, ObservedState]:
    """The endpoints of these attempts. An endpoint that went on to another spec is no longer the earlier job's."""
    if not attempt_ids:
        return {}
    services = api.list(namespaced("ray.io", "v1", api.place.namespace, "rayservices"), selector)
    by_job = {str(dig(one, "metadata", "labels", JOB_LABEL)): one for one in services}
    jobs = {name: label_value(job_of(name)) for name in attempt_ids}
    return {name: seen_service(by_job[job]) for name, job in jobs.items() if job in by_job}


def seen_service(service: Mapping[str, Any]) -> ObservedState:
    """A RayService's status in the words of a RayJob's."""
    if dig(service, "spec", "suspend") is True:
        return ObservedState("", "Suspended", "", "suspended by hand")
    conditions = {str(one.get("type")): one for one in listed(dig(service, "status", "conditions"))}
    ready = mapping(conditions.get("Ready"))
    if ready.get("status") == "True":
        ends = dig(service, "status", "numServeEndpoints")
        return ObservedState("RUNNING", "Serving", "", f"{ends if ends is not None else 'some'} pods serve")
    return ObservedState("", "Initializing", str(ready.get("reason") or ""), str(ready.get("message") or ""))


def remove_service(api: KubeApi, attempt_id: str) -> None:
    """Nothing of an attempt's endpoint is there at return. One that serves another spec by now stays."""
    selector = f"{JOB_LABEL}={label_value(job_of(attempt_id))}"
    for version, kind in KINDS:
        planned = {"apiVersion": version, "kind": kind, "metadata": {"name": "x"}}
        folder = object_path(api.place.namespace, planned)[:-2]
        found = api.ask("GET", folder, query={"labelSelector": selector})
        for one in found.body.get("items", []) if found.ok else []:
            remove(api, f"{folder}/{one['metadata']['name']}", kind)


def job_of(attempt_id: str) -> str:
    """`airport-0123456789-a2` is an attempt at `airport-0123456789`."""
    return attempt_id.rpartition("-a")[0]
