"""The Serve config of an endpoint (RayService's `serveConfigV2`): what is live in it changes in place.

Ray Serve makes an application anew when its `args`, import path or code change: engines start again, side by side on
the same cluster. What stands under `deployments` it hands to the replicas that run. So all that changes from day to
day stands there, and `args` holds what an engine is made of (Ray 2.60, serve/_private/application_state.py).
"""

import json
from collections.abc import Mapping
from typing import Any

from graftwork.errors import ConfigError

LIVE = ("adapters", "arms", "limits", "experiments")
"""Keys of a serve spec that the ingress takes while it serves."""
SCALE = ("num_replicas", "autoscaling", "max_ongoing_requests", "graceful_shutdown_timeout_s")
"""Keys that Serve itself takes without a restart of what runs; but autoscaling in place of num_replicas, or back."""
SERVE_HOST, SERVE_PORT = "0.0.0.0", 8000
"""Where each pod's proxy listens: KubeRay's serve Service and its probes go to this port."""
HEALTH_PATH = "/-/healthz"
"""Serve's own: 200 on each pod with a proxy that takes requests, 503 on one that drains. Needs no token."""
READY_PATH = "/ready"
"""The endpoint's own: 200 while an engine is warm. Needs no token."""
IMPORT_PATH = "graftwork.serving.service_app:app"
INGRESS_PER_ENGINE = 4
"""Requests that the ingress holds for each that an engine replica does."""


def serve_config(spec: Mapping[str, Any], working_dir: str | None = None) -> dict[str, Any]:
    """The config of a serve spec (its JSON dump). Equal specs give equal configs.

    working_dir: URI of a zip with the code, where the image has none; other code is another application.
    Raises ConfigError where the spec names no keys: a cluster's network is open to others.
    """
    if not spec.get("token_env"):
        raise ConfigError("token_env", "none", "an endpoint on a cluster answers nobody without a key",
                          "set token_env to a variable that a Secret fills: secret_env of the cluster")  # fmt: skip
    moved = {"host": SERVE_HOST, "port": SERVE_PORT}
    made_of = {key: value for key, value in spec.items() if key not in (*LIVE, *SCALE)} | moved
    application: dict[str, Any] = {
        "name": spec["name"], "route_prefix": "/", "import_path": IMPORT_PATH,
        "args": {"spec": made_of}, "deployments": [_engine(spec), _ingress(spec)],
    }  # fmt: skip
    if working_dir is not None:
        application["runtime_env"] = {"working_dir": working_dir}
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": SERVE_HOST, "port": SERVE_PORT},
        "applications": [application],
    }


def config_text(config: Mapping[str, Any]) -> str:
    """As `serveConfigV2` holds it: JSON, which is YAML. Equal configs give equal bytes."""
    return json.dumps(config, sort_keys=True, ensure_ascii=False, indent=1)


def termination_grace_s(spec: Mapping[str, Any]) -> int:
    """What a pod needs between its notice and its end: a replica's own time to finish, and a margin for Serve."""
    return int(spec["graceful_shutdown_timeout_s"]) + 15


def deletion_delay_s(spec: Mapping[str, Any]) -> int:
    """How long an old cluster is to stay after the new one took over: its longest request, and a margin."""
    return int(spec["request_timeout_s"]) + 60


def _engine(spec: Mapping[str, Any]) -> dict[str, Any]:
    scaled = {"name": "engine", "max_ongoing_requests": spec["max_ongoing_requests"],
              "graceful_shutdown_timeout_s": spec["graceful_shutdown_timeout_s"]}  # fmt: skip
    if spec.get("autoscaling") is None:
        return {**scaled, "num_replicas": spec["num_replicas"]}
    return {**scaled, "num_replicas": "auto", "autoscaling_config": dict(spec["autoscaling"])}


def _ingress(spec: Mapping[str, Any]) -> dict[str, Any]:
    """It alone takes what is live, and brings it to the engines."""
    return {
        "name": "ingress", "max_ongoing_requests": INGRESS_PER_ENGINE * spec["max_ongoing_requests"],
        "graceful_shutdown_timeout_s": spec["graceful_shutdown_timeout_s"],
        "user_config": {key: spec[key] for key in LIVE},
    }  # fmt: skip
