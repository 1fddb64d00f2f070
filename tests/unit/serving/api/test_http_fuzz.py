"""Requests made from our own OpenAPI description, right and wrong ones, by schemathesis against a real endpoint.

Whatever comes in: no 5xx, and what is refused has OpenAI's error shape. The short form runs in `make test`, the long
one in `make soak`.
"""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from graftwork.serving.ab_test.routes import EXPERIMENTS
from graftwork.serving.api.admin import ADMIN_PREFIX, ON_EACH
from graftwork.serving.spec import ServeSpec
from tests.local_endpoint import local_endpoint
from tests.tiny import write_tiny_base
from tests.tiny_embedder import write_tiny_embedder

ROUTES = (
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/embeddings",
    *(f"POST {ADMIN_PREFIX}/{verb}" for verb in ("register", "promote", "rollback", *ON_EACH)),
    f"GET {ADMIN_PREFIX}",
    "GET /v1/admin/config",
    *(f"POST {EXPERIMENTS}/{verb}" for verb in ("start", "ramp", "stop", "kill", "resume")),
    f"GET {EXPERIMENTS}",
    "POST /v1/feedback",
    "GET /v1/models",
    "GET /v1/models/{model}",
    "GET /v1/adapters",
    "GET /v1/stats",
    "GET /v1/live",
    "GET /metrics",
    "GET /",
    "GET /health",
    "GET /ready",
)
MODELS = {"/v1/chat/completions": "tiny", "/v1/completions": "tiny", "/v1/embeddings": "embedder"}
SHORT, LONG = 12, 400


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    tmp = tmp_path_factory.mktemp("fuzz")
    spec = {
        "base": str(write_tiny_base(tmp / "tiny")),
        "root": str(tmp / "root"),
        "quant": {"kind": "none"},
        "engine": {"max_seq_len": 64, "kv_tokens": 2048, "num_threads": 1},
        "embedder": str(write_tiny_embedder(tmp / "embedder")),
    }
    with local_endpoint(ServeSpec.model_validate(spec)) as running:
        yield running


def cases(url: str, route: str) -> Any:
    """Right and wrong requests for one route; of the right ones most name a model that exists."""
    method, _, path = route.partition(" ")
    operation = schemathesis.openapi.from_url(f"{url}/openapi.json")[path][method]
    right = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    if method == "GET" and "{" not in path:
        return right
    named = right.map(lambda case: with_model(case, MODELS.get(path)))
    return st.one_of(named, right, operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))


def with_model(case: Any, model: str | None) -> Any:
    if model is not None and isinstance(case.body, dict):
        case.body["model"] = model
    return case


def check(case: Any, url: str) -> None:
    response = case.call(base_url=url, timeout=60)
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert set(response.json()) == {"error"}
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert response.json()["error"]["type"] == "invalid_request_error"
        return
    for line in response.text.splitlines():
        if line.startswith("data: ") and line != "data: [DONE]" and "error" in json.loads(line.removeprefix("data: ")):
            assert json.loads(line.removeprefix("data: "))["error"]["type"] == "invalid_request_error", line


def fuzz(url: str, route: str, examples: int) -> None:
    @given(case=cases(url, route))
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples == SHORT,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    def each(case: Any) -> None:
        check(case, url)

    each()
    assert httpx.get(f"{url}/ready").json() == {"status": "ready", "replicas": 1}


@pytest.mark.parametrize("route", ROUTES)
def test_a_few_requests_of_each_route(url: str, route: str) -> None:
    fuzz(url, route, SHORT)


@pytest.mark.soak
@pytest.mark.parametrize("route", ROUTES)
def test_many_requests_of_each_route(url: str, route: str) -> None:
    fuzz(url, route, LONG)


def test_the_description_names_every_route_and_holds_together(url: str) -> None:
    whole = httpx.get(f"{url}/openapi.json").json()
    assert {f"{method.upper()} {path}" for path, methods in whole["paths"].items() for method in methods} == set(ROUTES)
    text = json.dumps(whole)
    known = {f"#/components/schemas/{name}" for name in whole["components"]["schemas"]}
    assert set(part.partition('"')[0] for part in text.split('"$ref": "')[1:]) <= known
