"""The API server of a Kubernetes cluster: one way to ask it, with time limits and retries, over `kubernetes`.

Every call that we make may be made twice: what is created has our name, what is deleted may be gone.
"""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote

import yaml

from graftwork.cluster.kuberay import api_errors
from graftwork.errors import ConfigError

TIMEOUT_S = (5.0, 10.0)
"""To connect, and to answer."""
PATIENCE_S = 6.0
"""How long a call is tried again where the server is overloaded, failing or not heard."""
FIRST_PAUSE_S = 0.25
BUSY = frozenset({429, 500, 502, 503, 504})
PAGE = 500
"""Objects of one answer to a listing."""
Method = Literal["GET", "POST", "PUT", "DELETE"]


@dataclass(frozen=True)
class KubeNamespace:
    """A namespace of a context, as `--target k8s:CONTEXT/NAMESPACE` names it. A context may hold slashes."""

    context: str
    namespace: str

    @classmethod
    def parse(cls, on: str) -> "KubeNamespace":
        """Raises ConfigError unless both are named."""
        context, slash, namespace = on.removeprefix("k8s:").rpartition("/")
        if not slash or not context or not namespace:
            raise ConfigError(f"--target {on}", "it does not name a context and a namespace", "k8s:CONTEXT/NAMESPACE",
                              "kubectl config get-contexts lists the contexts")  # fmt: skip
        return cls(context, namespace)


@dataclass(frozen=True)
class ApiResponse:
    """What the server said. `body` is an object, a list or a Status."""

    code: int
    body: Mapping[str, Any]
    text: str = ""

    @property
    def ok(self) -> bool:
        return 200 <= self.code < 300

    @property
    def absent(self) -> bool:
        """The kind is served, and there is no such object."""
        return self.code == 404 and bool(self.body.get("details", {}).get("name"))

    @property
    def unserved(self) -> bool:
        """The server does not know the kind."""
        return self.code == 404 and not self.absent

    @property
    def message(self) -> str:
        """The server's own words."""
        return str(self.body.get("message") or self.text).strip()[:1000]


