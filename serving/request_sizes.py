"""Sizes of the requests of a comparison for its plan: rows are read and rendered as each arm puts them to the model.

Passages are those that lexical search finds: other retrievers bring as many of the same corpus. What depends on the
answers (probes of failures, a judge's pairs) is counted as if every answer failed and differed.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from graftwork.artifacts import registry
from graftwork.base import load
from graftwork.datasets.rows import DatasetRow, read_rows, resolve_prompt
from graftwork.errors import UserError
from graftwork.prompts.render import Message, Passage, Prompt, PromptSpec, fit_passages, render
from graftwork.prompts.template import Template
from graftwork.retrieval import LexicalSpec, Retriever, open_retriever
from graftwork.serving.evaluation.failures.probe import right_answer
from graftwork.serving.evaluation.scorers.choice import ChoiceSpec
from graftwork.serving.evaluation.spec import CompareSpec, ProbeSpec
from graftwork.serving.planning import RequestLoad
from graftwork.serving.quantize.spec import QuantizeSpec
from graftwork.serving.spec import ArmSpec
from graftwork.storage.store import Store

SAMPLED = 100
"""Rows that are rendered for each arm; the others are taken to be like them."""
LETTER_TOKENS = 1
"""Tokens of a request for likelihoods beyond its prompt."""

Prompts = Mapping[str, PromptSpec]
"""Task -> the prompt that its adapter is trained with, where the plan trains it too."""


def compare_answers(spec: CompareSpec, prompts: Prompts) -> RequestLoad:
    """All requests of a comparison: every arm's answers, likelihoods of choices, probes, the judge."""
    sizes = Sizes.read(spec, spec.root, prompts)
    requests = [sizes.answered(arm) for arm in spec.arms]
    requests += [
        sizes.weighed(arm, scorer) for scorer in spec.scorers if isinstance(scorer, ChoiceSpec) for arm in spec.arms
    ]
    if spec.probes is not None:
        requests += [
            one
            for arm in spec.arms
            if not spec.probes.arms or arm.name in spec.probes.arms
            for one in sizes.probed(arm, spec, spec.probes)
        ]
    if spec.judge is not None and spec.judge.url is None:
        requests += sizes.judged(spec, spec.judge.criteria, spec.judge.limit)
    return summed(requests)


def quantize_answers(spec: QuantizeSpec, prompts: Prompts) -> RequestLoad:
    """The requests to one precision: its arms' answers, windows of text, timed decoding."""
    sizes, text, speed = Sizes.read(spec, spec.root, prompts), spec.text, spec.speed
    windows = math.ceil(text.max_tokens / text.stride)
    timed = RequestLoad(speed.rounds * sum(speed.batches), speed.prompt_tokens, speed.new_tokens, ("speed",))
    return summed(
        [
            *(sizes.answered(arm) for arm in spec.arms),
            RequestLoad(windows, text.window, LETTER_TOKENS, ("windows of text",)),
            timed,
        ]
    )


