"""Serve ends without a word on the terminal, however short its life was."""

import time

import pytest
import ray
from ray import serve
from ray._private.utils import publish_error_to_driver

from graftwork.cluster.session import Session
from graftwork.serving.serve_instance import quiet, serve_running
from graftwork.serving.spec import ServeSpec


class Echo:
    """Says what it hears."""

    def __call__(self, said: str) -> str:
        return said


@pytest.mark.parametrize("life_s", [0, 3])
def test_serve_ends_without_a_word(local_ray: Session, life_s: float, capfd: pytest.CaptureFixture[str]) -> None:
    """What Ray tells the driver comes in order, so that all it had to say stands before the last word."""
    with quiet(), serve_running(ServeSpec.model_validate({"base": "x", "name": "echo"}), http=False):
        application = serve.deployment(Echo).options(ray_actor_options={"num_cpus": 0}).bind()
        serve.run(application, name="echo", route_prefix=None)
        assert serve.get_deployment_handle("Echo", app_name="echo").remote("hello").result() == "hello"
        time.sleep(life_s)  # a router learns from the controller in another way after its first second
    said, last = "", f"last word {life_s}"
    publish_error_to_driver("test", last, gcs_client=ray._private.worker.global_worker.gcs_client)
    deadline = time.monotonic() + 30
    while last not in said and time.monotonic() < deadline:
        time.sleep(0.05)
        said += "".join(capfd.readouterr())
    assert last in said
    assert "fail" not in said
