"""An endpoint on a real Ray: a tiny base, adapters made by PEFT and really published, callers over HTTP and handle."""

import asyncio
import contextlib
import functools
import itertools
import json
import os
import pickle
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import psutil
import pytest
import ray
from ray.serve.generated import serve_pb2, serve_pb2_grpc

from graftwork.base import load
from graftwork.cluster.session import Session
from graftwork.errors import ClusterError, ConfigError
from graftwork.prompts.render import Message
from graftwork.serving.api.auth import BODY_TIMEOUT_S
from graftwork.serving.api.errors import ApiError
from graftwork.serving.api.http_protocol import HEAD_TIMEOUT_S
from graftwork.serving.client import ChatCall, Client, ClientReply
from graftwork.serving.deploy import Endpoint, deploy
from graftwork.serving.engine.request import SamplingParams
from graftwork.serving.messages import ArmAnswer, ArmRequest, Likelihood
from graftwork.serving.router import ServeBackend
from graftwork.serving.spec import ArmSpec, GrammarSpec
from tests.ports import free_port
from tests.serve_world import AUTH, NEW_TOKENS, OWNER, QUESTIONS, TASKS, TOKEN, World
from tests.waiting import until

CHAT, NO_MODEL = "/v1/chat/completions", "model_not_found"
REFRESH = "/v1/admin/adapters/refresh"
JSON = {"content-type": "application/json"}


@dataclass(frozen=True)
class TouchOnLoad:
    """A pickle that creates a file when it is loaded."""

    path: Path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("token", [None, "wrong", "right"])
def test_replica_grpc_servers_refuse_a_call_without_the_ray_token_before_unpickling(
    endpoint: Endpoint, tmp_path: Path, token: str | None
) -> None:
    """Ray Serve opens this server on all addresses in each replica, and it unpickles its arguments (Ray 2.60)."""
    replicas = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::ServeReplica")]
    ports = {c.laddr.port for p in replicas for c in connections(p) if c.status == "LISTEN" and c.laddr.ip == "::"}
    assert ports
    sent = {"wrong": "0" * 64, "right": os.environ["RAY_AUTH_TOKEN"]}
    metadata = [("authorization", f"Bearer {sent[token]}")] if token else []
    for port, streaming in itertools.product(ports, (False, True)):
        loaded = tmp_path / f"{port}-{streaming}"
        request = serve_pb2.ASGIRequest(pickled_request_metadata=pickle.dumps(TouchOnLoad(loaded)))
        with grpc.insecure_channel(f"[::1]:{port}") as channel:
            stub = serve_pb2_grpc.ASGIServiceStub(channel)
            call = stub.HandleRequestStreaming if streaming else stub.HandleRequest
            with pytest.raises(grpc.RpcError) as failed:
                list(call(request, timeout=30, metadata=metadata)) if streaming else call(request, metadata=metadata)
        refused = failed.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert (refused, loaded.exists()) == (token != "right", token == "right")


def openai_settings(endpoint: Endpoint) -> dict[str, Any]:
    return {"base_url": f"{endpoint.url}/v1", "api_key": TOKEN, "max_retries": 0}


def test_it_listens_on_its_host_alone(endpoint: Endpoint) -> None:
    children = psutil.Process().children(recursive=True)
    open_ = [c for p in children for c in connections(p) if c.status == "LISTEN" and c.laddr.port == endpoint.spec.port]
    assert {c.laddr.ip for c in open_} == {"127.0.0.1"}


def connections(process: psutil.Process) -> list[Any]:
    with contextlib.suppress(psutil.Error):
        return list(process.net_connections("tcp"))
    return []


def test_the_openai_client_works_unchanged(endpoint: Endpoint, world: World) -> None:
    with openai.OpenAI(**openai_settings(endpoint)) as client:
        models = {model.id for model in client.models.list()}
        assert {"base", "base:card", "base:card@latest", f"base:card@{world.newer[0]}", "arm/plain"} <= models
        assert client.models.retrieve("base:card").id == "base:card"
        for model, version in (("base", None), ("base:agent", world.versions["agent"])):
            whole = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": QUESTIONS[0]}], max_tokens=NEW_TOKENS
            )
            assert whole.choices[0].message.content == world.texts[version, QUESTIONS[0]]
            assert whole.model_extra["graftwork"]["adapter_version"] == version
            assert whole.system_fingerprint.startswith("fp_")
            stream = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": QUESTIONS[0]}],
                max_tokens=NEW_TOKENS,
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = list(stream)
            text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
            assert text == whole.choices[0].message.content
            assert chunks[-1].usage == whole.usage.model_copy(
                update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
            )
            assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
        told = client.completions.create(model="base", prompt="The quick", max_tokens=4)
        assert told.usage.completion_tokens == 4


