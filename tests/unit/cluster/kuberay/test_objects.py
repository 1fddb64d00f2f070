"""The Serve config of an endpoint on a cluster: what a change of its spec leaves running, by Ray Serve's own rule."""

from typing import Any

import pytest
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve._private.deploy_utils import get_app_code_version
from ray.serve.schema import ServeDeploySchema

from graftwork.cluster.kuberay.objects import LIVE, build_rayservice, serve_config, termination_grace_s
from graftwork.errors import ConfigError
from graftwork.serving.deploy import app
from graftwork.serving.live_config import with_live
from graftwork.serving.spec import ServeSpec
from tests.kuberay_objects import cluster, job

ARMS = [{"name": "plain"}, {"name": "tuned", "adapter": "card@latest"}]
EXPERIMENT = {
    "name": "ab",
    "control": "plain",
    "primary": "latency_ms",
    "arms": [{"name": "plain", "weight": 0.5}, {"name": "tuned", "weight": 0.5}],
}
KEPT: tuple[dict[str, Any], ...] = (
    {"adapters": ["card@latest", "agent@latest"]},
    {"arms": ARMS},
    {"limits": {"requests_per_min": 60}},
    {"arms": ARMS, "experiments": [EXPERIMENT]},
    {"num_replicas": 3},
    {"max_ongoing_requests": 64},
    {"graceful_shutdown_timeout_s": 90},
)
MADE_ANEW: tuple[dict[str, Any], ...] = (
    {"base": "other"},
    {"quant": {"kind": "none"}},
    {"engine": {"max_batch": 8}},
    {"num_cpus": 2},
    {"num_gpus": 1},
    {"token_env": "OTHER"},
    {"root": "s3://bucket/other"},
    {"autoscaling": {"max_replicas": 4}},  # Ray 2.60 counts the autoscalers of an application
)


def spec(**changed: Any) -> dict[str, Any]:
    given = {"base": "b", "root": "s3://bucket/team", "token_env": "KEYS", **changed}
    return ServeSpec.model_validate(given).model_dump(mode="json")


def code_version(config: dict[str, Any]) -> str:
    """What Ray Serve compares to know whether an application is made anew."""
    (application,) = ServeDeploySchema.model_validate(config).applications
    return str(get_app_code_version(application))


@pytest.mark.parametrize("changed", KEPT, ids=lambda changed: next(reversed(changed)))
def test_what_changes_from_day_to_day_leaves_the_application_in_place(changed: dict[str, Any]) -> None:
    before, after = serve_config(spec()), serve_config(spec(**changed))
    assert before != after
    assert code_version(before) == code_version(after)


@pytest.mark.parametrize("changed", MADE_ANEW, ids=lambda changed: next(iter(changed)))
def test_what_an_engine_is_made_of_makes_another_application(changed: dict[str, Any]) -> None:
    assert code_version(serve_config(spec())) != code_version(serve_config(spec(**changed)))


def test_an_autoscaler_is_moved_in_place() -> None:
    two, four = (serve_config(spec(autoscaling={"max_replicas": most})) for most in (2, 4))
    assert two != four
    assert code_version(two) == code_version(four)


def test_other_code_makes_another_application() -> None:
    one, other = (serve_config(spec(), f"s3://bucket/wheels/{name}.zip") for name in "ab")
    assert code_version(one) != code_version(other) != code_version(serve_config(spec()))


def test_equal_specs_give_equal_bytes_whatever_the_order_of_their_keys() -> None:
    dump = spec(arms=ARMS, adapters=["card@latest"])
    turned = dict(reversed(dump.items()))
    one, other = (build_rayservice(job(cluster(), kind="serve"), "team-a", serve_config(one)) for one in (dump, turned))
    assert one["spec"]["serveConfigV2"] == other["spec"]["serveConfigV2"]


def test_the_spec_comes_whole_out_of_its_two_parts() -> None:
    dump = spec(arms=ARMS, experiments=[EXPERIMENT], limits={"max_n": 2})
    (application,) = serve_config(dump)["applications"]
    live = next(d["user_config"] for d in application["deployments"] if d["name"] == "ingress")
    whole = with_live(ServeSpec.model_validate(application["args"]["spec"]), live)
    assert {key: whole.model_dump(mode="json")[key] for key in LIVE} == {key: dump[key] for key in LIVE}
    assert (whole.host, whole.port, whole.base, whole.token_env) == ("0.0.0.0", 8000, ServeSpec(**dump).base, "KEYS")


def test_serve_builds_the_endpoint_from_the_configs_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    (application,) = serve_config(spec())["applications"]
    with pytest.raises(ConfigError, match="token_env=KEYS"):
        call_user_app_builder_with_args_if_necessary(app, application["args"])
    monkeypatch.setenv("KEYS", "a key")
    built = call_user_app_builder_with_args_if_necessary(app, application["args"])
    assert built._bound_deployment.name == application["deployments"][1]["name"]
    open_to_all = {**application["args"]["spec"], "token_env": None}
    with pytest.raises(ConfigError, match="token_env is not set"):
        app({"spec": open_to_all})


def test_without_keys_nothing_is_served_on_a_cluster() -> None:
    with pytest.raises(ConfigError, match="token_env(.|\n)*Secret"):
        serve_config(spec(token_env=None))


def test_pods_stay_as_long_as_their_requests() -> None:
    assert termination_grace_s(spec(graceful_shutdown_timeout_s=90)) > 90
