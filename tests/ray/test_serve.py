"""An endpoint on a real Ray: a tiny base, adapters made by PEFT and really published, callers over HTTP and handle."""

import asyncio
import contextlib
import functools
import itertools
import json
import os
import pickle
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
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

from graftwork.artifacts import publish as artifact
from graftwork.base import load as base_model
from graftwork.base.spec import BaseSpec
from graftwork.cluster.session import Session
from graftwork.errors import ArtifactError, ClusterError, ConfigError
from graftwork.prompts import render as chat
from graftwork.prompts.render import Message, Prompt
from graftwork.prompts.template import Template
from graftwork.serving.api.auth import BODY_TIMEOUT_S
from graftwork.serving.api.errors import ApiError
from graftwork.serving.api.http_protocol import HEAD_TIMEOUT_S
from graftwork.serving.client import ChatCall, Client, ClientReply
from graftwork.serving.deploy import Endpoint, deploy
from graftwork.serving.engine.request import SamplingParams
from graftwork.serving.load_test import Sent, burst, swap_under_load
from graftwork.serving.messages import ArmAnswer, ArmRequest, Likelihood
from graftwork.serving.router import ServeBackend
from graftwork.serving.spec import ArmSpec, GrammarSpec, ServeSpec
from graftwork.storage.store import Store
from tests.adapters import facts
from tests.engines import ALL, peft_greedy, write_lora
from tests.ports import free_port
from tests.tiny import write_tiny_base
from tests.waiting import until

SYSTEM = "Answer with one JSON object."
QUESTIONS = ("Which airport has the ICAO code ZPPP?", "How high above the sea does KMG lie?", "Hello")
NEW_TOKENS = 12
TASKS = ("card", "agent", "third")
FLIPS = 5
CHAT, NO_MODEL = "/v1/chat/completions", "model_not_found"
REFRESH = "/v1/admin/adapters/refresh"
TOKEN, ADMIN_TOKEN = "correct horse battery staple", "battery staple of the owner"
AUTH = {"authorization": f"Bearer {TOKEN}"}
JSON = {"content-type": "application/json"}
OWNER = {"authorization": f"Bearer {ADMIN_TOKEN}"}


@dataclass(frozen=True)
class World:
    """A store with a base, one version of each task, and FLIPS more of `card`. The texts come from PEFT."""

    base: Path
    store: Store
    corpus: Path
    versions: dict[str, str]
    """Of the tasks at the start."""
    newer: tuple[str, ...]
    texts: dict[tuple[str | None, str], str]
    """(version, question) -> what it answers greedily; version None is the base."""

    def spec(self, **changed: Any) -> ServeSpec:
        usual: dict[str, Any] = {
            "base": str(self.base),
            "root": self.store.uri,
            "port": free_port(),
            "quant": {"kind": "none", "dtype": "float32"},
            "adapters": [f"{task}@latest" for task in TASKS],
            "engine": {"max_seq_len": 1024, "num_threads": 1},
            "arms": [
                {"name": "plain", "prompt": {"system": SYSTEM}, "max_new_tokens": NEW_TOKENS},
                {"name": "rag", "adapter": "card@latest", "retriever": {"corpus": str(self.corpus), "k": 2}},
            ],
        }
        return ServeSpec(**{**usual, **changed})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    tmp = tmp_path_factory.mktemp("serve")
    base = write_tiny_base(tmp / "base")
    resolved = base_model.resolve(BaseSpec(uri=str(base)))
    template = base_model.template(resolved)
    store = Store(str(tmp / "root"))
    folders: dict[str, Path] = {}

    def publish(task: str, seed: int, alias: str | None) -> str:
        folder = write_lora(base, tmp / f"lora{seed}", seed, r=4, lora_alpha=16, target_modules=list(ALL))
        known = facts(base_digest=resolved.digest, prompt={"system": SYSTEM})
        version = artifact.publish(store, task, folder, **known, alias=alias).version
        folders[version] = folder
        return version

    versions = {task: publish(task, seed, "latest") for seed, task in enumerate(TASKS)}
    newer = tuple(publish("card", 10 + number, None) for number in range(FLIPS))
    texts: dict[tuple[str | None, str], str] = {}
    said: dict[str | None, list[str]] = {None: expected(base, None, template, None)}
    said |= {version: expected(base, folder, template, SYSTEM) for version, folder in folders.items()}
    for version, answers in said.items():
        texts |= {(version, question): text for question, text in zip(QUESTIONS, answers, strict=True)}
    assert len(set(texts.values())) == len(texts), "each version must have an answer of its own, or no mix-up shows"
    corpus = tmp / "corpus.jsonl"
    passages = {"ZPPP": "ZPPP is Kunming Wujiaba in China", "EDDF": "EDDF is Frankfurt", "KJFK": "KJFK is New York"}
    corpus.write_text("".join(json.dumps({"id": id_, "text": text}) + "\n" for id_, text in passages.items()))
    return World(base, store, corpus, versions, newer, texts)