def test_grammars_choices_and_logprobs_cross_the_processes(endpoint: Endpoint) -> None:
    hello: Any = [{"role": "user", "content": "Hello"}]
    asked: dict[str, Any] = {
        "model": "base",
        "messages": hello,
        "temperature": 1.0,
        "seed": 1,
        "n": 2,
        "logprobs": True,
        "top_logprobs": 2,
        "max_tokens": 30,
    }
    with openai.OpenAI(**openai_settings(endpoint)) as client:
        whole = client.chat.completions.create(**asked, extra_body={"regex": "[A-Z]{4}, [0-9]{2}"})
        stream = client.chat.completions.create(**asked, extra_body={"regex": "[A-Z]{4}, [0-9]{2}"}, stream=True)
        texts = ["", ""]
        for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        assert texts == [choice.message.content for choice in whole.choices]
        for choice in whole.choices:
            assert re.fullmatch("[A-Z]{4}, [0-9]{2}", choice.message.content)
            assert "".join(one.token for one in choice.logprobs.content) == choice.message.content
        with pytest.raises(openai.BadRequestError) as impossible:
            client.chat.completions.create(**asked, extra_body={"regex": "("})
        assert (impossible.value.param, impossible.value.code) == ("regex", "invalid_grammar")
    arm = ArmSpec(name="code", grammar=GrammarSpec(regex="[0-9]{3}"))
    answer = asyncio.run(endpoint.ask(arm, [Message("user", "Hello")], "an arm with a grammar"))
    assert re.fullmatch("[0-9]{3}", answer.text)


def test_the_openai_client_gets_its_own_exceptions(endpoint: Endpoint) -> None:
    hello: Any = [{"role": "user", "content": "Hello"}]
    with openai.OpenAI(**openai_settings(endpoint)) as client:
        with pytest.raises(openai.NotFoundError) as unknown:
            client.chat.completions.create(model="base:nosuch", messages=hello)
        assert (unknown.value.param, unknown.value.code) == ("model", "model_not_found")
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="base", messages=hello, reasoning_effort="high")
        assert refused.value.param == "reasoning_effort"
        with pytest.raises(openai.BadRequestError) as too_long:
            client.chat.completions.create(model="base", messages=[{"role": "user", "content": "Hello " * 2000}])
        assert too_long.value.code == "context_length_exceeded"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="base:nosuch", messages=hello, stream=True)


