"""A teacher behind an OpenAI-compatible endpoint, this project's own among them."""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from graftwork.chat import Message
from graftwork.errors import ConfigError, DataError
from graftwork.training.objective_spec import GenerateSpec
from graftwork.training.teaching.answer import TeacherAnswer

TIMEOUT_S = 600.0
TRIES = 4
"""Of a request that the endpoint has no room for (429, 503); 1, 2 and 4 s lie between."""


def ask(
    generate: GenerateSpec, questions: Sequence[Sequence[Message]], system: str | None, seed: int
) -> list[list[TeacherAnswer]]:
    """`generate.samples` answers to each question. Raises DataError naming what the endpoint said, ConfigError."""
    assert generate.url is not None, "asked where there is an endpoint"
    bodies = [_body(generate, question, system, seed + n) for question in questions for n in range(generate.samples)]
    with (
        httpx.Client(base_url=generate.url.rstrip("/") + "/", headers=_headers(generate), timeout=TIMEOUT_S) as client,
        ThreadPoolExecutor(generate.concurrency, thread_name_prefix="teacher") as pool,
    ):
        answers = [pool.submit(_ask_once, client, generate, body) for body in bodies]
        try:
            found = [answer.result() for answer in answers]
        finally:
            pool.shutdown(cancel_futures=True)
    return [found[start : start + generate.samples] for start in range(0, len(found), generate.samples)]


def _ask_once(client: httpx.Client, generate: GenerateSpec, body: dict[str, Any]) -> TeacherAnswer:
    for attempt in range(TRIES):
        try:
            response = client.post("chat/completions", json=body)
        except httpx.HTTPError as error:
            raise _request_error(generate, f"nothing answers ({error})") from error
        if response.status_code not in (429, 503) or attempt == TRIES - 1:
            break
        time.sleep(2.0**attempt)
    if response.is_error:
        raise _request_error(generate, f"HTTP {response.status_code}: {response.text[:500]}")
    try:
        choice = response.json()["choices"][0]
        return TeacherAnswer(str(choice["message"]["content"] or ""), choice["finish_reason"] == "stop")
    except (ValueError, LookupError, TypeError) as error:
        raise _request_error(generate, f"its answer is no chat completion: {response.text[:500]}") from error


def _body(generate: GenerateSpec, question: Sequence[Message], system: str | None, seed: int) -> dict[str, Any]:
    own = [] if system is None or question[0].role == "system" else [Message("system", system)]
    return {
        "model": generate.model,
        "messages": [{"role": turn.role, "content": turn.content} for turn in (*own, *question)],
        "temperature": generate.temperature,
        "max_tokens": generate.max_new_tokens,
        "seed": seed,
    }


def _headers(generate: GenerateSpec) -> dict[str, str]:
    if generate.api_key_env is None:
        return {}
    key = os.environ.get(generate.api_key_env)
    if not key:
        raise ConfigError(f"objective.generate.api_key_env={generate.api_key_env}", "the variable is not set",
                          "it holds the endpoint's key", f"export {generate.api_key_env}=...")  # fmt: skip
    return {"Authorization": f"Bearer {key}"}


def _request_error(generate: GenerateSpec, found: str) -> DataError:
    return DataError(
        f"objective.generate.url={generate.url}, model={generate.model}",
        found,
        "the teacher answers POST URL/chat/completions for each training row",
        "check url and model (GET URL/models lists them), or start the endpoint: graftwork serve FILE",
    )
