"""Who an endpoint answers over HTTP: hosts, origins, body types, keys, and clients that leave or never finish."""

import asyncio
import contextlib
import hashlib
import json
import logging
import re
import socket
import statistics
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pydantic
import pytest
import uvicorn

from graftwork.artifacts import publish as artifact
from graftwork.artifacts.registry import Listing
from graftwork.base import load as base_model
from graftwork.base.source import BaseSpec
from graftwork.serving.api import auth
from graftwork.serving.api.auth import Keys
from graftwork.serving.api.http_protocol import BoundedHttpProtocol
from graftwork.serving.spec import ServeSpec
from graftwork.storage.store import Store
from tests.adapters import facts
from tests.engines import write_lora
from tests.local_endpoint import local_client, local_endpoint
from tests.ports import free_port
from tests.tiny import write_tiny_base

JSON = {"content-type": "application/json"}
CHAT = {"model": "base", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
KEYS = Keys({name: hashlib.sha256(name.encode()).hexdigest() for name in ("ann", "bob")})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("guard") / "base")


def spec_of(base: Path, **changed: Any) -> ServeSpec:
    usual = {
        "base": str(base),
        "root": str(base.parent / "root"),
        "quant": {"kind": "none"},
        "engine": {"max_seq_len": 512, "num_threads": 1},
    }
    return ServeSpec.model_validate({**usual, **changed})


def play(
    base: Path, act: Callable[[httpx.AsyncClient], Coroutine[Any, Any, None]], keys: Keys | None = None, **changed: Any
) -> None:
    async def main() -> None:
        async with local_client(spec_of(base, **changed), keys) as client:
            await act(client)

    asyncio.run(main())


@pytest.fixture(scope="module")
def url(base: Path) -> Iterator[str]:
    with local_endpoint(spec_of(base)) as running:
        yield running


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:{port}", 200),
        ("localhost:{port}", 200),
        ("LOCALHOST", 200),
        ("[::1]:{port}", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example:{port}", 403),
        ("evil.example:{port}", 403),
        ("", 403),
        ("[", 403),
        ("localhost@evil.example", 403),
        ("evil.example#localhost", 403),
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/", "/metrics", "/openapi.json", "/nothing"])
def test_only_the_names_of_the_endpoint_are_answered(url: str, host: str, status: int, path: str) -> None:
    """A site whose DNS name points at this address sends its own name."""
    answer = httpx.get(f"{url}{path}", headers={"host": host.format(port=url.rpartition(":")[2])})
    expected = 404 if status == 200 and path == "/nothing" else status
    assert answer.status_code == expected
    if status == 403:
        assert answer.json()["error"]["code"] == "host_not_allowed"


def test_probes_are_answered_by_any_name(url: str) -> None:
    """A kubelet and a load balancer call them by a pod's address."""
    for path in ("/health", "/ready"):
        assert httpx.get(f"{url}{path}", headers={"host": "10.1.2.3:8000"}).status_code == 200


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:{port}", 200),
        ("https://evil.example", 403),
        ("null", 403),
        ("http://127.0.0.1", 403),
        ("http://localhost:3000", 403),
        ("http://evil.example/127.0.0.1:{port}", 403),
    ],
)
def test_pages_of_other_origins_may_not_call(url: str, origin: str, status: int) -> None:
    headers = {"origin": origin.format(port=url.rpartition(":")[2])}
    assert httpx.post(f"{url}/v1/chat/completions", json=CHAT, headers=headers, timeout=60).status_code == status
    assert httpx.get(f"{url}/v1/models", headers=headers).status_code == status
    refused = httpx.post(f"{url}/v1/admin/adapters/unload", json={"adapter": "no@such"}, headers=headers)
    assert refused.status_code == (404 if status == 200 else 403)


def test_the_spec_names_further_hosts_and_origins(base: Path) -> None:
    async def act(client: httpx.AsyncClient) -> None:
        for host, status in (("models.example", 200), ("localhost", 200), ("other.example", 403)):
            assert (await client.get("/v1/models", headers={"host": f"{host}:443"})).status_code == status
        headers = {
            "origin": "https://app.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        }
        asked = await client.options("/v1/chat/completions", headers=headers)
        assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, "https://app.example")
        answer = await client.post("/v1/chat/completions", json=CHAT, headers={"origin": "https://app.example"})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://app.example")
        assert (await client.get("/v1/models", headers={"origin": "https://b.example"})).status_code == 403

    play(base, act, allowed_hosts=["models.example"], allowed_origins=["https://app.example"])


