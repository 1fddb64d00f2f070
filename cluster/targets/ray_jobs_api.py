"""The Jobs API of a Ray by plain HTTP: every call has a time limit and an error that says whose fault it is.

Ray's own client has no time limits, and imports Ray: seconds, for one listing. Endpoints as of Ray 2.60
(dashboard/modules/job/job_head.py).
"""

import hashlib
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import httpx

from graftwork.cluster.session import REACH_S, host_and_port, is_loopback, refusal_error, token
from graftwork.errors import ClusterError, RunError

ANSWER_S = 10.0
SUBMIT_S = 30.0
"""The dashboard itself looks for an agent for 10 s before it answers."""
AGENT_S = 120.0
"""How long the agent that runs jobs may come up after the dashboard: 10 to 90 s on a loaded machine (Ray 2.60)."""
POLL_INTERVAL_S = 1.0
ENDED = frozenset({"STOPPED", "SUCCEEDED", "FAILED"})


@dataclass(frozen=True)
class RayJob:
    """A job as the Jobs API shows it."""

    submission_id: str
    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED."""
    message: str = ""
    exit_code: int | None = None


@dataclass(frozen=True)
class RayNode:
    """A machine of the cluster that lives."""

    host: str
    """Empty where its agent does not report."""
    is_head: bool
    total: Mapping[str, float]
    """CPU, GPU, memory (bytes) that Ray hands out there."""
    used: Mapping[str, float]

    @property
    def gpu_type(self) -> str:
        """As Ray detected it (`accelerator_type:H100`); empty where it detected none."""
        names = (name.partition(":")[2] for name in self.total if name.startswith("accelerator_type:"))
        return next(names, "")

    def free(self, name: str) -> float:
        return self.total.get(name, 0.0) - self.used.get(name, 0.0)


class JobsApi:
    """The jobs of the Ray whose dashboard is at http(s)://HOST:PORT, with the token of the environment.

    Each call raises ClusterError when the address does not answer, is no Ray, or refuses the token.
    """

    def __init__(self, on: str, answer_s: float = ANSWER_S) -> None:
        host, _ = host_and_port(on)
        self.on, found = on.rstrip("/"), token()
        self._http = httpx.Client(
            base_url=self.on,
            headers={"Authorization": f"Bearer {found}"} if found else {},
            timeout=httpx.Timeout(answer_s, connect=min(answer_s, REACH_S)),
            trust_env=not is_loopback(host),  # no proxy leads to this machine
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def submit(self, entrypoint: str, package: bytes, submission_id: str, **more: Any) -> None:
        """Start a job in the folder that a zip holds, or find the one of that id. `more`: other fields of the request.

        A Ray that has just started has no agent for jobs yet: it refuses, takes nothing, and is asked again. So is one
        whose answer was lost: the id makes sure of one job.
        """
        name = f"_ray_pkg_{hashlib.sha1(package).hexdigest()}.zip"  # the cluster names a zip by its content
        if self.ask("GET", f"/api/packages/gcs/{name}", missing=True) is None:
            self.ask("PUT", f"/api/packages/gcs/{name}", content=package)
        request = {
            "entrypoint": entrypoint,
            "submission_id": submission_id,
            "runtime_env": {"working_dir": f"gcs://{name}"},
            **more,
        }
        end = time.monotonic() + AGENT_S
        while True:
            try:
                self.ask("POST", "/api/jobs/", json=request, timeout=SUBMIT_S)
            except ClusterError as error:
                if "already exists" in error.problem:
                    return
                if "No available agent" not in error.problem or time.monotonic() > end:
                    raise
                time.sleep(POLL_INTERVAL_S)
            else:
                return

    def status(self, submission_id: str) -> RayJob | None:
        """Where a job is now; None where there is none of that id."""
        answer = self.ask("GET", f"/api/jobs/{submission_id}", missing=True)
        return None if answer is None else _ray_job(answer.json())

    def logs(self, submission_id: str) -> Iterator[str]:
        """What the job prints, about a second behind, until it has ended."""
        shown = 0
        while True:
            job = self.status(submission_id)
            answer = self.ask("GET", f"/api/jobs/{submission_id}/logs", missing=True)
            text = str(answer.json()["logs"]) if answer is not None else ""
            if len(text) > shown:
                yield text[shown:]
                shown = len(text)
            if job is None or job.status in ENDED:
                return
            time.sleep(POLL_INTERVAL_S)

    def stop(self, submission_id: str) -> None:
        """Ask a job to end. Nothing happens when it has ended, or when it is pending (ray#58353)."""
        self.ask("POST", f"/api/jobs/{submission_id}/stop", missing=True)

    def delete(self, submission_id: str) -> None:
        """Forget a job that has ended."""
        self.ask("DELETE", f"/api/jobs/{submission_id}", missing=True)

    def list(self) -> list[RayJob]:
        """The jobs that were submitted to this Ray."""
        return [_ray_job(info) for info in self.json("/api/jobs/") if info["submission_id"]]

    def nodes(self) -> Sequence[RayNode]:
        """Return the machines that are alive."""
        summary = self.json("/nodes?view=summary")["data"]["summary"]
        status = self.json("/api/cluster_status")["data"]["clusterStatus"] or {}
        used = (status.get("loadMetricsReport") or {}).get("usageByNode") or {}
        nodes = []
        for info in summary:
            raylet = info.get("raylet") or {}
            if raylet.get("state") == "ALIVE":
                usage = {name: float(pair[0]) for name, pair in (used.get(raylet["nodeId"]) or {}).items()}
                host, is_head = str(info.get("hostname") or ""), bool(raylet.get("isHeadNode"))
                nodes.append(RayNode(host, is_head, raylet["resourcesTotal"], usage))
        return nodes

    def json(self, path: str) -> Any:
        """What a path of the dashboard answers."""
        answer = self.ask("GET", path)
        assert answer is not None
        return answer.json()

    def ask(self, method: str, path: str, *, missing: bool = False, **more: Any) -> httpx.Response | None:
        """One request. `missing`: None for a 404, which is an error else."""
        try:
            answer = self._http.request(method, path, **more)
        except httpx.HTTPError as error:
            raise self._connection_error(error) from None
        if missing and answer.status_code == 404:
            return None
        if answer.status_code in (401, 403):
            raise refusal_error(self.on, f"{answer.status_code} {answer.text}")
        is_json = not answer.content or "json" in answer.headers.get("content-type", "")  # a package has no content
        if answer.is_success and is_json:
            return answer
        if answer.status_code < 500 and not (answer.status_code == 400 and path.startswith("/api/jobs")):
            url = answer.headers.get("location")
            found = f"it sends us on to {url}" if url else f"{answer.status_code} {answer.text.strip()[:200]!r}"
            raise ClusterError(
                f"--target {self.on}",
                f"what answers there is no Ray dashboard ({found})",
                "the HTTP address of a Ray dashboard is needed; a login page before it keeps programs out",
                "check the address, or open a tunnel to the head's port 8265",
            )
        raise ClusterError(
            f"--target {self.on}",
            f"its Jobs API failed ({answer.status_code} {answer.text.strip()[-500:]})",
            "the dashboard of a Ray 2.60 with ray[default] answers there",
            "look at the cluster's dashboard log",
        )

    def _connection_error(self, error: httpx.HTTPError) -> ClusterError:
        host, port = host_and_port(self.on)
        subject, connects = f"--target {self.on}", isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
        proxy = ""
        if not is_loopback(host) and not urllib.request.proxy_bypass(host):
            proxies = urllib.request.getproxies()
            proxy = proxies.get(self.on.partition(":")[0], proxies.get("all", "")).rpartition("@")[2]  # no password
        if proxy and (connects or isinstance(error, httpx.ProxyError)):
            return ClusterError(
                subject,
                f"the proxy {proxy} does not lead there ({error})",
                "HTTP_PROXY, HTTPS_PROXY and ALL_PROXY count for all hosts that NO_PROXY does not name",
                f"NO_PROXY={host}",
            )
        if "certificate" in str(error).lower():
            return ClusterError(
                subject,
                f"its certificate is not trusted ({error})",
                "https:// is answered by one whose authority this machine knows",
                "SSL_CERT_FILE=FILE with the authority's certificate",
            )
        if "SSL" in str(error):
            return ClusterError(
                subject,
                f"{host}:{port} does not speak TLS ({error})",
                "a Ray dashboard speaks http, unless a proxy before it speaks https",
                f"--target http://{host}:{port}",
            )
        if connects:
            return ClusterError(
                subject,
                f"nothing answers at {host}:{port} ({str(error) or type(error).__name__})",
                "a running Ray's dashboard is needed, usually port 8265",
                "start it, open a tunnel to it, or use --target local",
            )
        return ClusterError(
            subject,
            f"something listens there but gives no answer ({error!r})",
            "the address of a Ray dashboard is needed, usually port 8265; behind TLS it is https://",
            "check scheme, host and port; a head that swaps or hangs answers late",
        )


def exit_code(job: RayJob | None, submission_id: str) -> int:
    """Of the job's command. Raises RunError where it did not end by itself."""
    if job is None:
        raise RunError(f"job {submission_id}", "the cluster does not know it any more")
    if job.exit_code is not None:
        return job.exit_code
    if job.status == "SUCCEEDED":
        return 0
    raise RunError(f"job {submission_id}", f"it is {job.status} without an exit code ({job.message})")


def _ray_job(info: Mapping[str, Any]) -> RayJob:
    return RayJob(info["submission_id"], info["status"], info["message"] or "", info["driver_exit_code"])
