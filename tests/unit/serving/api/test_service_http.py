"""What an operator and a RAG user ask over HTTP: metrics, liveness, the live document, embeddings."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from graftwork.artifacts import publish as artifact
from graftwork.artifacts.manifest import aliases
from graftwork.base import load as base_model
from graftwork.base.source import BaseSpec
from graftwork.retrieval.embedder import Embedder
from graftwork.serving.spec import ServeSpec
from graftwork.storage.store import Store
from tests.adapters import facts
from tests.engines import write_lora
from tests.local_endpoint import local_endpoint
from tests.tiny import write_tiny_base
from tests.tiny_embedder import write_tiny_embedder

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    tmp = tmp_path_factory.mktemp("service")
    base = write_tiny_base(tmp / "base")
    store, digest = Store(str(tmp / "root")), base_model.resolve(BaseSpec(uri=str(base))).digest
    for seed, alias in enumerate(("latest", "next")):
        folder = write_lora(base, tmp / alias, seed, r=4, target_modules=["q_proj"])
        known = facts(base_digest=digest, prompt={"system": None})
        artifact.publish(store, "card", folder, **known, alias=alias)
    return {"base": base, "root": tmp / "root", "embedder": write_tiny_embedder(tmp / "tiny-embedder")}


def spec_of(folders: dict[str, Path], **changed: Any) -> ServeSpec:
    usual: dict[str, Any] = {
        "base": str(folders["base"]),
        "root": str(folders["root"]),
        "quant": {"kind": "none"},
        "engine": {"max_seq_len": 256, "num_threads": 1},
        "embedder": str(folders["embedder"]),
    }
    return ServeSpec.model_validate({**usual, **changed})


@pytest.fixture(scope="module")
def url(folders: dict[str, Path]) -> Iterator[str]:
    with local_endpoint(spec_of(folders)) as running:
        yield running


def samples(url: str) -> dict[tuple[str, ...], float]:
    """Every number of GET /metrics by (name, labels without the replica)."""
    response = httpx.get(f"{url}/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    return {
        (s.name, *(f"{key}={value}" for key, value in sorted(s.labels.items()) if key != "replica")): s.value
        for family in parse(response.text)
        for s in family.samples
    }


def ask(url: str, model: str, **changed: Any) -> httpx.Response:
    body = {"model": model, "messages": HELLO, "max_tokens": 5, **changed}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


def test_metrics_tell_what_each_adapter_was_asked_and_gave(url: str, folders: dict[str, Path]) -> None:
    before = samples(url)
    version = aliases(Store(str(folders["root"])), "card")["latest"][:12]
    answers = [ask(url, "base:card").json() for _ in range(3)]
    assert ask(url, "base:nosuch").status_code == 404
    after = samples(url)

    def grown(*key: str) -> float:
        return after.get(key, 0) - before.get(key, 0)

    card = ("adapter=card", "arm=adapter")
    labels = (*card, f"version={version}")
    tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
    prompts = sum(answer["usage"]["prompt_tokens"] for answer in answers)
    assert grown("graftwork_completion_tokens_total", *labels) == tokens
    assert grown("graftwork_prompt_tokens_total", *labels) == prompts
    assert grown("graftwork_ttft_seconds_count", *labels) == 3
    assert grown("graftwork_latency_seconds_count", *labels) == 3
    assert grown("graftwork_inter_token_seconds_count", *labels) == tokens - 3
    reasons = {answer["choices"][0]["finish_reason"] for answer in answers}
    assert sum(grown("graftwork_requests_total", *card, f"outcome={r}", f"version={version}") for r in reasons) == 3
    refused = ("adapter=none", "arm=none", "outcome=model_not_found", "version=none")
    assert grown("graftwork_requests_total", *refused) == 1
    assert grown("graftwork_engine_generated_tokens_total") == tokens
    assert grown("graftwork_engine_step_seconds_count") > 0
    assert after["graftwork_adapter_bytes", "tier=host"] > 0
    assert after["graftwork_kv_tokens_limit",] > after["graftwork_kv_tokens_used",] == 0
    posted = ("method=POST", "route=/v1/chat/completions")
    assert grown("graftwork_http_responses_total", *posted, "status=200") == 3
    assert grown("graftwork_http_responses_total", *posted, "status=404") == 1


def test_a_swap_is_timed(url: str, folders: dict[str, Path]) -> None:
    store = Store(str(folders["root"]))
    named = aliases(store, "card")
    ask(url, "base:card")
    before = samples(url)["graftwork_adapter_swap_seconds_count",]
    artifact.promote(store, "card", "latest", named["next"])
    assert (
        httpx.post(f"{url}/v1/admin/adapters/refresh", json={"adapter": "card@latest"}, timeout=60).status_code == 200
    )
    assert samples(url)["graftwork_adapter_swap_seconds_count",] == before + 1
    assert ask(url, "base:card").json()["graftwork"]["adapter_version"] == named["next"]


def test_made_up_routes_and_methods_share_one_series(url: str) -> None:
    for method in ("PROPFIND", "MKCOL", "REPORT"):
        httpx.request(method, f"{url}/nosuch/{method}")
    known = [key for key in samples(url) if key[0] == "graftwork_http_responses_total" and "route=unmatched" in key]
    assert known == [("graftwork_http_responses_total", "method=other", "route=unmatched", "status=404")]


def test_alive_and_ready_are_told_apart(url: str) -> None:
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{url}/ready").json() == {"status": "ready", "replicas": 1}


def test_the_live_document_adds_up(url: str) -> None:
    ask(url, "base")
    live = httpx.get(f"{url}/v1/live").json()
    base = next(row for row in live["traffic"] if row["arm"] == "base")
    assert base["requests"] >= 1
    assert base["tokens"] >= 5
    assert 0 < base["ttft_p50_ms"] <= base["ttft_p95_ms"]
    assert live["engine"]["generated_tokens"] == live["replicas"][0]["engine"]["generated_tokens"]


def test_the_openai_client_gets_the_embedders_vectors(url: str, folders: dict[str, Path]) -> None:
    texts = ["a cat sits on the mat", "the quick brown fox"]
    expected = Embedder(folders["embedder"]).embed(texts)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        assert "tiny-embedder" in {model.id for model in client.models.list()}
        packed = client.embeddings.create(model="tiny-embedder", input=texts)  # the client asks for base64
        plain = client.embeddings.create(model="tiny-embedder", input=texts[0], encoding_format="float")
        np.testing.assert_array_equal(np.array([row.embedding for row in packed.data]), expected.vectors_BH)
        np.testing.assert_allclose(plain.data[0].embedding, expected.vectors_BH[0], atol=1e-6)
        assert packed.usage.prompt_tokens == sum(expected.tokens)
        with pytest.raises(openai.NotFoundError, match="tiny-embedder"):
            client.embeddings.create(model="base", input="x")


@pytest.mark.parametrize(
    ("changed", "param", "code"),
    [
        ({"input": "a cat sits " * 60}, "input", "context_length_exceeded"),
        ({"input": ["fine", "a cat sits " * 60]}, "input", "context_length_exceeded"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": ""}, "input", "invalid_value"),
        ({"input": [1, 2]}, "input", "invalid_value"),
        ({"input": ["x"] * 2049}, "input", "invalid_value"),
        ({"dimensions": 8}, "dimensions", "unsupported_parameter"),
        ({"encoding_format": "int8"}, "encoding_format", "invalid_value"),
    ],
)
def test_what_cant_be_embedded_is_refused(url: str, changed: dict[str, Any], param: str, code: str) -> None:
    body = {"model": "tiny-embedder", "input": "a cat", **changed}
    response = httpx.post(f"{url}/v1/embeddings", json=body)
    assert response.status_code == 400
    assert (response.json()["error"]["param"], response.json()["error"]["code"]) == (param, code)


def test_embedded_tokens_count_towards_the_rate(folders: dict[str, Path]) -> None:
    body = {"model": "tiny-embedder", "input": ["a cat", "the dog"]}  # 8 tokens, the ends of each text included
    with local_endpoint(spec_of(folders, limits={"tokens_per_min": 8})) as url:
        first, second = (httpx.post(f"{url}/v1/embeddings", json=body) for _ in range(2))
    assert first.json()["usage"]["total_tokens"] == 8
    assert (second.status_code, second.json()["error"]["code"]) == (429, "rate_limit_exceeded")


def test_without_an_embedder_it_says_so(folders: dict[str, Path]) -> None:
    with local_endpoint(spec_of(folders, embedder=None)) as url:
        response = httpx.post(f"{url}/v1/embeddings", json={"model": "tiny-embedder", "input": "x"})
        assert response.status_code == 404
        assert "no embedder" in response.json()["error"]["message"]
