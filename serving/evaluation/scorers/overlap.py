"""Scorers `bleu`, `chrf` (by sacrebleu) and `rouge` (by its definition): overlap with the gold text."""

import importlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

from graftwork.config import Spec
from graftwork.errors import ConfigError
from graftwork.metrics import BLEU, CHRF, ROUGE_1, ROUGE_2, ROUGE_L
from graftwork.scoring import AnswerSchema, GoldText
from graftwork.serving.evaluation.scorers.protocol import ModelReply, ScoreFunction, Scorer

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
        """Return the scores of one answer; for bleu and chrf their mean is not the corpus score."""
        gold = GoldText(self.field)
        if self.kind == "rouge":
            return ScoreFunction(
                (ROUGE_1, ROUGE_2, ROUGE_L),
                lambda reply: _rouge(reply.text, gold.find_texts(reply.gold, reply.reference)),
                lambda row: gold.find_texts(row.gold, row.answer, row.id),
            )
        metric, sentence_score = BLEU if self.kind == "bleu" else CHRF, _sacrebleu(self.kind)

        def score(reply: ModelReply) -> dict[str, float]:
            right = list(gold.find_texts(reply.gold, reply.reference))
            return {metric.name: sentence_score(reply.text, right).score / 100}

        return ScoreFunction((metric,), score, lambda row: gold.find_texts(row.gold, row.answer, row.id))


def _rouge(text: str, right: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L as F1, best of the right texts, no stemming (Lin 2004)."""
    said, wanted = _words(text), [_words(one) for one in right]
    return {
        ROUGE_1.name: max(_grams_f1(said, words, 1) for words in wanted),
        ROUGE_2.name: max(_grams_f1(said, words, 2) for words in wanted),
        ROUGE_L.name: max(_f1(_longest_common(said, words), len(said), len(words)) for words in wanted),
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
