"""What KubeRay's operator does with a RayJob, for tests: each runs as a real Ray job on one shared Ray head.

Its rules are those of KubeRay v1.7 (rayjob_controller.go) as far as a client sees them: status, suspend, deadlines,
shutdown, deletion. It does the garbage collector's part too: an object that is deleted in the foreground is gone once
its work has stopped and its RayCluster, a real object, is gone. The pods of a cluster are not objects: `pods_end_s`
and `cleanup_s` are the times that they and KubeRay's `redis-cleanup` take.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from tests.k8s.ray_head import Head
from tests.k8s.server import NAMESPACE, ApiServer
from tests.process_races import ROOT

POLL_INTERVAL_S = 0.1
FINALIZER = "ray.io/rayjob-finalizer"
REDIS = "ray.io/gcs-ft-redis-cleanup-finalizer"
FOREGROUND = "foregroundDeletion"
FOLDER = f"/apis/ray.io/v1/namespaces/{NAMESPACE}"
ENDED = {"STOPPED": "Complete", "SUCCEEDED": "Complete", "FAILED": "Failed"}
OVER = frozenset({"Complete", "Failed", "ValidationFailed"})
Object = Mapping[str, Any]


class FakeOperator:
    """A thread that looks at all RayJobs again and again. `secrets`: what pods would read, by (Secret, key)."""

    def __init__(self, server: ApiServer, head: Head, secrets: Mapping[tuple[str, str], str] | None = None) -> None:
        self._server, self._head, self.secrets = server, head, dict(secrets or {})
        self.pods_end_s, self.cleanup_s = 0.0, 0.0
        self.folder = Path(tempfile.mkdtemp(prefix="gwpods-"))
        self._doomed: set[str] = set()
        self._laid_out: set[tuple[str, ...]] = set()
        self._stop, self._paused = threading.Event(), threading.Event()
        self._looking = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="fake-operator", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def pause(self) -> None:
        """It looks at nothing new from here on, as an operator that is down; deletions go through all the same."""
        with self._looking:
            self._paused.set()

    def resume(self) -> None:
        self._paused.clear()

    def end(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(30)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self) -> None:
        while not self._stop.wait(POLL_INTERVAL_S):
            self._look()

    def _look(self) -> None:
        code, found = self._server.ask("GET", f"{FOLDER}/rayjobs")
        if code != 200:
            return
        self._end_doomed()
        with self._looking:
            for job in found["items"]:
                if job["metadata"].get("deletionTimestamp"):
                    self._finish(job)
                elif not self._paused.is_set():
                    self._reconcile(job)
        for kind in ("rayclusters", "rayservices"):
            code, found = self._server.ask("GET", f"{FOLDER}/{kind}")
            for one in found["items"] if code == 200 else []:
                if one["metadata"].get("deletionTimestamp"):
                    self._end_machines(one, f"{FOLDER}/{kind}/{one['metadata']['name']}")

    def _end_machines(self, one: Object, path: str) -> None:
        """A RayCluster or RayService: its pods take `pods_end_s`, after them Redis is cleaned up in `cleanup_s`."""
        age, held = _age_s(one["metadata"]["deletionTimestamp"]), one["metadata"].get("finalizers", [])
        if age >= self.pods_end_s + (self.cleanup_s if REDIS in held else 0.0):
            left = [name for name in held if name not in (REDIS, FOREGROUND)]
            self._server.ask("PATCH", path, {"metadata": {"finalizers": left}}, "application/merge-patch+json")

    def _reconcile(self, job: Object) -> None:
        status, spec = job.get("status", {}), job["spec"]
        phase = status.get("jobDeploymentStatus", "")
        if phase in OVER:
            self._shut_down(job)
        elif spec.get("suspend"):
            if phase != "Suspended":
                self._end_work(job)
                self._patch(job, jobDeploymentStatus="Suspended", jobStatus="", rayClusterName="")
        elif phase in ("", "Suspended"):
            self._patch_object(job, {"metadata": {"finalizers": [FINALIZER]}})
            self._server.ask("POST", f"{FOLDER}/rayclusters", _cluster(job))
            self._patch(
                job,
                jobDeploymentStatus="Initializing",
                jobStatus="",
                startTime=_now(),
                jobId=spec["jobId"],
                rayClusterName=f"{job['metadata']['name']}-c",
            )
        elif phase == "Initializing":
            self._bring_up(job)
        else:
            self._follow(job)

    def _bring_up(self, job: Object) -> None:
        spec, since = job["spec"], _age_s(job["status"]["startTime"])
        if since > spec.get("preRunningDeadlineSeconds", 10**9):
            self._fail(job, "PreRunningDeadlineExceeded", "the cluster did not come up in time")
            return
        environment, lacking = self._environment(job)
        if lacking:
            self._patch(job, message=f"CreateContainerConfigError: {lacking}")
            return
        lacking = self._init(job, environment)
        if lacking:
            self._patch(job, message=lacking)
            return
        runtime = dict(yaml.safe_load(spec.get("runtimeEnvYAML") or "{}") or {})
        runtime["env_vars"] = {**environment, **runtime.get("env_vars", {})}
        code, answer = self._head.ask(
            "POST",
            "/api/jobs/",
            {
                "entrypoint": spec["entrypoint"],
                "submission_id": spec["jobId"],
                "runtime_env": runtime,
                "metadata": spec.get("metadata") or {},
            },
        )
        if code == 200 or "already exists" in str(answer):
            self._patch(job, jobDeploymentStatus="Running", jobStatus="PENDING", dashboardURL=self._head.address)
        elif code:
            self._fail(job, "SubmissionFailed", str(answer)[-300:])

    def _follow(self, job: Object) -> None:
        spec, status = job["spec"], job["status"]
        if _age_s(status["startTime"]) > spec.get("activeDeadlineSeconds", 10**9):
            self._fail(job, "DeadlineExceeded", "the RayJob has passed its activeDeadlineSeconds")
            return
        code, found = self._head.ask("GET", f"/api/jobs/{spec['jobId']}")
        if code != 200:
            return  # KubeRay keeps the last status for JobStatusCheckTimeout, 300 s
        now = found["status"]
        if now in ENDED:
            self._patch(
                job,
                jobStatus=now,
                jobDeploymentStatus=ENDED[now],
                message=str(found.get("message") or ""),
                endTime=_now(),
                reason="AppFailed" if now == "FAILED" else "",
            )
        elif now != status.get("jobStatus"):
            self._patch(job, jobStatus=now)

    def _fail(self, job: Object, reason: str, message: str) -> None:
        self._end_work(job)
        self._patch(job, jobDeploymentStatus="Failed", reason=reason, message=message, endTime=_now())

    def _shut_down(self, job: Object) -> None:
        """`deletionRules` that delete the object itself. A TTL alone ends the cluster and leaves the object."""
        spec, status = job["spec"], job["status"]
        for rule in (spec.get("deletionStrategy") or {}).get("deletionRules", []):
            when = rule["condition"]
            meets = when.get("jobStatus") == status.get("jobStatus") or (
                when.get("jobDeploymentStatus") == status.get("jobDeploymentStatus")
            )
            if rule["policy"] == "DeleteSelf" and meets and _age_s(status["endTime"]) >= when.get("ttlSeconds", 0):
                self._server.ask("DELETE", _path(job))

    def _finish(self, job: Object) -> None:
        """The operator's finalizer goes once its work has stopped, the collector's once its cluster is gone; others'
        stay."""
        held = job["metadata"].get("finalizers", [])
        if FINALIZER in held or FOREGROUND in held:
            if self._phase(job["spec"]["jobId"]) == "PENDING":
                self._doomed.add(job["spec"]["jobId"])  # its cluster would be gone before it could start
            else:
                self._end_work(job)
            mine = {FINALIZER} if self._cluster_is_there(job) else {FINALIZER, FOREGROUND}
            left = [name for name in held if name not in mine]
            if left != held:
                self._patch_object(job, {"metadata": {"finalizers": left}})

    def _cluster_is_there(self, job: Object) -> bool:
        """Return whether the job's cluster exists; its deletion, in the foreground too, is under way at return."""
        path = f"{FOLDER}/rayclusters/{job['metadata']['name']}-c"
        code, found = self._server.ask("GET", path)
        if code == 200 and not found["metadata"].get("deletionTimestamp"):
            self._server.ask("DELETE", path, {"propagationPolicy": "Foreground"})
        return code != 404

    def _end_work(self, job: Object) -> None:
        """The Ray job has ended and is forgotten at return, as if with its cluster; no-op where the head is gone."""
        where = f"/api/jobs/{job['spec']['jobId']}"
        while (found := self._head.ask("GET", where))[0] == 200:
            if found[1]["status"] in ENDED:
                self._head.ask("DELETE", where)
                return
            self._head.ask("POST", f"{where}/stop")
            if self._stop.wait(POLL_INTERVAL_S):
                return

    def _end_doomed(self) -> None:
        """Ray stops no pending job (ray#58353): here it waits for its start, and is stopped then."""
        for name in [*self._doomed]:
            phase = self._phase(name)
            if phase in ENDED or not phase:
                self._head.ask("DELETE", f"/api/jobs/{name}")
                self._doomed.discard(name)
            elif phase == "RUNNING":
                self._head.ask("POST", f"/api/jobs/{name}/stop")

    def _phase(self, name: str) -> str:
        code, found = self._head.ask("GET", f"/api/jobs/{name}")
        return str(found["status"]) if code == 200 else ""

    def _environment(self, job: Object) -> tuple[dict[str, str], str]:
        """What the head's container would have; and what of it is not there."""
        pod = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
        container, values = pod["containers"][0], {}
        for source in container.get("envFrom", []):
            name = source["secretRef"]["name"]
            held = {key: value for (secret, key), value in self.secrets.items() if secret == name}
            if not held:
                return {}, f'secret "{name}" not found'
            values.update(held)
        for entry in container.get("env", []):
            reference = entry.get("valueFrom", {}).get("secretKeyRef")
            if reference is not None and (reference["name"], reference["key"]) not in self.secrets:
                return {}, f'secret "{reference["name"]}" with key "{reference["key"]}" not found'
            if reference is not None:
                values[entry["name"]] = self.secrets[reference["name"], reference["key"]]
            elif "value" in entry:
                values[entry["name"]] = entry["value"]
        here = {f"/{name}": str(self.folder / name) for name in ("code", "scratch")}  # the pod's own volumes
        return {key: here.get(value, value) for key, value in values.items() if not key.startswith("RAY_")}, ""

    def _init(self, job: Object, environment: Mapping[str, str]) -> str:
        """Run the init container that lays out the code, once a wheel; what went wrong."""
        pod = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
        for container in pod.get("initContainers", []):
            words = [str(self.folder / "code") if word == "/code" else word for word in container["command"]]
            if tuple(words) in self._laid_out:
                continue
            shutil.rmtree(self.folder / "code", ignore_errors=True)
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            own = {**os.environ, **environment, "PATH": path, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(words, env=own, cwd=self.folder, capture_output=True, text=True)
            if done.returncode:
                return f"Init:Error: {done.stderr[-500:]}"
            self._laid_out.add(tuple(words))
        return ""

    def _patch(self, job: Object, **status: str) -> None:
        merge = "application/merge-patch+json"
        self._server.ask("PATCH", f"{_path(job)}/status", {"status": status}, merge)

    def _patch_object(self, job: Object, change: Object) -> None:
        self._server.ask("PATCH", _path(job), change, "application/merge-patch+json")


def _cluster(job: Object) -> Object:
    """The RayCluster that the operator makes of a RayJob, which owns it."""
    owner = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "name": job["metadata"]["name"],
        "uid": job["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }
    part = job["spec"]["rayClusterSpec"]
    redis = (part.get("gcsFaultToleranceOptions") or {}).get("backend") == "redis"
    metadata = {
        "name": f"{job['metadata']['name']}-c",
        "ownerReferences": [owner],
        "finalizers": [REDIS] if redis else [],
    }
    return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": metadata, "spec": part}


def _path(job: Object) -> str:
    return f"{FOLDER}/rayjobs/{job['metadata']['name']}"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _age_s(stamp: str) -> float:
    return time.time() - datetime.fromisoformat(stamp).timestamp()