def test_behind_a_token_a_wildcard_address_answers_every_host(base: Path) -> None:
    async def act(client: httpx.AsyncClient) -> None:
        headers = {"host": "any.example", "authorization": "Bearer ann"}
        assert (await client.get("/v1/models", headers=headers)).status_code == 200
        assert (await client.get("/v1/models", headers={**headers, "origin": "https://any.example"})).status_code == 200
        assert (await client.get("/v1/models", headers={**headers, "origin": "https://b.example"})).status_code == 403

    play(base, act, KEYS, host="0.0.0.0", token_env="KEYS")


@pytest.mark.parametrize(
    "wrong", [{"allowed_origins": ["*"]}, {"allowed_origins": ["app.example"]}, {"allowed_hosts": ["http://a/"]}]
)
def test_lists_of_hosts_and_origins_are_checked(base: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError):
        spec_of(base, **wrong)


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 200),
        ("application/json; charset=utf-8", 200),
        ("Application/JSON", 200),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
        ("text/plain; application/json", 415),
        ("", 415),
    ],
)
def test_bodies_are_json_by_their_type(url: str, kind: str, status: int) -> None:
    """Of these types a browser sends only JSON to another origin after it has asked that origin."""
    answer = httpx.post(
        f"{url}/v1/chat/completions", content=json.dumps(CHAT), headers={"content-type": kind}, timeout=60
    )
    assert answer.status_code == status
    for path in ("admin/adapters/promote", "admin/experiments/stop", "feedback", "embeddings", "completions"):
        answer = httpx.post(f"{url}/v1/{path}", content="{}", headers={"content-type": kind})
        assert answer.status_code == (415 if status == 415 else 400)


def test_the_description_needs_the_token_where_there_is_one(base: Path) -> None:
    async def act(client: httpx.AsyncClient) -> None:
        assert (await client.get("/openapi.json")).status_code == 401
        assert (await client.get("/openapi.json", headers={"authorization": "Bearer ann"})).status_code == 200
        for path in ("/docs", "/redoc"):
            assert (await client.get(path)).status_code == 404

    play(base, act, KEYS)


def test_wrong_tokens_are_slowed_down_and_right_ones_are_not(base: Path) -> None:
    async def act(client: httpx.AsyncClient) -> None:
        async def status(path: str, token: str) -> int:
            return (await client.get(path, headers={"authorization": f"Bearer {token}"})).status_code

        paths = ("/v1/models", "/v1/admin/adapters", "/openapi.json")
        assert [await status(path, "wrong") for path in paths] == [401] * 3
        assert [await status(path, "wrong") for path in paths] == [429] * 3
        assert await status("/v1/models", "ann") == 200
        assert (await client.get("/v1/models")).status_code == 401, "no token is no guess"

    play(base, act, KEYS, limits={"wrong_tokens_per_min": 3})


def test_another_keys_prompt_is_not_told_by_cached_tokens(base: Path) -> None:
    text = "The secret project is called Kunming and its code is ZPPP-4711, which nobody else may know at all."

    async def cached(client: httpx.AsyncClient, key: str) -> int:
        body = {**CHAT, "messages": [{"role": "user", "content": text}]}
        answer = await client.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"})
        return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    async def apart(client: httpx.AsyncClient) -> None:
        assert [await cached(client, key) for key in ("ann", "bob")] == [0, 0]
        assert min([await cached(client, key) for key in ("ann", "bob")]) >= 32

    async def together(client: httpx.AsyncClient) -> None:
        assert await cached(client, "ann") == 0
        assert await cached(client, "bob") >= 32

    play(base, apart, KEYS)
    play(base, together, KEYS, engine={"max_seq_len": 512, "num_threads": 1, "share_prefix_cache": True})


