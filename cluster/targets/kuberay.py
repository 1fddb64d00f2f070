"""KubeRay target: an attempt is a RayJob object, an endpoint a RayService.

The operator reports the state of an endpoint's replicas; there is no driver, so its job has no heartbeat.
"""

from collections.abc import Collection

from graftwork.cluster.jobs.models import Attempt, Finding, Job, ObservedState, TargetMachines, refuse
from graftwork.cluster.jobs.packaging import publish_wheel, wheel_uri
from graftwork.cluster.kuberay.client import KubeApi, namespaced, remove
from graftwork.cluster.kuberay.labels import JOB_LABEL, PLAN_ANNOTATION, label_value
from graftwork.cluster.kuberay.live_checks import PLURALS, diagnose, live_crd, live_findings, object_path
from graftwork.cluster.kuberay.object_view import KubeView, dig, listed, mapping
from graftwork.cluster.kuberay.objects import build_rayjob, service_objects
from graftwork.cluster.kuberay.pending_reasons import reasons
from graftwork.cluster.kuberay.preflight import machines_of, preflight
from graftwork.cluster.kuberay.schema import METADATA
from graftwork.cluster.spec import ClusterSpec
from graftwork.errors import ClusterError
from graftwork.storage.store import Store

OURS = {"app.kubernetes.io/managed-by": "graftwork"}
SELECTOR = ",".join(f"{key}={value}" for key, value in OURS.items())
STORE_PATIENCE_S = 10.0
GROUP, VERSION = "ray.io", "v1"
KINDS = (("ray.io/v1", "RayService"), ("policy/v1", "PodDisruptionBudget"))
SERVER_META = METADATA - {"name", "namespace", "labels", "annotations", "generateName", "ownerReferences"}
"""Fields of an object's metadata that the server sets."""


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
        return found + [one for one in (self._name_conflict(planned) for planned in objects) if one is not None]

    def objects(self, attempt: Attempt) -> list[KubeView]:
        """The RayJob; for an endpoint a RayService, and what guards its pods."""
        if attempt.job.kind == "serve":
            return [*service_objects(attempt.job, self._api.place.namespace, self._wheel_uri(attempt.job))]
        return [build_rayjob(attempt, self._api.place.namespace, self._wheel_uri(attempt.job))]

    def current(self, attempt: Attempt) -> list[KubeView]:
        """Those of them that are there, without what the server adds."""
        found = [self._api.get(self._path_of(planned)) for planned in self.objects(attempt)]
        return [
            {
                **{key: value for key, value in one.items() if key not in ("metadata", "status")},
                "metadata": {key: value for key, value in one["metadata"].items() if key not in SERVER_META},
            }
            for one in found
            if one is not None
        ]

    def doctor(self) -> list[Finding]:
        """KubeRay, our rights, what the cluster's spec names, room; jobs that hang, clusters that are left over."""
        any_job = Job("doctor", "exec", "", self._root, {}, self._cluster)
        return diagnose(self._api, any_job, SELECTOR)

    def start(self, attempt: Attempt) -> None:
        """Create the objects that are absent: the server takes one object of a name, from the first caller.

        The code is in the store before a pod fetches it.
        """
        if attempt.job.cluster.code == "wheel":
            publish_wheel(Store(attempt.job.root, STORE_PATIENCE_S))
        for planned in self.objects(attempt):
            path = self._path_of(planned)
            answer = self._api.ask("POST", path.rpartition("/")[0], planned, {"fieldValidation": "Strict"})
            if answer.code != 409:
                self._api.required(answer, f"create {planned['kind']} {attempt.id}")
                continue
            conflict = self._name_conflict(planned)
            if conflict is not None:
                subject = f"create {planned['kind']} {attempt.id} in {self.on}"
                raise ClusterError(subject, conflict.problem, conflict.rule, conflict.hint)
            found = self._api.get(path)
            if found is not None:
                renew(self._api, planned, found)

    def observe(self, attempt_ids: Collection[str]) -> dict[str, ObservedState]:
        """One listing for all."""
        path = namespaced(GROUP, VERSION, self._api.place.namespace, "rayjobs")
        found = {str(job["metadata"]["name"]): job for job in self._api.list(path, SELECTOR)}
        mine = {name: job for name, job in found.items() if name in attempt_ids}
        waits, seen = reasons(self._api, list(mine.values())), dict[str, ObservedState]()
        for name, job in mine.items():
            status = job.get("status", {})
            # Suspended from its birth: the operator has set no status yet.
            deployment = status.get("jobDeploymentStatus") or ("Suspended" if dig(job, "spec", "suspend") else "")
            message = "; ".join(part for part in (waits.get(name, ""), status.get("message", "")) if part)
            seen[name] = ObservedState(status.get("jobStatus", ""), deployment, status.get("reason", ""), message)
        return seen | seen_services(self._api, [name for name in attempt_ids if name not in seen], SELECTOR)

    def stop(self, attempt_id: str) -> None:
        """Delete the object and wait until it is gone, with its cluster and pods: `removal_s` of kuberay/client.py."""
        path = namespaced(GROUP, VERSION, self._api.place.namespace, "rayjobs", attempt_id)
        if not remove(self._api, path, "RayJob"):
            remove_service(self._api, attempt_id)

    def _name_conflict(self, planned: KubeView) -> Finding | None:
        """Return the finding of a name that a foreign object, or the same job of another store, already has."""
        found = self._api.get(self._path_of(planned))
        if found is None:
            return None
        name, hint = (
            str(planned["metadata"]["name"]),
            "set another `name`, or another namespace: --target k8s:CONTEXT/NAMESPACE",
        )
        if not is_ours(found):
            return refuse(
                "NAME-TAKEN",
                name,
                "an object that Graftwork did not create has this name",
                f"objects of Graftwork have the label {SELECTOR}",
                hint,
            )
        if planned["kind"] == "RayJob" and dig(found, "spec", "entrypoint") != planned["spec"]["entrypoint"]:
            return refuse(
                "NAME-TAKEN",
                name,
                "the same job of another store has this name",
                "an object's name is unique in its namespace",
                hint,
            )
        return None

    def _wheel_uri(self, job: Job) -> str | None:
        return wheel_uri(Store(job.root)) if job.cluster.code == "wheel" else None

    def _path_of(self, planned: KubeView) -> str:
        return object_path(self._api.place.namespace, planned)