@pytest.mark.parametrize("given", [None, "", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x"])
def test_without_the_token_there_is_only_health(endpoint: Endpoint, given: str | None) -> None:
    headers = {} if given is None else {"authorization": given}
    for method, path in (("GET", "/v1/models"), ("POST", CHAT), ("POST", REFRESH), ("GET", "/v1/stats")):
        response = httpx.request(method, f"{endpoint.url}{path}", headers=headers, timeout=30)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{endpoint.url}/health", headers=headers, timeout=30).json() == {"status": "ok"}


HALF = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


def half_sent(endpoint: Endpoint, text: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", endpoint.spec.port), timeout=60)
    connection.sendall(text)
    return connection


def received(connection: socket.socket) -> bytes:
    """All that comes until the endpoint closes the connection."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(4096):
            found += part
    return found


@pytest.mark.long
def test_half_sent_requests_are_closed_by_serves_proxy(endpoint: Endpoint) -> None:
    """60 half-sent heads for HEAD_TIMEOUT_S, 20 bodies until the app's own limit answers, their neighbour all along."""
    body = HALF + f"Authorization: Bearer {TOKEN}\r\nContent-Length: 99\r\n\r\n{{".encode()
    with contextlib.ExitStack() as open_ones:
        heads = [open_ones.enter_context(half_sent(endpoint, HALF)) for _ in range(60)]
        bodies = [open_ones.enter_context(half_sent(endpoint, body)) for _ in range(20)]
        began = time.monotonic()
        with endpoint.client() as client:
            reply = client.chat(ChatCall("base", (Message("user", "Hello"),), max_tokens=NEW_TOKENS))
        assert reply.text
        assert {received(connection) for connection in heads} == {b""}
        assert HEAD_TIMEOUT_S - 1 < time.monotonic() - began < HEAD_TIMEOUT_S + 5
        answers = [received(connection) for connection in bodies]
        assert all(b" 408 " in answer and b"request_timeout" in answer for answer in answers), answers
        assert BODY_TIMEOUT_S - 1 < time.monotonic() - began < BODY_TIMEOUT_S + 5


def test_clients_that_leave_write_no_stack_traces(ray_cluster: Session, endpoint: Endpoint) -> None:
    """Serve's own logs of proxy and replicas, read when they show that three clients have left within their body."""
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    before = {path: path.stat().st_size for path in logs.rglob("*") if path.is_file()}

    def written() -> str:
        files = [path for path in logs.rglob("*") if path.is_file()]
        return "".join(path.read_bytes()[before.get(path, 0) :].decode(errors="replace") for path in files)

    body = HALF + f"Authorization: Bearer {TOKEN}\r\nContent-Length: 99\r\n\r\n{{".encode()
    for _ in range(3):
        half_sent(endpoint, body).close()
    until(lambda: len(re.findall(rf"POST {CHAT} 499", written())) >= 3)
    assert "Traceback" not in written()


def test_the_openai_client_knows_a_wrong_key(endpoint: Endpoint) -> None:
    with (
        openai.OpenAI(**{**openai_settings(endpoint), "api_key": "wrong"}) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_wrong_keys_are_counted_by_the_callers_address(endpoint: Endpoint) -> None:
    """The last test with wrong keys: they get 429 from here on."""
    wrong = {"authorization": "Bearer wrong"}
    allowed = endpoint.spec.limits.wrong_tokens_per_min
    answers = [httpx.get(f"{endpoint.url}/v1/models", headers=wrong) for _ in range(allowed + 10)]
    assert {answer.status_code for answer in answers[allowed:]} <= {401, 429}
    assert answers[-1].status_code == 429
    assert "from 127.0.0.1." in answers[-1].json()["error"]["message"]
    assert httpx.get(f"{endpoint.url}/v1/models", headers=AUTH).status_code == 200


def test_a_second_endpoint_of_the_same_name_is_refused(endpoint: Endpoint, world: World) -> None:
    with pytest.raises(ConfigError, match="name=graftwork"), deploy(world.spec()):
        pytest.fail("it deployed over the running one")


def test_a_request_that_takes_too_long_is_cancelled(endpoint: Endpoint) -> None:
    """The time limit of a whole request; the endpoint's own is minutes, this caller's is short.

    Many are sent at once, so that no machine is quick enough; a slow one gets more time to begin with them.
    """
    arm, hello = ArmSpec(name="slow", max_new_tokens=900), (Message("user", "Hello"),)

    async def ask(timeout_s: float) -> list[Any]:
        backend = ServeBackend(endpoint.handle, timeout_s)
        requests = [ArmRequest(arm, hello, f"slow-{timeout_s}-{number}", ignore_eos=True) for number in range(100)]
        return await asyncio.gather(*map(backend.choices, requests), return_exceptions=True)

    with endpoint.client() as client:
        before = cancelled = client.stats()["engine"]["finished"].get("cancelled", 0)
        for timeout_s in (0.3, 1.2, 4.8, 19.2):
            late = [told for told in asyncio.run(ask(timeout_s)) if isinstance(told, ApiError)]
            assert {(one.status, one.code) for one in late} == {(504, "request_timeout")}
            until(lambda: client.stats()["engine"]["running"] == client.stats()["engine"]["waiting"] == 0)
            cancelled = client.stats()["engine"]["finished"].get("cancelled", 0)
            if cancelled > before:
                break
        assert cancelled > before


def test_the_async_openai_client_streams_many_at_once(endpoint: Endpoint, world: World) -> None:
    async def ask(client: openai.AsyncOpenAI, task: str, question: str) -> str:
        stream = await client.chat.completions.create(
            model=f"base:{task}", messages=[{"role": "user", "content": question}], max_tokens=NEW_TOKENS, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(**openai_settings(endpoint)) as client:
            return await asyncio.gather(*[ask(client, task, question) for task, question in jobs])

    jobs = [(task, question) for task in TASKS for question in QUESTIONS] * 3
    assert asyncio.run(ask_all()) == [world.texts[world.versions[task], question] for task, question in jobs]


def chat_body(model: str, *roles: str) -> bytes:
    return json.dumps({"model": model, "messages": [{"role": role, "content": "x"} for role in roles]}).encode()


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", CHAT, b"{nonsense", 400, "invalid_json"),
        ("POST", CHAT, b'{"model":"base"}', 400, "missing_required_parameter"),
        ("POST", CHAT, b'{"model":"base","messages":"x"}', 400, "invalid_value"),
        ("POST", CHAT, chat_body("../x", "user"), 404, NO_MODEL),
        ("POST", CHAT, chat_body("base:a/b@c", "user"), 404, NO_MODEL),
        ("POST", CHAT, chat_body("arm/nosuch", "user"), 404, NO_MODEL),
        ("POST", CHAT, chat_body("base", "assistant"), 400, "invalid_value"),
        ("POST", CHAT, chat_body("arm/plain", "system", "user"), 400, "invalid_value"),
        ("POST", CHAT, b"x" * (5 * 2**20), 413, "request_too_large"),
        ("POST", "/v1/completions", b'{"model":"arm/plain","prompt":"x"}', 400, None),
        ("POST", REFRESH, b'{"adapter":"nosuch@latest"}', 404, NO_MODEL),
        ("GET", CHAT, b"", 405, "method_not_allowed"),
        ("GET", "/v1/nosuch", b"", 404, "unknown_url"),
        ("GET", "/v1/models/nosuch", b"", 404, NO_MODEL),
    ],
)
def test_every_refusal_has_openais_shape(
    endpoint: Endpoint, method: str, path: str, body: bytes, status: int, code: str | None
) -> None:
    response = httpx.request(method, f"{endpoint.url}{path}", content=body, headers={**OWNER, **JSON}, timeout=30)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    assert str(endpoint.spec.root) not in error["message"]


def test_an_adapter_that_nobody_asked_for_yet_loads_on_demand(endpoint: Endpoint, world: World) -> None:
    version = world.newer[-1]
    with endpoint.client() as client:
        assert version not in {adapter["version"] for adapter in client.adapters()}
        reply = client.chat(ChatCall(f"base:card@{version}", (Message("user", "Hello"),), max_tokens=NEW_TOKENS))
        assert (reply.adapter_version, reply.text) == (version, world.texts[version, "Hello"])
        assert version in {adapter["version"] for adapter in client.adapters()}


def test_an_arm_says_which_passages_and_which_version_answered(endpoint: Endpoint, world: World) -> None:
    with endpoint.client() as client:
        call = ChatCall("arm/rag", (Message("user", QUESTIONS[0]),), max_tokens=4)
        reply = client.chat(call)
        assert (reply.arm, reply.retrieved_ids[0]) == ("rag", "ZPPP")
        assert reply.adapter_version == client.chat(ChatCall("base:card", call.messages, max_tokens=1)).adapter_version
        *pieces, last = client.stream(call)
        assert isinstance(last, ClientReply)
        assert "".join(piece for piece in pieces if isinstance(piece, str)) == last.text == reply.text


def test_an_arm_says_how_likely_an_answer_is_by_the_handle(endpoint: Endpoint) -> None:
    """Source: the log probabilities that the engine tells of an answer while it generates it."""
    arm = ArmSpec(name="card", adapter="card@latest", max_new_tokens=6)
    hello = (Message("user", "Hello"),)
    request = ArmRequest(arm, hello, "said", SamplingParams(logprobs=0), ignore_eos=True)

    async def ask() -> tuple[ArmAnswer, list[Likelihood]]:
        (said,) = await ServeBackend(endpoint.handle, 60).choices(request)
        return said, await endpoint.likelihood(arm, hello, [said.text, "something else"], "likely")

    said, [likely, other] = asyncio.run(ask())
    template = load.template(load.resolve(endpoint.spec.base))
    assert template.continuation_ids(said.text) == list(said.token_ids), "this text has one spelling in tokens"
    assert said.logprobs is not None
    assert likely.logprob == pytest.approx(sum(one.token.logprob for one in said.logprobs), abs=1e-3)
    assert other.logprob < likely.logprob < 0
    assert likely.tokens == len(template.continuation_ids(said.text))


def test_our_client_says_where_nothing_answers() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with Client(url) as client:
        assert not client.ready()
        with pytest.raises(ClusterError, match=f"endpoint {url}"):
            client.models()


def test_a_caller_that_goes_away_frees_its_place(endpoint: Endpoint) -> None:
    said = [{"role": "user", "content": "Hello"}]
    body = {"model": "base:card", "messages": said, "max_tokens": 900, "ignore_eos": True}
    with endpoint.client() as client:

        def engine() -> dict[str, Any]:
            found: dict[str, Any] = client.stats()["engine"]
            return found

        def of_stream() -> None:
            whole = {**body, "stream": True}
            with httpx.stream("POST", f"{endpoint.url}/v1/chat/completions", json=whole, headers=AUTH) as stream:
                next(stream.iter_lines())

        def of_whole() -> None:
            asyncio.run(go_away(endpoint, body, lambda: engine()["running"] > 0))

        def cancels(leave: Callable[[], None]) -> bool:
            """False where the answer was whole before word of it came: so a busy machine needs another try."""
            before = engine()["finished"].get("cancelled", 0)
            leave()
            until(lambda: engine()["running"] == 0)
            return bool(engine()["finished"].get("cancelled", 0) == before + 1)

        for leave in (of_stream, of_whole):
            until(functools.partial(cancels, leave))


async def go_away(endpoint: Endpoint, body: dict[str, Any], runs: Callable[[], bool]) -> None:
    """Asks for a whole answer, and closes the connection once the engine is at it."""
    async with httpx.AsyncClient(base_url=str(endpoint.url), headers=AUTH, timeout=60) as http:
        asked = asyncio.create_task(http.post("/v1/chat/completions", json=body))
        await asyncio.to_thread(until, runs)
        asked.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asked
