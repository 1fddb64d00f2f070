"""Probes of failed answers: selection of failures, probe requests, and the evidence in their answers.

Probes go through the same handle as the arms and are kept on disk by the same key. They come in two rounds: what the
first finds says where the second is needed.
"""

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count

from graftwork.datasets.rows import DatasetRow
from graftwork.prompts.render import Message, Passage, PromptSpec, format_user_turn
from graftwork.retrieval import LexicalSpec, open_retriever
from graftwork.retrieval.corpus import document_of
from graftwork.scoring import GoldText, leaves, tokens
from graftwork.serving.arms import arm_of_row
from graftwork.serving.evaluation.answers import (
    AnswerSet,
    EvalAnswer,
    EvalRequest,
    Messages,
    answer_key,
    question,
)
from graftwork.serving.evaluation.failures.classify import Correctness, CorrectnessCheck, ProbeEvidence, repaired
from graftwork.serving.evaluation.spec import CompareSpec, ProbeSpec
from graftwork.serving.spec import ArmSpec, GrammarSpec

# Gold passages of rows, and distractor answers.


class GoldPassages:
    """Passages by document. A document in pieces (`guide.md#3`) gives the piece that says most of the gold answer."""

    def __init__(self, find: Callable[[str], Passage | None]) -> None:
        """find: a passage by its id."""
        self._find = find

    @classmethod
    def read(cls, corpus: str | None) -> "GoldPassages":
        """Of any corpus or index that a retriever takes. Raises DataError, StorageError."""
        return cls(open_retriever(LexicalSpec(corpus=corpus)).get if corpus else lambda _: None)

    def find(self, row: DatasetRow) -> Passage | None:
        """None where the row names no document, or the corpus lacks it."""
        if not row.doc_id:
            return None
        whole = self._find(row.doc_id)
        pieces = [whole] if whole else list(self._pieces(row.doc_id))
        return max(pieces, key=lambda passage: _shared_leaves(passage.text, row), default=None)

    def _pieces(self, document: str) -> Iterator[Passage]:
        for number in count(1):
            passage = self._find(f"{document}#{number}")
            if passage is None:
                return
            yield passage


def with_context(row: DatasetRow, passage: Passage, prompt: PromptSpec) -> Messages:
    """The row's question with one passage before it, as `chat.render` puts it for this prompt."""
    turns = question(row)
    last = max(i for i, turn in enumerate(turns) if turn["role"] == "user")
    turns[last] = {
        "role": "user",
        "content": format_user_turn(turns[last]["content"], [passage], prompt.context_header, prompt.citations),
    }
    return turns


def right_answer(row: DatasetRow, references: GoldText | None = None) -> str:
    """The text that a row wants: its first right text, where rows have right texts; else its last turn, else its gold
    as compact JSON.
    """
    if references is not None:
        return references.find_texts(row.gold, row.answer, row.id)[0]
    return row.answer or json.dumps(row.gold, ensure_ascii=False, separators=(",", ":"))


def distractors(
    row: DatasetRow, rows: Sequence[DatasetRow], most: int, seed: int, references: GoldText | None = None
) -> list[str]:
    """Right answers of other rows, with the fields that this row's question gives away kept as they are here.

    references: where the right texts of rows are; a text that is right here too is no distractor.
    """
    others = [other for other in rows if other.id != row.id]
    drawn = random.Random(f"{seed} {row.id}").sample(others, min(most, len(others)))
    if references is not None:
        texts, right = (
            [right_answer(other, references) for other in drawn],
            references.find_texts(row.gold, row.answer, row.id),
        )
    else:
        texts, right = [_as_if(row, other) for other in drawn], (right_answer(row),)
    return [text for text in dict.fromkeys(texts) if text not in right]


def _as_if(row: DatasetRow, other: DatasetRow) -> str:
    if not row.given_fields or set(row.gold or {}) != set(other.gold or {}):
        return right_answer(other)
    kept = {name: (row.gold or {})[name] for name in row.given_fields}
    tree = {name: kept.get(name, value) for name, value in (other.gold or {}).items()}
    return right_answer(DatasetRow(other.id, (Message("user", "?"),), gold=tree))


