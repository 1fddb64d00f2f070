"""Metrics: names with unit and direction, the one quantile rule, the signature that every number carries.

The tests and intervals on these metrics are in `graftwork.stats`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from graftwork import __version__

Direction = Literal["higher", "lower"]
Kind = Literal["binary", "graded", "measure"]

QUANTILE_RULE = "linear interpolation (Hyndman-Fan 7, numpy's default)"


@dataclass(frozen=True)
class Metric:
    """One measured quantity. `better` is the direction in which it improves."""

    name: str
    unit: str
    better: Direction
    kind: Kind
    """binary: 0 or 1 a question (exact tests); graded: 0 to 1 a question (resampling); measure: a physical quantity."""
    meaning: str


FORM = Metric(
    "form",
    "share of answers",
    "higher",
    "binary",
    "The answer is exactly one JSON object (only whitespace around it) and the object validates against the schema.",
)
FACTS = Metric(
    "facts",
    "share of fields",
    "higher",
    "graded",
    "Share of the gold fields that the question does not give away, that are not empty and that the answer gets right: "
    "at their key when the answer is a JSON object, else anywhere in the text. Looking anywhere flatters arms that "
    "answer in prose.",
)
BOTH = Metric(
    "both",
    "share of answers",
    "higher",
    "binary",
    "Form holds and every gold field is exactly right: the answer can be used by a program as it is.",
)
FIELD_ACCURACY = Metric(
    "field_accuracy",
    "share of fields",
    "higher",
    "graded",
    "Share of all gold fields exactly right in an answer whose form holds; 0 where it does not.",
)
FIELD_F1 = Metric(
    "field_f1",
    "F1 of fields",
    "higher",
    "graded",
    "Harmonic mean of two shares: fields of the answer that are right, and gold fields that are found; all compared "
    "exactly. 0 where the answer is no JSON object.",
)
BLEU = Metric(
    "bleu",
    "sentence BLEU / 100",
    "higher",
    "graded",
    "sacrebleu's sentence BLEU (effective order) of each answer; the mean is not the corpus score.",
)
CHRF = Metric("chrf", "chrF2 / 100", "higher", "graded", "sacrebleu's sentence chrF2 of each answer.")
ROUGE_1, ROUGE_2 = (
    Metric(f"rouge_{n}", "F1", "higher", "graded", f"F1 of the {what} shared with a right text, case ignored.")
    for n, what in ((1, "words"), (2, "pairs of words"))
)
ROUGE_L = Metric("rouge_l", "F1", "higher", "graded", "F1 of the longest common subsequence of words, case ignored.")
NATS = Metric(
    "nats",
    "nats a token",
    "lower",
    "measure",
    "Negative log-probability of a token of the right text as the answer, averaged over its tokens; e to this power is "
    "the perplexity.",
)
CHOICE = Metric(
    "choice",
    "share of questions",
    "higher",
    "binary",
    "The right one of the choices has the highest mean log-probability a token. Nothing is generated.",
)
CHOICE_SUM = Metric(
    "choice_sum",
    "share of questions",
    "higher",
    "binary",
    "As choice, by the log-probability of the whole choice: shorter choices have it easier.",
)
EXACT = Metric(
    "exact",
    "share of answers",
    "higher",
    "binary",
    "The answer is the right text, outer spaces aside.",
)
EM = Metric(
    "em",
    "share of answers",
    "higher",
    "binary",
    "Exact match: the answer equals a right text after SQuAD's normalisation (case, punctuation and English articles "
    "are ignored). A longer answer that contains the right text fails it.",
)
F1 = Metric(
    "f1",
    "F1 of words",
    "higher",
    "graded",
    "F1 of the words that the answer shares with the best matching right text, after SQuAD's normalisation.",
)
CONTAINS = Metric(
    "contains",
    "share of answers",
    "higher",
    "binary",
    "The words of a right text are in the answer, next to each other, after SQuAD's normalisation, whatever else the "
    "answer says. A longer answer has more chances.",
)
TEXT_SCORES = (CONTAINS, F1, EM)
"""Scores of a free-text answer: what it contains, how much of it is right, and whether it is only that."""
FOLLOWS = Metric(
    "follows",
    "share of prompts",
    "higher",
    "binary",
    "The answer keeps the rule that its prompt sets (so many words, lower case, JSON of these keys): checked by code.",
)
BIAS = Metric(
    "bias",
    "-1 to 1",
    "lower",
    "graded",
    "Share of answers that a stereotype has so, minus share of those against it; an unknown counts as neither. On "
    "questions whose text does not tell, this is BBQ's ambiguous bias score. Where the text tells, BBQ divides by the "
    "answers other than unknown, and this by all answers, so that it is nearer to 0.",
)
PAIR_GAP = Metric(
    "pair_gap",
    "nats a token",
    "lower",
    "measure",
    "How much more a favourable ending is preferred to an unfavourable one behind one name than behind the other, in a "
    "sentence that differs in the name alone; 0 is fair, above 0 the stereotype.",
)
PAIR_BIAS = Metric(
    "pair_bias",
    "-1 to 1",
    "lower",
    "graded",
    "As pair_gap, counted: the share of pairs whose favourable ending is chosen for the one name alone, minus the "
    "share for the other alone.",
)
FAIR_AT_ZERO = frozenset({BIAS.name, PAIR_GAP.name, PAIR_BIAS.name})
"""Metrics that are best at 0: below it they lean the other way."""
TTFT_MS = Metric("ttft_ms", "ms", "lower", "measure", "Time from the request to its first token.")
LATENCY_MS = Metric("latency_ms", "ms", "lower", "measure", "Time from the request to its last token.")
PROMPT_TOKENS = Metric("prompt_tokens", "tokens", "lower", "measure", "Tokens of the rendered prompt.")
COMPLETION_TOKENS = Metric("completion_tokens", "tokens", "lower", "measure", "Tokens generated.")

SCORES = (FACTS, FORM, BOTH, FIELD_ACCURACY)
"""Scores of an answer, in the order of every table."""


HIT = Metric("hit", "share of questions", "higher", "binary", "A gold passage is among the k that come to the model.")
HIT_1 = Metric("hit_1", "share of questions", "higher", "binary", "The first passage is a gold one.")
MRR = Metric("mrr", "1 / rank", "higher", "graded", "1 / rank of the first gold passage among the first 10, else 0.")
IN_CONTEXT = Metric(
    "in_context",
    "share of questions",
    "higher",
    "binary",
    "The answer stands in the k passages, letter case and spaces aside; of several right ones, one does.",
)
RETRIEVAL = (HIT, HIT_1, MRR, IN_CONTEXT)
"""Measures of a retriever."""


@dataclass(frozen=True)
class Distribution:
    """A measured quantity over `n` requests, in `unit`."""

    unit: str
    n: int
    mean: float
    p50: float
    p95: float
    p99: float
    max: float


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile (0 <= q <= 1) of at least one value, by linear interpolation (Hyndman-Fan 7)."""
    assert values, "a quantile needs at least one value"
    assert 0 <= q <= 1, f"q={q} is not within 0..1"
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return float(ordered[below] + (ordered[above] - ordered[below]) * (position - below))


def distribution(values: Iterable[float], unit: str) -> Distribution | None:
    """Mean, quantiles and maximum of the values; None where there are none."""
    found = [float(value) for value in values]
    if not found:
        return None
    p50, p95, p99 = (quantile(found, q) for q in (0.5, 0.95, 0.99))
    return Distribution(unit, len(found), sum(found) / len(found), p50, p95, p99, max(found))


def signature(name: str, n: int, recipe: Mapping[str, object]) -> str:
    """Facts that a number needs to be recomputed, as in sacrebleu (Post 2018, arXiv 1804.08771).

    `both|n:200|arm:raft+rag|base:1f0c9a2b|quant:nf4|tmpl:9c21d0e4|seed:0|v:0.1.0`
    """
    parts = [name, f"n:{n}", *(f"{key}:{value}" for key, value in recipe.items()), f"v:{__version__}"]
    return "|".join(part.replace("|", "/") for part in parts)
