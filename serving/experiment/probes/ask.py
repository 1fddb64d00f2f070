"""The failures of every arm, the requests that probe them, and the evidence that the answers make.

Probes go through the same handle as the arms and are kept on disk by the same key. They come in two rounds: what the
first finds says where the second is needed.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from graftwork.chat import PromptSpec
from graftwork.data import DatasetRow
from graftwork.retrieval.chunks import document_of
from graftwork.serving.experiment.answers import AnswerSet, EvalAnswer, answer_key, question
from graftwork.serving.experiment.offline import EvalRequest, Messages
from graftwork.serving.experiment.probes.classify import ProbeEvidence
from graftwork.serving.experiment.probes.gold import (
    GoldPassages,
    distractors,
    right_answer,
    with_context,
)
from graftwork.serving.experiment.probes.right import Correctness, CorrectnessCheck, repaired
from graftwork.serving.experiment.probes.spec import ProbeSpec
from graftwork.serving.experiment.spec import CompareSpec
from graftwork.serving.spec import ArmSpec, GrammarSpec

__all__ = ["Prober", "WrongAnswer"]


@dataclass(frozen=True)
class WrongAnswer:
    """One arm's answer that is not wholly right."""

    arm: ArmSpec
    row: DatasetRow
    answer: EvalAnswer
    right: Correctness


