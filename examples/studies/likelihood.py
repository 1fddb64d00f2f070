"""Likelihoods: how probable each of a row's choices is as an answer. On disk as they come, one JSON line each."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from graftwork.config import canonical_json
from graftwork.datasets.rows import DatasetRow
from graftwork.errors import DataError, RunError
from graftwork.prompts.render import Message
from graftwork.scoring import Choices
from graftwork.serving.evaluation.answers import append_line, question, read_whole_lines
from graftwork.serving.messages import Likelihood
from graftwork.serving.spec import ArmSpec
from graftwork.stats import Floats

AT_ONCE = 32

Weigh = Callable[[ArmSpec, Sequence[Message], Sequence[str], str], Awaitable[list[Likelihood]]]
"""(arm, messages, choices, request id) -> `logprob` in nats and `tokens` of each choice."""


class Weighed(BaseModel):
    """The choices of one question, weighed by one arm."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    logprobs: tuple[float, ...]
    tokens: tuple[int, ...]


def weigh_key(arm: ArmSpec, row: DatasetRow, base: Mapping[str, Any], choices: Choices) -> str:
    """32 hex digits over everything that decides the likelihoods; the arm's adapter is pinned to a version."""
    decides = [arm.model_dump(mode="json"), base, row.id, question(row), list(choices.texts)]
    return hashlib.sha256(canonical_json(decides).encode()).hexdigest()[:32]


def read_weighed(path: Path) -> dict[str, Weighed]:
    """Recorded likelihoods by key. A line torn by a crash is cut off, and weighed again. Raises DataError."""
    if not path.exists():
        return {}
    try:
        found = [Weighed.model_validate_json(line) for line in read_whole_lines(path)]
    except ValidationError as error:
        raise DataError(
            f"{path}",
            error.errors()[0]["msg"],
            "a line is the likelihoods of one question as JSON",
            "remove the file: its questions are weighed again",
        ) from None
    return {one.key: one for one in found}


async def weigh_all(
    jobs: Mapping[str, tuple[ArmSpec, DatasetRow, Choices]],
    weigh: Weigh,
    path: Path,
    on_progress: Callable[[int], None],
) -> None:
    """Ask for each key and append what comes to `path`. Raises the first failure: a likelihood has no wrong answer."""
    queue, done = iter(jobs.items()), 0

    async def work() -> None:
        nonlocal done
        for key, (arm, row, choices) in queue:
            told = await weigh(arm, row.question, list(choices.texts), f"weigh-{key}")
            if len(told) != len(choices.texts):
                raise RunError(
                    f"arm {arm.name!r}, row {row.id!r}",
                    f"{len(told)} likelihoods",
                    f"one for each of {len(choices.texts)} choices",
                )
            record = Weighed(
                key=key,
                logprobs=tuple(one.logprob for one in told),
                tokens=tuple(one.tokens for one in told),
            )
            append_line(path, record)
            done += 1
            on_progress(done)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(AT_ONCE, len(jobs))):
                group.create_task(work())
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None


def scores_of(weighed: Sequence[Weighed], choices: Sequence[Choices]) -> dict[str, Floats]:
    """`nats`, `choice` and `bias` of one arm, a value a row. A choice is as probable as its mean token."""
    chosen = [int(np.argmax(np.array(one.logprobs) / np.array(one.tokens))) for one in weighed]
    nats = [-one.logprobs[row.right] / one.tokens[row.right] for one, row in zip(weighed, choices, strict=True)]
    return {
        "nats": np.array(nats, dtype=np.float64),
        "choice": np.array([at == row.right for at, row in zip(chosen, choices, strict=True)], dtype=np.float64),
        "bias": np.array([row.signs[at] for at, row in zip(chosen, choices, strict=True)], dtype=np.float64),
    }
