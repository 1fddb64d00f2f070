"""The endpoint as Ray Serve imports it from a Serve config (cluster/kuberay/serve_config.py), on a RayService.

Serve calls `app` in a task of the cluster; what is live comes later, to the ingress as its `user_config`.
"""

from collections.abc import Mapping
from typing import Any

from ray import serve

from graftwork.config import validate
from graftwork.serving.app import build
from graftwork.serving.spec import ServeSpec


def app(args: Mapping[str, Any]) -> serve.Application:
    """args: `{"spec": the serve spec without its live keys}`. Raises ConfigError: a wrong spec, keys not set."""
    return build(validate(ServeSpec, args["spec"], where="args.spec"), follows=True)