def test_requests_at_once_and_streams_that_are_left_stay_within_the_rate(base: Path) -> None:
    """100 tokens a minute: of 20 requests at once one passes; a stream that is left is paid before the next."""
    with local_endpoint(spec_of(base, limits={"tokens_per_min": 100})) as url, httpx.Client(timeout=60) as client:
        body = {**CHAT, "max_tokens": 90, "ignore_eos": True}
        with ThreadPoolExecutor(20) as pool:
            ask = lambda _: client.post(f"{url}/v1/chat/completions", json=body)  # noqa: E731
            answers = list(pool.map(ask, range(20)))
        passed = [answer.json()["usage"]["total_tokens"] for answer in answers if answer.status_code == 200]
        assert len(passed) == 1, passed
        assert {answer.status_code for answer in answers} == {200, 429}
    with local_endpoint(spec_of(base, limits={"tokens_per_min": 600})) as url, httpx.Client(timeout=60) as client:
        body = {**CHAT, "max_tokens": 450, "ignore_eos": True}
        with client.stream("POST", f"{url}/v1/chat/completions", json={**body, "stream": True}) as stream:
            events = (line for line in stream.iter_lines() if line.startswith("data: "))
            assert len([next(events) for _ in range(151)]) == 151  # the prompt and 150 tokens: more than 150 are taken
        assert client.post(f"{url}/v1/chat/completions", json=body).status_code == 429


