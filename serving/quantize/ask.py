"""One arm answers all questions on an engine in this process, as a replica would have it answer."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from graftwork.chat import PromptSpec, Template
from graftwork.data import DatasetRow
from graftwork.serving.api_error import ApiError
from graftwork.serving.arms import build_prompt
from graftwork.serving.engine.grammar import Grammar
from graftwork.serving.engine.types import GenerateRequest, SamplingParams
from graftwork.serving.engine_protocol import Engine
from graftwork.serving.generation import Generation, StreamedAnswer
from graftwork.serving.grammar import Grammars, read_grammar
from graftwork.serving.quantize.measured import AnswerText
from graftwork.serving.spec import ArmSpec
from graftwork.serving.vocabulary import Vocabulary


@dataclass(frozen=True)
class Asker:
    """An engine that runs, the base's template, and the longest sequence."""

    engine: Engine
    template: Template
    max_seq_len: int

    def ask_all(
        self, arm: ArmSpec, rows: Sequence[DatasetRow], *, version: str | None, trained: PromptSpec | None
    ) -> tuple[AnswerText, ...]:
        """The arm's answers in the order of the rows, all in flight at once. Raises DataError for a prompt too long."""

        grammar = Grammars(Vocabulary(self.template, 0)).compile(read_grammar(arm.grammar)) if arm.grammar else None

        async def ask() -> tuple[AnswerText, ...]:
            return tuple(await asyncio.gather(*(self._ask(arm, row, version, trained, grammar) for row in rows)))

        return asyncio.run(ask())

    async def _ask(
        self, arm: ArmSpec, row: DatasetRow, version: str | None, trained: PromptSpec | None, grammar: Grammar | None
    ) -> AnswerText:
        prompt = build_prompt(arm, row.question, self.template, max_seq_len=self.max_seq_len, trained=trained)
        params = SamplingParams(max_new_tokens=prompt.max_new_tokens)
        request = GenerateRequest(f"{arm.name} {row.id}", prompt.ids, params, prompt.stop_ids, version, grammar)
        answer = StreamedAnswer(0, self.template.decode, (), prompt.stop_ids, prompt, time.perf_counter())
        generation = Generation(self.engine, [request], on_end=lambda: None)
        text, cut = "", False
        try:
            async for events in generation.events():
                text += answer.add(events[0])[0]
                cut = events[0][-1].finish_reason == "length"
        except ApiError as error:  # the engine failed on this request, e.g. its logits were not finite
            return AnswerText(text=text, error=str(error))
        return AnswerText(text=text, cut=cut)