class KubeApi:
    """Opens the kubeconfig at the first call. Raises ClusterError with exit code 3 where no answer could be had."""

    def __init__(self, on: str) -> None:
        self.on = on
        self.place = KubeNamespace.parse(on)
        self._client: Any = None

    def ask(
        self, method: Method, path: str, body: Mapping[str, Any] | None = None, query: Mapping[str, str] | None = None
    ) -> ApiResponse:
        """One call, tried again for PATIENCE_S where the server is busy or silent. Any other answer is the caller's."""
        began, pause = time.monotonic(), FIRST_PAUSE_S
        while True:
            answer, wait_s, failure = self._once(method, path, body, query)
            if answer is not None and answer.code not in BUSY:
                if answer.code == 401:
                    raise api_errors.unwelcome(self.on, answer.message)
                return answer
            pause_s = max(pause, wait_s)
            if time.monotonic() - began + pause_s > PATIENCE_S:
                if answer is not None:
                    raise api_errors.busy(self.on, answer.code, answer.message, time.monotonic() - began)
                raise api_errors.unreachable(self.on, self._server(), failure)
            time.sleep(pause_s)
            pause *= 2

    def get(self, path: str) -> Mapping[str, Any] | None:
        """An object; None where it is absent. Raises ClusterError for anything else."""
        answer = self.ask("GET", path)
        if answer.absent:
            return None
        return self.required(answer, f"read {path}")

    def list(self, path: str, selector: str = "") -> list[Mapping[str, Any]]:
        """All objects of a kind that bear the labels, in as few answers as the server gives."""
        query = {"limit": str(PAGE), **({"labelSelector": selector} if selector else {})}
        found: list[Mapping[str, Any]] = []
        while True:
            page = self.required(self.ask("GET", path, query=query), f"list {path}")
            found += page.get("items", [])
            token = page.get("metadata", {}).get("continue")
            if not token:
                return found
            query["continue"] = token

    def required(self, answer: ApiResponse, asked: str) -> Mapping[str, Any]:
        """The body of a good answer. Raises ClusterError that says what a bad one means."""
        if answer.ok:
            return answer.body
        if answer.code == 403:
            raise api_errors.forbidden(self.on, answer.message)
        if answer.unserved:
            raise api_errors.unserved(self.on, asked)
        raise api_errors.other_error(self.on, asked, answer.code, answer.message)

    def _once(
        self, method: Method, path: str, body: Mapping[str, Any] | None, query: Mapping[str, str] | None
    ) -> tuple[ApiResponse | None, float, str]:
        """The answer, or what failed; and how long the server asks us to wait."""
        client = self._opened()
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        asked = list((query or {}).items())
        client.update_params_for_auth(headers, asked, ["BearerToken"])  # a token is renewed here
        try:
            # Below `call_api`, which fails on a connection without an answer (kubernetes 36, api_client.py)
            got = client.rest_client.request(
                method, f"{self._server()}{path}", query_params=asked, headers=headers,
                body=dict(body) if body else None, _preload_content=False, _request_timeout=TIMEOUT_S,
            )  # fmt: skip
            return _answer(got.status, got.data), 0.0, ""
        except ApiException as error:
            if not error.status:
                raise api_errors.untrusted(self.on, self._server(), str(error.reason)) from None
            wait = (error.headers or {}).get("Retry-After", "0")
            return _answer(error.status, error.body or ""), float(wait) if wait.isdigit() else 0.0, ""
        except HTTPError as error:
            return None, 0.0, str(error)

    def _opened(self) -> Any:
        if self._client is None:
            self._client = open_context(self.on, self.place.context)
        return self._client

    def _server(self) -> str:
        return str(self._opened().configuration.host)


def open_context(on: str, context: str) -> Any:
    """The `ApiClient` of a context of the kubeconfig. Raises ClusterError with the contexts that there are."""
    try:
        from kubernetes import client, config
        from kubernetes.config.config_exception import ConfigException
    except ImportError:
        raise api_errors.no_extra(on) from None
    settings = client.Configuration()
    file = os.environ.get("KUBECONFIG") or "~/.kube/config"  # `kubernetes` would keep that of its import
    names: list[str] = []
    try:
        names += [str(found["name"]) for found in config.list_kube_config_contexts(file)[0] or []]
        if context in names:
            config.load_kube_config(file, context, settings)
    except (ConfigException, OSError, yaml.YAMLError, TypeError, AttributeError) as error:  # of a file of another form
        raise api_errors.no_kubeconfig(on, f"{file}: {error}") from None
    if context not in names:
        raise api_errors.no_context(on, context, names)
    settings.retries = False  # ours are in `ask`; urllib3's would triple the time limits
    return client.ApiClient(settings)


def _answer(code: int, data: bytes | str) -> ApiResponse:
    text = data.decode(errors="replace") if isinstance(data, bytes) else data
    try:
        body = json.loads(text)
    except ValueError:
        body = {}
    return ApiResponse(code, body if isinstance(body, dict) else {}, text)


def namespaced(group: str, version: str, namespace: str, plural: str, name: str = "") -> str:
    """Path of a kind's objects in a namespace, or of one of them. An empty group holds the core kinds."""
    root = f"/apis/{group}/{version}" if group else f"/api/{version}"
    return f"{root}/namespaces/{quote(namespace, safe='')}/{plural}" + (f"/{quote(name, safe='')}" if name else "")


def cluster_path(group: str, version: str, plural: str, name: str = "") -> str:
    """Path of a kind of the whole cluster."""
    root = f"/apis/{group}/{version}" if group else f"/api/{version}"
    return f"{root}/{plural}" + (f"/{quote(name, safe='')}" if name else "")