def is_ours(found: KubeView) -> bool:
    """Return whether an object has our label."""
    labels = found["metadata"].get("labels", {})
    return all(labels.get(key) == value for key, value in OURS.items())


def renew(api: KubeApi, planned: KubeView, found: KubeView) -> None:
    """Have an endpoint that is there be as planned; the operator changes what can be changed under load."""
    plans = [dig(one, "metadata", "annotations", PLAN_ANNOTATION) for one in (planned, found)]
    is_same = plans[0] == plans[1] if plans[0] else planned.get("spec") == found.get("spec")
    if is_same or planned["kind"] not in {kind for _, kind in KINDS}:
        return
    path = object_path(api.place.namespace, planned)
    while True:
        metadata = {**planned["metadata"], "resourceVersion": found["metadata"]["resourceVersion"]}
        answer = api.ask("PUT", path, {**planned, "metadata": metadata}, {"fieldValidation": "Strict"})
        if answer.code != 409:  # else somebody wrote it meanwhile, the operator's status apart
            api.required(answer, f"change {planned['kind']} {planned['metadata']['name']}")
            return
        found = api.required(api.ask("GET", path), f"read {path}")


def seen_services(api: KubeApi, attempt_ids: Collection[str], selector: str) -> dict[str, ObservedState]:
    """The endpoints of these attempts. An endpoint that went on to another spec is no longer the earlier job's."""
    if not attempt_ids:
        return {}
    services = api.list(namespaced("ray.io", "v1", api.place.namespace, "rayservices"), selector)
    by_job = {str(dig(one, "metadata", "labels", JOB_LABEL)): one for one in services}
    jobs = {name: label_value(job_of(name)) for name in attempt_ids}
    return {name: seen_service(by_job[job]) for name, job in jobs.items() if job in by_job}


def seen_service(service: KubeView) -> ObservedState:
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
