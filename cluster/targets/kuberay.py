"""KubeRay target: an attempt is a RayJob object, an endpoint a RayService.

The operator reports the state of an endpoint's replicas; there is no driver, so its job has no heartbeat.
"""

from collections.abc import Collection, Mapping
from typing import Any

from graftwork.cluster.jobs.models import Attempt, Finding, Job, ObservedState, TargetMachines, refuse
from graftwork.cluster.jobs.packaging import publish_wheel, wheel_uri
from graftwork.cluster.kuberay.client import KubeApi, namespaced, remove
from graftwork.cluster.kuberay.live_checks import PLURALS, diagnose, live_crd, live_findings, object_path
from graftwork.cluster.kuberay.object_view import dig, listed, mapping
from graftwork.cluster.kuberay.objects import JOB_LABEL, PLAN, build_rayjob, label_value, service_objects
from graftwork.cluster.kuberay.pending_reasons import reasons
from graftwork.cluster.kuberay.preflight import machines_of, preflight
from graftwork.cluster.spec import ClusterSpec
from graftwork.errors import ClusterError
from graftwork.storage.store import Store

OURS = {"app.kubernetes.io/managed-by": "graftwork"}
SELECTOR = ",".join(f"{key}={value}" for key, value in OURS.items())
STORE_PATIENCE_S = 10.0
GROUP, VERSION = "ray.io", "v1"


class KubeRayTarget:
    """`on` is k8s:CONTEXT/NAMESPACE of the kubeconfig."""

    def __init__(self, on: str, root: str, cluster: ClusterSpec) -> None:
        self.on, self._root, self._cluster = on, root, cluster
        self._api = KubeApi(on)

    def machines(self, cluster: ClusterSpec) -> TargetMachines:
        """The worker groups that the cluster's file describes; the cluster is not asked."""
        return machines_of(cluster)

    def check(self, job: Job) -> list[Finding]:
        """The rules without the cluster, then what the cluster itself says: its CRD, rights, names, queue, room."""
        attempt = Attempt(job, 1)
        objects = self.objects(attempt)
        crd, found = live_crd(self._api, PLURALS[objects[0]["kind"]])
        if any(finding.level == "error" for finding in found):
            return found
        found += preflight(attempt, self._api.place.namespace, crd, objects)
        found += live_findings(self._api, job, objects)
        return found + [one for one in (self._taken(planned) for planned in objects) if one is not None]

    def objects(self, attempt: Attempt) -> list[Mapping[str, Any]]:
        """The RayJob; for an endpoint a RayService, and what guards its pods."""
        if attempt.job.kind == "serve":
            return [*service_objects(attempt.job, self._api.place.namespace, self._wheel_uri(attempt.job))]
        return [build_rayjob(attempt, self._api.place.namespace, self._wheel_uri(attempt.job))]

    def current(self, attempt: Attempt) -> list[Mapping[str, Any]]:
        """Those of them that are there, without what the server adds."""
        found = [self._api.get(self._path_of(planned)) for planned in self.objects(attempt)]
        return [without_server_fields(one) for one in found if one is not None]

    def doctor(self) -> list[Finding]:
        """KubeRay, our rights, what the cluster's spec names, room; jobs that hang, clusters that are left over."""
        any_job = Job("doctor", "exec", "", self._root, {}, self._cluster)
        return diagnose(self._api, any_job, SELECTOR)

    def start(self, attempt: Attempt) -> None:
        """Create what is not there yet: the server takes one object of a name, whoever comes first.

        The code lies in the store before a pod can ask for it.
        """
        if attempt.job.cluster.code == "wheel":
            publish_wheel(Store(attempt.job.root, STORE_PATIENCE_S))
        for planned in self.objects(attempt):
            path = self._path_of(planned)
            answer = self._api.ask("POST", path.rpartition("/")[0], planned, {"fieldValidation": "Strict"})
            if answer.code != 409:
                self._api.required(answer, f"create {planned['kind']} {attempt.id}")
                continue
            taken = self._taken(planned)
            if taken is not None:
                raise ClusterError(
                    f"create {planned['kind']} {attempt.id} in {self.on}", taken.problem, taken.rule, taken.hint
                )
            found = self._api.get(path)
            if found is not None:
                renew(self._api, planned, found)

    def observe(self, attempt_ids: Collection[str]) -> dict[str, ObservedState]:
        """One listing for all."""
        path = namespaced(GROUP, VERSION, self._api.place.namespace, "rayjobs")
        found = {str(job["metadata"]["name"]): job for job in self._api.list(path, SELECTOR)}
        mine = {name: job for name, job in found.items() if name in attempt_ids}
        held = reasons(self._api, list(mine.values()))
        seen = {name: seen_of(job, held.get(name, "")) for name, job in mine.items()}
        return seen | seen_services(self._api, [name for name in attempt_ids if name not in seen], SELECTOR)

    def stop(self, attempt_id: str) -> None:
        """Delete the object and wait until it is gone, with its cluster and pods: `removal_s` of kuberay/removal.py."""
        path = namespaced(GROUP, VERSION, self._api.place.namespace, "rayjobs", attempt_id)
        if not remove(self._api, path, "RayJob"):
            remove_service(self._api, attempt_id)

    def _taken(self, planned: Mapping[str, Any]) -> Finding | None:
        """Whether somebody else's object, or that of the same job in another store, has the name already."""
        found = self._api.get(self._path_of(planned))
        if found is None:
            return None
        name, move = (
            str(planned["metadata"]["name"]),
            "set another `name`, or another namespace: --target k8s:CONTEXT/NAMESPACE",
        )
        if not is_ours(found):
            return refuse(
                "NAME-TAKEN",
                name,
                "an object that Graftwork did not create has this name",
                f"objects of Graftwork have the label {SELECTOR}",
                move,
            )
        if planned["kind"] == "RayJob" and dig(found, "spec", "entrypoint") != planned["spec"]["entrypoint"]:
            return refuse(
                "NAME-TAKEN",
                name,
                "the same job of another store has this name",
                "an object's name is unique in its namespace",
                move,
            )
        return None

    def _wheel_uri(self, job: Job) -> str | None:
        return wheel_uri(Store(job.root)) if job.cluster.code == "wheel" else None

    def _path_of(self, planned: Mapping[str, Any]) -> str:
        return object_path(self._api.place.namespace, planned)


def is_ours(found: Mapping[str, Any]) -> bool:
    """Whether an object bears our label."""
    labels = found["metadata"].get("labels", {})
    return all(labels.get(key) == value for key, value in OURS.items())


def seen_of(job: Mapping[str, Any], held: str = "") -> ObservedState:
    """A RayJob's status, with what holds it back. Suspended from its birth: the operator has said nothing of it yet."""
    status = job.get("status", {})
    deployment = status.get("jobDeploymentStatus") or ("Suspended" if dig(job, "spec", "suspend") else "")
    said = "; ".join(part for part in (held, status.get("message", "")) if part)
    return ObservedState(status.get("jobStatus", ""), deployment, status.get("reason", ""), said)


SERVER_META = frozenset(
    {
        "uid",
        "resourceVersion",
        "generation",
        "creationTimestamp",
        "managedFields",
        "finalizers",
        "selfLink",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
    }
)


def without_server_fields(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """An object as somebody would have written it."""
    kept = {key: value for key, value in found.items() if key != "status"}
    return {**kept, "metadata": {key: value for key, value in found["metadata"].items() if key not in SERVER_META}}


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