class Prober:
    """Asks why. Runs in the driver.

    answers: all arms' answers; prompts: by arm name, those of adapters as trained; versions: of the arms' adapters.
    """

    def __init__(
        self,
        spec: CompareSpec,
        probes: ProbeSpec,
        rows: Sequence[DatasetRow],
        answers: AnswerSet,
        judge: CorrectnessCheck,
        passages: GoldPassages,
        *,
        prompts: Mapping[str, PromptSpec],
        versions: Mapping[str, str],
        reference: str,
    ) -> None:
        self.spec, self.probes, self.rows, self.answers, self.judge = spec, probes, rows, answers, judge
        self.reference = reference
        self._passages, self._prompts, self._versions = passages, prompts, versions
        self._by_name = {arm.name: arm for arm in spec.arms}

    @cached_property
    def rights(self) -> Mapping[str, Mapping[str, Correctness]]:
        """Arm -> row id -> what is right; a failed request has nothing right."""
        return {arm.name: {row.id: self._right(arm.name, row) for row in self.rows} for arm in self.spec.arms}

    @cached_property
    def failures(self) -> tuple[WrongAnswer, ...]:
        """The answers to be probed, arm by arm. Failed requests are not: they say nothing of the model."""
        probed = self.probes.arms or tuple(self._by_name)
        return tuple(failure for name in probed for failure in self._sample(self._by_name[name]))

    def first_requests(self) -> list[EvalRequest]:
        """Gold passage, grammar, and the base before the adapter."""
        return [job for failure in self.failures for job in self._first(failure)]

    def followup_requests(self, found: AnswerSet) -> list[EvalRequest]:
        """Likelihoods without context, where they decide, and for the reference's missing facts."""
        return [job for failure in self.failures if self._needs_likelihood(failure, found)
                for job in [self._likelihoods(failure)] if job.continuations[1:]]  # fmt: skip

    def evidence(self, failure: WrongAnswer, found: AnswerSet) -> ProbeEvidence:
        """What was found about one failure."""
        arm, row = failure.arm, failure.row
        return ProbeEvidence(
            form_right=failure.right.form, value_right=failure.right.value, retrieves=arm.retriever is not None,
            gold_retrieved=self._retrieved(failure),
            oracle_right=self._value_of(f"{arm.name}~oracle", row, found),
            grammar_right=self._under_grammar(failure, found),
            closed_book=_prefers_first(found.find(f"{arm.name}~closed", row.id)),
            right_before=self._before(failure, found),
        )  # fmt: skip

    def _right(self, arm: str, row: DatasetRow) -> Correctness:
        answer = self.answers.find(arm, row.id)
        return self.judge.check(row, answer.text) if answer else Correctness(False, False, False)

    def _sample(self, arm: ArmSpec) -> list[WrongAnswer]:
        failed = [
            WrongAnswer(arm, row, answer, self.rights[arm.name][row.id])
            for row in self.rows
            if (answer := self.answers.find(arm.name, row.id)) and not self.rights[arm.name][row.id].whole
        ]
        if len(failed) <= self.probes.max_failures:
            return failed
        drawn = random.Random(f"{self.spec.seed} {arm.name}").sample(range(len(failed)), self.probes.max_failures)
        return [failed[index] for index in sorted(drawn)]

    def _first(self, failure: WrongAnswer) -> Iterator[EvalRequest]:
        arm, row, right = failure.arm, failure.row, failure.right
        alone = arm.with_({"retriever": None})
        if not right.value and (context := self._gold_context(failure)):
            yield self._job(f"{arm.name}~oracle", alone, row, context)
        if right.form is False and self.spec.answer_schema and arm.grammar is None and not self._repairs(failure):
            strict = GrammarSpec(json_schema=self.spec.answer_schema).model_dump(mode="json", exclude_none=True)
            context = None if right.value else self._gold_context(failure)
            base = alone if context else arm
            yield self._job(f"{arm.name}~grammar", base.with_({"grammar": strict}), row, context or question(row))
        if not right.value and arm.adapter and not arm.retriever and not self._twins(arm):
            yield self._job(f"{arm.name}~before", arm.with_({"adapter": None}), row, question(row))

    def _gold_context(self, failure: WrongAnswer) -> Messages | None:
        passage = self._passages.find(failure.row)
        return with_context(failure.row, passage, self._prompts[failure.arm.name]) if passage else None

    def _likelihoods(self, failure: WrongAnswer) -> EvalRequest:
        row = failure.row
        references = self.judge.references
        others = distractors(row, self.rows, self.probes.distractors, self.spec.seed, references)
        alone = failure.arm.with_({"retriever": None, "grammar": None})
        texts = (right_answer(row, references), *others)
        return self._job(f"{failure.arm.name}~closed", alone, row, question(row), texts)

    def _job(
        self, label: str, arm: ArmSpec, row: DatasetRow, messages: Messages, continuations: tuple[str, ...] = ()
    ) -> EvalRequest:
        version = self._versions.get(arm.name) if arm.adapter else None
        key = answer_key(self.spec, label, arm, row, version, messages=messages, continuations=continuations)
        return EvalRequest(key, label, row.id, arm, messages, continuations)

    def _needs_likelihood(self, failure: WrongAnswer, found: AnswerSet) -> bool:
        if failure.right.value:
            return False
        oracle = self._value_of(f"{failure.arm.name}~oracle", failure.row, found)
        return not oracle if failure.arm.retriever else failure.arm.name == self.reference

    def _value_of(self, label: str, row: DatasetRow, found: AnswerSet) -> bool | None:
        answer = found.find(label, row.id)
        return self.judge.check(row, answer.text).value if answer else None

    def _retrieved(self, failure: WrongAnswer) -> bool | None:
        if failure.arm.retriever is None or failure.row.doc_id is None:
            return None
        passage = self._passages.find(failure.row)
        wanted = {failure.row.doc_id, passage.id if passage else failure.row.doc_id}
        return any(found in wanted or document_of(found) == failure.row.doc_id
                   for found in failure.answer.retrieved_ids)  # fmt: skip

    def _repairs(self, failure: WrongAnswer) -> bool:
        text = repaired(failure.answer.text)
        return text is not None and self.judge.check(failure.row, text).whole

    def _under_grammar(self, failure: WrongAnswer, found: AnswerSet) -> bool | None:
        if failure.right.form is not False:
            return None
        if self._repairs(failure):
            return True
        answer = found.find(f"{failure.arm.name}~grammar", failure.row.id)
        return self.judge.check(failure.row, answer.text).whole if answer else None

    def _twins(self, arm: ArmSpec) -> list[str]:
        """Arms of the comparison that are this one without its adapter."""
        return [other.name for other in self.spec.arms if other.adapter is None and other.retriever == arm.retriever]

    def _before(self, failure: WrongAnswer, found: AnswerSet) -> bool | None:
        if failure.arm.adapter is None:
            return None
        twins = self._twins(failure.arm)
        if twins:
            return any(self.rights[name][failure.row.id].value for name in twins)
        return self._value_of(f"{failure.arm.name}~before", failure.row, found)


def _prefers_first(answer: EvalAnswer | None) -> bool | None:
    """Whether the first text is likelier than each other, per token: answers differ in length."""
    if answer is None or not answer.logprobs:
        return None
    first, *others = (logprob / max(1, tokens) for logprob, tokens in answer.logprobs)
    return first > max(others)
