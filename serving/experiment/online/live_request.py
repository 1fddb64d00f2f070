"""A caller's request to an experiment: answered as any other, and written down when it has ended."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager

from graftwork.serving.api_error import ApiError
from graftwork.serving.arms import Dump, Question
from graftwork.serving.backend import EngineBackend
from graftwork.serving.experiment.online.live import ArmPlacement, LiveExperiment

DISCONNECTED = "disconnected"
"""The caller left before the end: the arm's failure, as far as can be told."""


class LiveRequest:
    """`choices` and `stream` as a `EngineBackend` has them. One request each."""

    def __init__(self, live: LiveExperiment, placed: ArmPlacement, backend: EngineBackend) -> None:
        self.arm, self.experiment = placed.arm, live.record.id
        self._live, self._placed, self._backend = live, placed, backend

    async def choices(self, arm: Dump, messages: Question, request_id: str, sampling: Dump) -> list[Dump]:
        """See Backend.choices."""
        with self._observed(messages, request_id, sampling) as ended:
            answers = await self._backend.choices(arm, messages, request_id, sampling)
            ended.append(answers[0])
        return answers

    async def stream(self, arm: Dump, messages: Question, request_id: str, sampling: Dump) -> AsyncGenerator[Dump]:
        """See Backend.stream."""
        with self._observed(messages, request_id, sampling) as ended:
            async with aclosing(self._backend.stream(arm, messages, request_id, sampling)) as chunks:
                async for chunk in chunks:
                    if "answer" in chunk and chunk["answer"]["index"] == 0:
                        ended.append(chunk["answer"])
                    yield chunk

    @contextmanager
    def _observed(self, messages: Question, request_id: str, sampling: Dump) -> Iterator[list[Dump]]:
        answers: list[Dump] = []
        if self._placed.role is None or not self._live.assign(self._placed, request_id):
            yield answers
            return
        outcome: Dump | ApiError | None = None
        self._live.shadow.caller_came()
        try:
            yield answers
            outcome = answers[0]
        except ApiError as error:
            outcome = error
            raise
        except (asyncio.CancelledError, GeneratorExit):
            outcome = answers[0] if answers else None
            raise
        finally:
            self._live.write(self._placed, request_id, messages, DISCONNECTED if outcome is None else outcome)
            if self._live.record.spec.mode == "shadow" and outcome is not None:
                self._live.copy_to_others(self._placed, request_id, messages, sampling)
            self._live.shadow.caller_left()