@dataclass
class Sizes:
    """Rendered sizes of the requests of a set of arms over the same rows."""

    root: str
    template: Template
    rows: Sequence[DatasetRow]
    prompts: Prompts
    max_seq_len: int
    _indices: dict[tuple[str, int], Retriever] = field(default_factory=dict)
    _prompt_means: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, spec: CompareSpec | QuantizeSpec, root: str, prompts: Prompts) -> "Sizes":
        template = load.template(load.resolve(spec.base))
        rows = read_rows(spec.eval, limit=spec.limit, need="eval")
        return cls(root, template, rows, prompts, spec.engine.max_seq_len)

    def answered(self, arm: ArmSpec) -> RequestLoad:
        """Adapters write answers like the rows'; others until they stop, which a base seldom does."""
        return RequestLoad(len(self.rows), self.prompt_tokens(arm), self._new_tokens(arm), (arm.name,))

    def weighed(self, arm: ArmSpec, scorer: ChoiceSpec) -> RequestLoad:
        options = [
            (row.gold or {}).get(scorer.options_field) if scorer.options_field else scorer.options
            for row in self._sample()
        ]
        length = mean([sum(len(self.template.encode(str(one))) for one in some or ()) for some in options])
        return RequestLoad(
            len(self.rows), self.prompt_tokens(arm) + length, LETTER_TOKENS, (f"{arm.name} {scorer.name}",)
        )

    def probed(self, arm: ArmSpec, spec: CompareSpec, probes: ProbeSpec) -> list[RequestLoad]:
        """As in `probes.ask`: with the gold passage, under the grammar, before the adapter, without context."""
        count = min(len(self.rows), probes.max_failures)
        plain, new = self.prompt_tokens(arm.with_({"retriever": None})), self._new_tokens(arm)
        corpus = probes.corpus or next((one.retriever.corpus for one in spec.arms if one.retriever), None)
        gold = self.prompt_tokens(arm.with_({"retriever": {"corpus": corpus, "k": 1}})) if corpus else plain
        found = [("gold passage", gold, new)] if corpus else []
        if spec.answer_schema and arm.grammar is None:
            found.append(("grammar", gold, min(new, self._right_tokens())))
        twins = [other for other in spec.arms if other.adapter is None and other.retriever == arm.retriever]
        if arm.adapter and arm.retriever is None and not twins:
            found.append(("before", plain, self._new_tokens(arm.with_({"adapter": None}))))
        if arm.retriever or arm.name == (probes.reference or spec.baseline):
            found.append(("closed book", plain + (1 + probes.distractors) * self._right_tokens(), LETTER_TOKENS))
        return [RequestLoad(count, prompt, written, (f"{arm.name} {name}",)) for name, prompt, written in found]

    def judged(self, spec: CompareSpec, criteria: str, limit: int | None) -> list[RequestLoad]:
        """Two orders of each arm's answers with the baseline's."""
        asked = ArmSpec(name="judge", max_new_tokens=LETTER_TOKENS)
        rows, own = min(len(self.rows), limit or len(self.rows)), len(self.template.encode(criteria))
        base = next(arm for arm in spec.arms if arm.name == spec.baseline)
        return [
            RequestLoad(
                2 * rows,
                self.prompt_tokens(asked) + own + self._new_tokens(arm) + self._new_tokens(base),
                LETTER_TOKENS,
                (f"{arm.name} judged",),
            )
            for arm in spec.arms
            if arm.name != spec.baseline
        ]

    def prompt_tokens(self, arm: ArmSpec) -> float:
        """Mean tokens of the arm's prompts: system turn, worked examples, passages, question."""
        key = arm.model_dump_json(exclude={"name", "max_new_tokens", "grammar"})
        if key not in self._prompt_means:
            prompt, room = self._prompt(arm), arm.retriever.context_tokens if arm.retriever else None
            lengths = []
            for row in self._sample():
                context, _ = fit_passages(self._find_passages(arm, row.question), self.template, prompt, room)
                whole = render(
                    row.question,
                    self.template,
                    prompt=prompt,
                    context=context,
                    tools=row.tools or tuple(map(json.loads, arm.tools)),
                    template_kwargs={**arm.chat_template_kwargs, **row.template_kwargs},
                    generate=True,
                )
                lengths.append(len(whole.ids))
            self._prompt_means[key] = mean(lengths)
        return self._prompt_means[key]

    def _find_passages(self, arm: ArmSpec, question: Sequence[Message]) -> Sequence[Passage]:
        if arm.retriever is None:
            return ()
        key = (arm.retriever.corpus, arm.retriever.k)
        if key not in self._indices:
            self._indices[key] = open_retriever(LexicalSpec(corpus=arm.retriever.corpus, k=arm.retriever.k))
        return tuple(hit.passage for hit in self._indices[key].search(question[-1].content, arm.retriever.k))

    def _prompt(self, arm: ArmSpec) -> Prompt:
        """The arm's own, else the one that its adapter is trained with: in this plan, or as it was published."""
        if arm.prompt is not None or arm.adapter is None:
            return resolve_prompt(arm.prompt or PromptSpec())
        task = arm.adapter.partition("@")[0]
        if task in self.prompts:
            return resolve_prompt(self.prompts[task])
        try:
            return resolve_prompt(PromptSpec.model_validate(registry.resolve(Store(self.root), arm.adapter).prompt))
        except UserError:
            return resolve_prompt(PromptSpec())  # not trained yet

    def _new_tokens(self, arm: ArmSpec) -> float:
        most = arm.max_new_tokens or max(1, self.max_seq_len - self.prompt_tokens(arm))
        return min(most, self._right_tokens()) if arm.adapter else most

    def _right_tokens(self) -> float:
        """Mean tokens of the right answers with the token that ends them; 0 where rows have neither gold nor turn."""
        return mean(
            [len(self.template.encode(right_answer(row))) + 1 for row in self._sample() if row.answer or row.gold]
        )

    def _sample(self) -> Sequence[DatasetRow]:
        return self.rows[:: math.ceil(len(self.rows) / SAMPLED)]


def summed(requests: Sequence[RequestLoad]) -> RequestLoad:
    """Return the requests as one, with mean sizes and a part for each."""
    count = sum(one.count for one in requests)
    prompts = sum(one.count * one.prompt_tokens for one in requests) / max(count, 1)
    new = sum(one.count * one.new_tokens for one in requests) / max(count, 1)
    parts = [f"{one.parts[0]} {one.count} x ({one.prompt_tokens:.0f} + {one.new_tokens:.0f})" for one in requests]
    return RequestLoad(count, prompts, new, tuple(parts))


def mean(values: Sequence[float]) -> float:
    """Return the mean, 0 of no values."""
    return sum(values) / max(len(values), 1)