def connect(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def test_a_client_that_leaves_within_its_body_leaves_no_stack_trace(
    base: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with local_endpoint(spec_of(base)) as url:
        for _ in range(3):
            with connect(url) as client:
                client.sendall(
                    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                    b"Content-Length: 1000\r\n\r\n{"
                )
        deadline = time.monotonic() + 10
        while 'status="499"} 3' not in httpx.get(f"{url}/metrics").text:
            assert time.monotonic() < deadline, "the endpoint did not see that they have left"
    assert "Traceback" not in capfd.readouterr().err + caplog.text
    assert [record for record in caplog.records if record.levelno >= logging.WARNING and "uvicorn" in record.name] == []


def test_a_body_that_does_not_come_is_answered(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "BODY_TIMEOUT_S", 0.3)
    with local_endpoint(spec_of(base)) as url, connect(url) as client:
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\n\r\n{"
        )
        answer = b""
        while part := client.recv(4096):  # until the endpoint closes
            answer += part
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in answer
    assert b"request_timeout" in answer


class Brief(BoundedHttpProtocol):
    """The same limits, sooner."""

    head_timeout_s, body_timeout_s = 0.5, 1.0


class Few(BoundedHttpProtocol):
    """The same limits with fewer connections."""

    max_connections = 8


@pytest.fixture(scope="module", params=[Brief, Few])
def bounded(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server whose app reads the whole body, then streams for longer than any of its limits."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        while (message := await receive())["type"] == "http.request" and message.get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(13):
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            await asyncio.sleep(0.1)
        await send({"type": "http.response.body"})

    config = uvicorn.Config(app, port=free_port(), http=request.param, lifespan="off", log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{config.port}"
    server.should_exit = True
    thread.join(10)


def closed_after(url: str, *parts: bytes, pause_s: float = 0.0) -> float:
    """Seconds from the connection until the server closes it; the parts are sent with a pause before each."""
    began = time.monotonic()
    with connect(url) as client, contextlib.suppress(ConnectionError):
        for part in parts:
            time.sleep(pause_s)
            client.sendall(part)
        while client.recv(4096):
            pass
    return time.monotonic() - began


HEAD = b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"


@pytest.mark.parametrize(
    ("parts", "pause_s", "limit_s"),
    [
        ((), 0, 0.5),
        ((HEAD,), 0, 0.5),
        (tuple(b"%c" % letter for letter in HEAD), 0.05, 0.5),
        ((HEAD + b"Content-Length: 9\r\n\r\n",), 0, 1.0),
        ((HEAD + b"Content-Length: 99\r\n\r\n", *[b"x"] * 90), 0.05, 1.0),
        ((HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[b"1\r\nx\r\n"] * 90), 0.05, 1.0),
    ],
)
@pytest.mark.parametrize("bounded", [Brief], indirect=True)
def test_unfinished_requests_are_closed(bounded: str, parts: tuple[bytes, ...], pause_s: float, limit_s: float) -> None:
    """Also where a byte comes now and then: each part alone would take 1.2 to 4.5 s."""
    assert limit_s - 0.1 < closed_after(bounded, *parts, pause_s=pause_s) < limit_s + 2


@pytest.mark.parametrize("bounded", [Brief], indirect=True)
def test_a_request_that_is_whole_is_never_cut(bounded: str) -> None:
    """Its answer takes longer than every limit; so does the second one on the same connection."""
    with httpx.Client() as client:
        for _ in range(2):
            assert client.post(bounded, content=b"y" * 100_000, timeout=20).text == "x" * 13


@pytest.mark.parametrize("bounded", [Few], indirect=True)
def test_further_connections_are_closed_at_once(bounded: str) -> None:
    with contextlib.ExitStack() as open_ones:
        for _ in range(8):
            open_ones.enter_context(connect(bounded))
        assert closed_after(bounded) < Few.head_timeout_s / 2
    deadline = time.monotonic() + 10
    while True:
        with contextlib.suppress(httpx.TransportError):
            assert httpx.get(bounded, timeout=10).status_code == 200
            return
        assert time.monotonic() < deadline, "closed connections still count"


@pytest.fixture(scope="module")
def many(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Store, Callable[[int], None]]]:
    """An endpoint over a store, and what publishes more adapters there."""
    tmp = tmp_path_factory.mktemp("many")
    store, digest = Store(str(tmp / "root")), base_model.resolve(BaseSpec(uri=str(base))).digest
    folder = write_lora(base, tmp / "lora", 1, r=1, target_modules=["q_proj"])
    known = facts(base_digest=digest, prompt={"system": None})

    def publish(number: int) -> None:
        artifact.publish(store, f"task{number:03d}", folder, **known, alias="latest")

    with local_endpoint(spec_of(base, root=store.uri)) as url:
        yield url, store, publish


def test_models_take_as_long_with_many_adapters_as_with_one(many: tuple[str, Store, Callable[[int], None]]) -> None:
    url, store, publish = many
    publish(0)

    def median_s(path: str) -> float:
        with httpx.Client() as client:
            client.get(f"{url}{path}")
            return statistics.median(client.get(f"{url}{path}").elapsed.total_seconds() for _ in range(15))

    paths = ("/v1/models", "/v1/models/base", "/v1/models/base:task000")
    few = [median_s(path) for path in paths]
    for number in range(1, 120):
        publish(number)
    httpx.post(f"{url}/v1/admin/adapters/load", json={"adapter": "task119"}, timeout=60)
    assert len(httpx.get(f"{url}/v1/models").json()["data"]) == 1 + 120 * 3
    listing = Listing(store)
    listing.read()
    began = time.perf_counter()
    for _ in range(5):
        assert len(listing.read()) == 120
    list_s = (time.perf_counter() - began) / 5
    found = [median_s(path) for path in paths]
    assert max(now - then for now, then in zip(found, few, strict=True)) < list_s / 2, (found, few, list_s)


def test_a_model_is_found_without_the_list_as_with_it(many: tuple[str, Store, Callable[[int], None]]) -> None:
    url, _, publish = many
    publish(500)
    httpx.post(f"{url}/v1/admin/adapters/load", json={"adapter": "task500"}, timeout=60)
    listed = {card["id"]: card for card in httpx.get(f"{url}/v1/models").json()["data"]}
    names = ["base", *(name for name in listed if "task500" in name)]
    assert len(names) == 4
    for name in names:
        assert httpx.get(f"{url}/v1/models/{name}").json() == listed[name]
    for name in ("base:task501", "base:task500@nosuch", "nothing", "base:", "base:task500@latest@latest"):
        assert httpx.get(f"{url}/v1/models/{name}").status_code == 404
    meant = httpx.get(f"{url}/v1/models/tusk500").json()["error"]["message"]
    assert "Did you mean base:task500?" in meant


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
@pytest.mark.parametrize(("repeated", "counted"), [(150, "tokens"), (1_000, "bytes"), (100_000, "bytes")])
def test_a_prompt_is_refused_by_its_bytes_before_its_tokens_are_counted(
    url: str, path: str, repeated: int, counted: str
) -> None:
    """The message has the bytes where nothing was tokenised: in the replica, and from 64 KiB on in the ingress."""
    text = "How high does it lie above the sea? " * repeated
    asked = {"prompt": text} if path == "completions" else {"messages": [{"role": "user", "content": text}]}
    answer = httpx.post(f"{url}/v1/{path}", json={"model": "base", "max_tokens": 1, **asked}, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert re.match(rf"a prompt of \d+ {counted}", answer.json()["error"]["message"])
