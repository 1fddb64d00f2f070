"""Questions with known gold passages, which `graftwork rag eval` asks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graftwork.datasets.keys import QUESTION, KeyCheck
from graftwork.datasets.readers import no_rows, read_records, require_new
from graftwork.errors import DataError
from graftwork.retrieval import Hit, Retriever
from graftwork.retrieval.corpus import document_of

MRR_DEPTH = 10


@dataclass(frozen=True, slots=True)
class Question:
    """One question: its gold passages or documents, and the texts that answer it."""

    id: str
    text: str
    gold_ids: frozenset[str]
    answers: tuple[str, ...]
    """Right answers, one of which is enough."""
    facts: tuple[str, ...] = ()
    """Values of a gold object that the question does not give away: all are needed."""

    def rank(self, hits: Sequence[Hit]) -> int | None:
        """1-based rank of the first gold passage; of a gold document any passage is one."""
        for rank, hit in enumerate(hits, start=1):
            if hit.passage.id in self.gold_ids or document_of(hit.passage.id) in self.gold_ids:
                return rank
        return None

    def answered_by(self, hits: Sequence[Hit]) -> bool:
        """Return whether the passages contain the answer."""
        read = _plain(" ".join(hit.passage.text for hit in hits))
        return (
            all(_plain(fact) in read for fact in self.facts)
            if self.facts
            else any(_plain(answer) in read for answer in self.answers)
        )


def question_keys() -> KeyCheck:
    """The count of the keys of questions: only the last user turn is searched for, so none is rejected."""
    return KeyCheck(QUESTION, prompt=False, loss=False)


def read_questions(uri: str, limit: int | None = None, keys: KeyCheck | None = None) -> list[Question]:
    """Read questions in order. keys: counts the keys that are not read (default: `question_keys()`).

    Raises DataError that names the 1-based row and the field.
    """
    keys = keys or question_keys()
    found: list[Question] = []
    seen: dict[str, int] = {}
    for number, record in read_records(uri):
        keys.check(record, f"{uri} row {number}")
        question = _question(record, f"{uri} row {number}", str(number))
        require_new(question.id, number, seen, uri, rule="retrievers are compared question by question")
        found.append(question)
        if len(found) == limit:
            break
    if not found:
        raise no_rows(uri, "retrievers are measured on questions")
    return found


def require_gold(questions: Sequence[Question], retriever: Retriever, documents: frozenset[str], index: str) -> None:
    """Raise DataError for questions whose gold passage the index has not: it was made from another corpus."""
    lost = [q for q in questions if not any(g in documents or retriever.get(g) for g in q.gold_ids)]
    if lost:
        gold = ", ".join(sorted(lost[0].gold_ids))
        raise DataError(
            f"question {lost[0].id}: doc_id {gold!r}",
            f"{index} has no such passage; so it is for {len(lost)} of {len(questions)} questions",
            "questions are asked of the corpus that they were made for",
            "index that corpus, or take its questions",
        )


def _question(record: dict[str, Any], where: str, default_id: str) -> Question:
    text = _text(record)
    if text is None:
        raise DataError(
            f"{where}: question",
            "the field is missing or empty",
            "a row has `question`, `prompt` or `messages` with a user turn",
            "add the field",
        )
    doc_id = record.get("doc_id")
    gold = doc_id if isinstance(doc_id, list) else [] if doc_id is None else [doc_id]
    if not gold or not all(isinstance(one, str | int) and not isinstance(one, bool) for one in gold):
        raise DataError(
            f"{where}: doc_id",
            "the field is missing" if doc_id is None else f"found {doc_id!r}",
            "a question names its gold passage, or a list of them",
            "add doc_id",
        )
    answers, facts = record.get("answers", []), record.get("gold", {})
    if not isinstance(answers, list) or not all(isinstance(one, str) and one.strip() for one in answers):
        raise DataError(f"{where}: answers", f"found {answers!r}"[:200], "answers is a list of texts")
    if not isinstance(facts, dict):
        raise DataError(f"{where}: gold", f"found {facts!r}"[:200], "gold is the right answer as a JSON object")
    hidden = [str(value) for key, value in facts.items() if key not in _as_list(record.get("given_fields"))]
    identity = frozenset(str(one) for one in gold)
    return Question(str(record.get("id", default_id)), text, identity, tuple(answers), tuple(hidden))


def _text(record: dict[str, Any]) -> str | None:
    turns = record.get("messages")
    said = (
        [turn.get("content") for turn in turns if isinstance(turn, dict) and turn.get("role") == "user"]
        if (isinstance(turns, list))
        else []
    )
    found = record.get("question") or record.get("prompt") or (said[-1] if said else None)
    return found if isinstance(found, str) and found.strip() else None


def _as_list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