def expected(base: Path, adapter: Path | None, template: Template, system: str | None) -> list[str]:
    """PEFT's own greedy answers to the questions, up to the first stop token."""
    prompts = [chat.render([Message("user", q)], template, prompt=Prompt(system), generate=True) for q in QUESTIONS]
    answers = peft_greedy(base, adapter, [prompt.ids for prompt in prompts], NEW_TOKENS)
    stop = template.stop_ids
    return [template.decode(list(itertools.takewhile(lambda token: token not in stop, ids))) for ids in answers]


def test_a_port_in_use_is_named_before_anything_starts(ray_cluster: Session, world: World) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port={port} on 127.0.0.1"), deploy(world.spec(port=port)):
            pytest.fail("it deployed")


def test_a_sequence_longer_than_the_base_takes_is_refused(ray_cluster: Session, world: World) -> None:
    with pytest.raises(ConfigError, match="max_seq_len=4096"), deploy(world.spec(engine={"max_seq_len": 4096})):
        pytest.fail("it deployed")


def test_what_the_engine_finds_at_its_start_is_told_in_its_own_words(ray_cluster: Session, world: World) -> None:
    limits = {"max_seq_len": 1024, "kv_tokens": 512}
    with (
        pytest.raises(ConfigError, match=r"engine\.kv_tokens") as caught,
        deploy(world.spec(engine=limits), http=False),
    ):
        pytest.fail("it deployed")
    assert caught.value.rule
    assert caught.value.hint


def test_more_cpus_than_there_are_is_refused(ray_cluster: Session, world: World) -> None:
    with pytest.raises(ConfigError, match="num_cpus=400"), deploy(world.spec(num_cpus=400)):
        pytest.fail("it deployed")


def test_an_adapter_of_another_base_is_refused_before_anything_starts(
    ray_cluster: Session, world: World, tmp_path: Path
) -> None:
    other = write_tiny_base(tmp_path / "other", seed=1)
    with pytest.raises(ArtifactError, match="trained on base"), deploy(world.spec(base=str(other))):
        pytest.fail("it deployed")


def test_without_http_the_engine_answers_hundreds_of_calls_at_once(ray_cluster: Session, world: World) -> None:
    """What an offline comparison does: no proxy, no port, all requests in one batch."""
    arms = [ArmSpec(name="base", max_new_tokens=NEW_TOKENS)]
    arms += [ArmSpec(name=t, adapter=f"{t}@latest", max_new_tokens=NEW_TOKENS) for t in TASKS]
    jobs = [(arm, question) for arm in arms for question in QUESTIONS] * 16  # 192

    async def ask_all(endpoint: Endpoint) -> list[ArmAnswer]:
        asks = [
            endpoint.ask(arm, [Message("user", question)], f"job-{number}")
            for number, (arm, question) in enumerate(jobs)
        ]
        return await asyncio.gather(*asks)

    with deploy(world.spec(), http=False) as endpoint:
        answers = asyncio.run(ask_all(endpoint))
        found = endpoint.handle.snapshot.remote().result()
    for (arm, question), answer in zip(jobs, answers, strict=True):
        version = world.versions.get(arm.name)
        assert (answer.adapter_version, answer.text) == (version, world.texts[version, question])
    assert found.engine.most_adapters_in_step == len(TASKS)


@pytest.fixture(scope="module")
def endpoint(ray_cluster: Session, world: World) -> Iterator[Endpoint]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("GRAFTWORK_TEST_TOKEN", TOKEN)
        environment.setenv("GRAFTWORK_TEST_OWNER", ADMIN_TOKEN)
        settings = {"token_env": "GRAFTWORK_TEST_TOKEN", "admin_token_env": "GRAFTWORK_TEST_OWNER"}
        with deploy(world.spec(**settings)) as running:
            yield running


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


def test_a_token_that_is_not_set_is_named(ray_cluster: Session, world: World) -> None:
    with pytest.raises(ConfigError, match="token_env=NO_SUCH_TOKEN"), deploy(world.spec(token_env="NO_SUCH_TOKEN")):
        pytest.fail("it deployed")


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
    template = base_model.template(base_model.resolve(endpoint.spec.base))
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