def _shared_leaves(text: str, row: DatasetRow) -> int:
    words = set(tokens(text))
    return sum(words.issuperset(tokens(leaf)) for leaf in leaves(dict(row.gold or {})))


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
        return {arm.name: {row.id: self._check_answer(arm.name, row) for row in self.rows} for arm in self.spec.arms}

    @cached_property
    def failures(self) -> tuple[WrongAnswer, ...]:
        """The answers to be probed, arm by arm. Failed requests are not: they say nothing of the model."""
        probed = self.probes.arms or tuple(self._by_name)
        return tuple(failure for name in probed for failure in self._sample(self._by_name[name]))

    def first_requests(self) -> list[EvalRequest]:
        """Gold passage, grammar, and the base before the adapter."""
        return [job for failure in self.failures for job in self._first_requests(failure)]

    def followup_requests(self, found: AnswerSet) -> list[EvalRequest]:
        """Likelihoods without context, where they decide, and for the reference's missing facts."""
        return [
            job
            for failure in self.failures
            if self._needs_likelihood(failure, found)
            for job in [self._likelihoods(failure)]
            if job.continuations[1:]
        ]

    def evidence(self, failure: WrongAnswer, found: AnswerSet) -> ProbeEvidence:
        """Return the evidence about one failure."""
        arm, row = failure.arm, failure.row
        return ProbeEvidence(
            form_right=failure.right.form,
            value_right=failure.right.value,
            retrieves=arm.retriever is not None,
            gold_retrieved=self._gold_retrieved(failure),
            oracle_right=self._value_of(f"{arm.name}~oracle", row, found),
            grammar_right=self._under_grammar(failure, found),
            closed_book=_prefers_first(found.find(f"{arm.name}~closed", row.id)),
            right_before=self._right_before_adapter(failure, found),
        )

    def _check_answer(self, arm: str, row: DatasetRow) -> Correctness:
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

    def _first_requests(self, failure: WrongAnswer) -> Iterator[EvalRequest]:
        arm, row, right = failure.arm, failure.row, failure.right
        alone = arm.with_({"retriever": None})
        if not right.value and (context := self._gold_context(failure)):
            yield self._job(f"{arm.name}~oracle", alone, row, context)
        if right.form is False and self.spec.answer_schema and arm.grammar is None and not self._repairs(failure):
            strict = GrammarSpec(json_schema=self.spec.answer_schema).model_dump(mode="json", exclude_none=True)
            context = None if right.value else self._gold_context(failure)
            base = alone if context else arm
            yield self._job(f"{arm.name}~grammar", base.with_({"grammar": strict}), row, context or question(row))
        if not right.value and arm.adapter and not arm.retriever and not self._arms_without_adapter(arm):
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
        arm, version = arm_of_row(arm, row), self._versions.get(arm.name) if arm.adapter else None
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

    def _gold_retrieved(self, failure: WrongAnswer) -> bool | None:
        if failure.arm.retriever is None or failure.row.doc_id is None:
            return None
        passage = self._passages.find(failure.row)
        wanted = {failure.row.doc_id, passage.id if passage else failure.row.doc_id}
        return any(
            found in wanted or document_of(found) == failure.row.doc_id for found in failure.answer.retrieved_ids
        )

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

    def _arms_without_adapter(self, arm: ArmSpec) -> list[str]:
        """Arms of the comparison that are this one without its adapter."""
        return [other.name for other in self.spec.arms if other.adapter is None and other.retriever == arm.retriever]

    def _right_before_adapter(self, failure: WrongAnswer, found: AnswerSet) -> bool | None:
        if failure.arm.adapter is None:
            return None
        twins = self._arms_without_adapter(failure.arm)
        if twins:
            return any(self.rights[name][failure.row.id].value for name in twins)
        return self._value_of(f"{failure.arm.name}~before", failure.row, found)


def _prefers_first(answer: EvalAnswer | None) -> bool | None:
    """Return whether the first text is likelier than every other, per token: answers differ in length."""
    if answer is None or not answer.logprobs:
        return None
    first, *others = (logprob / max(1, tokens) for logprob, tokens in answer.logprobs)
    return first > max(others)
