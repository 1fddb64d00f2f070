"""Serve ends with the block that had it, however short its life was."""

import time

import pytest
import ray
from ray import serve

from graftwork.cluster.session import Session
from graftwork.compat.ray_serve import controller
from graftwork.serving.ray_serve_lifecycle import serve_running, silence_serve_logs
from graftwork.serving.spec import ServeSpec


class Echo:
    """Says what it hears."""

    def __call__(self, said: str) -> str:
        return said


@pytest.mark.parametrize("life_s", [0, 3])
def test_serve_has_ended_after_its_block(
    ray_cluster: Session, life_s: float, capfd: pytest.CaptureFixture[str]
) -> None:
    with silence_serve_logs(), serve_running(ServeSpec.model_validate({"base": "x", "name": "echo"}), http=False):
        application = serve.deployment(Echo).options(ray_actor_options={"num_cpus": 0}).bind()
        serve.run(application, name="echo", route_prefix=None)
        assert serve.get_deployment_handle("Echo", app_name="echo").remote("hello").result() == "hello"
        time.sleep(life_s)  # a router learns from the controller in another way after its first second
    with pytest.raises(ValueError, match="SERVE_CONTROLLER_ACTOR"):
        controller()
    assert ray.is_initialized(), "Serve alone ends"
    assert "graceful_shutdown failed" not in "".join(capfd.readouterr())