def test_a_burst_over_five_swaps_fails_nothing_and_mixes_nothing(endpoint: Endpoint, world: World) -> None:
    """Each answer is that of the version it names; a request sent after a swap was confirmed gets the new version."""
    models = ("base:card", "base:agent", "base:card@latest", "base:third", "base")
    calls = [ChatCall(m, (Message("user", q),), max_tokens=NEW_TOKENS) for q, m in itertools.product(QUESTIONS, models)]
    sent, confirmed = asyncio.run(burst_with_swaps(endpoint, world, calls, at_least=300))
    assert len(sent) >= 300
    assert [one.error for one in sent if one.error] == []
    for one in sent:
        assert one.reply is not None
        version = one.reply.adapter_version
        assert one.reply.text == world.texts[version, one.call.messages[0].content]
        if one.call.model.startswith("base:card"):
            before = [new for asked, done, new in confirmed if done < one.began_s]
            since = [new for asked, done, new in confirmed if asked < one.ended_s][len(before) :]
            assert version in {before[-1] if before else world.versions["card"], *since}
    assert {world.versions["card"], *world.newer} <= {one.version for one in sent}
    with endpoint.client() as client:
        assert [a["version"] for a in client.adapters() if "card@latest" in a["refs"]] == [world.newer[-1]]
        assert client.stats()["engine"]["most_adapters_in_step"] >= 3


async def burst_with_swaps(
    endpoint: Endpoint, world: World, calls: list[ChatCall], at_least: int
) -> tuple[list[Sent], list[tuple[float, float, str]]]:
    """Swap `card@latest` to each newer version, 40 answers between swaps. Also (asked, confirmed, version) of each."""
    answered, grown, confirmed = 0, asyncio.Event(), list[tuple[float, float, str]]()

    def supply() -> Iterator[ChatCall]:
        for number in itertools.count():
            if len(confirmed) == FLIPS and answered >= max(at_least, quiet_from + 40):
                return
            yield calls[number % len(calls)]

    def count(now: int) -> None:
        nonlocal answered
        answered = now
        grown.set()

    async with endpoint.async_client() as client:
        began = time.perf_counter()
        running = asyncio.create_task(burst(client, supply(), concurrency=24, on_answer=count))
        for version in world.newer:
            quiet_from = answered
            while answered < quiet_from + 40:
                grown.clear()
                await grown.wait()
            asked = time.perf_counter() - began
            artifact.promote(world.store, "card", "latest", version)
            assert await client.refresh("card@latest") == version
            quiet_from = answered
            confirmed.append((asked, time.perf_counter() - began, version))
        return await running, confirmed


def test_the_swap_report_counts_by_version(endpoint: Endpoint, world: World) -> None:
    old, new = world.newer[-1], world.versions["card"]
    calls = [ChatCall(model, (Message("user", "Hello"),), max_tokens=8) for model in ("base:card", "base:agent")] * 30
    report = asyncio.run(swap_under_load(endpoint, world.store, "card@latest", new, calls, concurrency=8))
    assert (report.requests, report.failed, report.stale, report.old, report.new) == (60, 0, 0, old, new)
    assert sum(report.by_version.values()) == 60
    assert report.by_version[world.versions["agent"]] == 30
    assert min(report.by_version[old], report.by_version[new]) > 0
    assert report.ttft_ms["base:card"].n == 30
    assert report.swap_ms > 0


def test_a_killed_engine_is_said_in_openais_shape_and_comes_back(endpoint: Endpoint, world: World) -> None:
    async def run(pid: int) -> tuple[httpx.Response, list[str]]:
        body = {"model": "base:card", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 900}
        async with httpx.AsyncClient(base_url=str(endpoint.url), headers=AUTH, timeout=60) as http:
            whole = asyncio.create_task(http.post("/v1/chat/completions", json=body))
            async with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as stream:
                lines = stream.aiter_lines()
                seen = [await anext(lines)]
                while (await http.get("/v1/stats")).json()["engine"]["running"] < 2:  # neither waits outside the engine
                    assert not whole.done()
                os.kill(pid, signal.SIGKILL)
                seen += [line async for line in lines]
            return await whole, seen

    with endpoint.client() as client:
        whole, seen = asyncio.run(run(client.stats()["replicas"][0]["pid"]))
        assert whole.status_code == 503
        assert whole.json()["error"]["code"] == "engine_lost"
        assert json.loads([line for line in seen if line][-1].removeprefix("data: "))["error"]["code"] == "engine_lost"
        reply = client.chat(ChatCall("base:agent", (Message("user", "Hello"),), max_tokens=NEW_TOKENS))
        assert reply.text == world.texts[world.versions["agent"], "Hello"]
        assert client.ready()
