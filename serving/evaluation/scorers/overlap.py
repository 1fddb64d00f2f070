"""Scorers `bleu`, `chrf` (by sacrebleu) and `rouge` (by its definition): overlap with the gold text."""

import importlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

from graftwork.config import Spec
from graftwork.datasets.rows import DatasetRow
from graftwork.errors import ConfigError
from graftwork.metrics import BLEU, CHRF, ROUGE_1, ROUGE_2, ROUGE_L
from graftwork.scoring import AnswerSchema, GoldText
from graftwork.serving.evaluation.scorers.protocol import ModelReply, Scorer

_WORD = re.compile(r"[^\W_]+")


class OverlapSpec(Spec):
    """Likeness to the gold text. bleu and chrf need `pip install 'sacrebleu>=2.6,<3'`."""

    kind: Literal["bleu", "chrf", "rouge"]
    needs_gold: ClassVar[bool] = True
    field: str | None = None
    """As for exact."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        return ("rouge_1", "rouge_2", "rouge_l") if self.kind == "rouge" else (self.kind,)

    def build(self, schema: AnswerSchema | None) -> Scorer:
        """Return the scorer of this key."""
        return RougeScorer(self) if self.kind == "rouge" else OverlapScorer(self, self.kind)


class OverlapScorer:
    """BLEU or chrF of each answer by itself; their mean is not the corpus score."""

    def __init__(self, spec: OverlapSpec, kind: Literal["bleu", "chrf"]) -> None:
        self._gold, self._score = GoldText(spec.field), _sacrebleu(kind)
        self.metrics = (BLEU if kind == "bleu" else CHRF,)

    def check(self, row: DatasetRow) -> None:
        self._gold.find_texts(row.gold, row.answer, row.id)

    def score(self, reply: ModelReply) -> dict[str, float]:
        right = list(self._gold.find_texts(reply.gold, reply.reference))
        return {self.metrics[0].name: self._score(reply.text, right).score / 100}


class RougeScorer:
    """ROUGE-1, ROUGE-2 and ROUGE-L as F1, best of the right texts, no stemming (Lin 2004)."""

    metrics = (ROUGE_1, ROUGE_2, ROUGE_L)

    def __init__(self, spec: OverlapSpec) -> None:
        self._gold = GoldText(spec.field)

    def check(self, row: DatasetRow) -> None:
        self._gold.find_texts(row.gold, row.answer, row.id)

    def score(self, reply: ModelReply) -> dict[str, float]:
        said = _words(reply.text)
        right = [_words(text) for text in self._gold.find_texts(reply.gold, reply.reference)]
        return {
            ROUGE_1.name: max(_grams_f1(said, text, 1) for text in right),
            ROUGE_2.name: max(_grams_f1(said, text, 2) for text in right),
            ROUGE_L.name: max(_f1(_longest_common(said, text), len(said), len(text)) for text in right),
        }


def _sacrebleu(kind: Literal["bleu", "chrf"]) -> Callable[[str, list[str]], Any]:
    try:
        library = importlib.import_module("sacrebleu.metrics")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"scorers: kind={kind!r}",
            "sacrebleu is not installed",
            "BLEU and chrF are sacrebleu's",
            "pip install 'sacrebleu>=2.6,<3'",
        ) from error
    score: Callable[[str, list[str]], Any] = (
        library.BLEU(effective_order=True).sentence_score if kind == "bleu" else library.CHRF().sentence_score
    )
    return score


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _grams_f1(a: Sequence[str], b: Sequence[str], size: int) -> float:
    grams_a, grams_b = (Counter(zip(*(side[i:] for i in range(size)), strict=False)) for side in (a, b))
    return _f1((grams_a & grams_b).total(), grams_a.total(), grams_b.total())


def _f1(shared: int, of_a: int, of_b: int) -> float:
    return 2 * shared / (of_a + of_b) if shared else 0.0


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for j, other in enumerate(b, start=1):
            before, row[j] = row[j], before + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]
