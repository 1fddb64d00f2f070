"""Schema of `report.json`: frozen records of the comparison, the decision card, training and serving.

Times are in seconds (`_s`) or milliseconds (`_ms`), memory in bytes, losses in nats per token.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from graftwork.metrics import Distribution


class Record(BaseModel):
    """Base of every record: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), ser_json_inf_nan="strings")


Verdict = Literal["better", "worse", "equivalent", "undecided"]
ArmKind = Literal["prompt", "rag", "finetune", "both"]


# The comparison.


class Score(Record):
    """One metric of one arm, with its interval."""

    metric: str
    value: float
    low: float
    high: float
    level: float
    method: str
    """`wilson` for shares of answers, `bca` for graded metrics and measures, `cluster-bca` for clustered questions."""
    n: int
    signature: str


class ArmReport(Record):
    """One arm over all questions."""

    name: str
    kind: ArmKind
    """prompt: base only; rag: base with a retriever; finetune: an adapter; both: an adapter with a retriever."""
    adapter: str | None
    adapter_version: str | None
    retriever: str | None
    shots: int
    n: int
    errors: int
    """Requests that failed; each counts as a wrong answer."""
    not_json: int | None
    """Answers that are not one JSON object; each counts as a wrong form. None: no scorer wants an object."""
    truncated: int
    """Answers cut by `max_new_tokens`."""
    scores: dict[str, Score]
    """By metric; one that no answer had (a time of an arm that always failed) is absent."""
    prompt_tokens: Distribution | None
    completion_tokens: Distribution | None
    ttft_ms: Distribution | None
    """Of the arm alone with one request in flight, over the few questions of its `n`; None: no scorer needs times."""
    latency_ms: Distribution | None
    """As `ttft_ms`."""


class Difference(Record):
    """Arm `a` minus arm `b` on one metric, paired by question."""

    a: str
    b: str
    metric: str
    n: int
    value: float
    low: float
    high: float
    level: float
    interval: str
    """`newcombe-10` for shares of answers, `bca` for graded metrics and measures, `cluster-bca` for clusters."""
    test: str
    """`mcnemar-exact` for shares of answers, `sign-flip` for graded ones, `cluster-sign-flip` for clusters."""
    p_value: float
    p_adjusted: float
    """After the adjustment over the `family` tests made together."""
    family: int
    adjust: Literal["holm", "bh"] = "holm"
    """bh (Benjamini-Hochberg) in slices, which explore; holm in everything declared."""
    wins: int
    """Questions on which `a` scored higher."""
    losses: int
    ties: int
    verdict: Verdict
    """On `a` against `b`."""
    mde: float
    """Smallest true difference that n questions find with 80% power at alpha / family."""
    n_needed: int | None
    """Questions that would find the seen difference, or show it to be within the margin, with 80% power. None when
    decided."""
    signature: str


class MetricAdvice(Record):
    """Arms that win one metric: the best, and all that are not shown to be worse."""

    metric: str
    best: str
    tied: tuple[str, ...]
    """`best` and every arm whose deficit is not significant (Holm over all pairs of arms)."""
    groups: tuple[tuple[str, ...], ...]
    """In place of a ranking: the largest sets of arms that the tests do not tell apart, best mean first."""
    winner: Literal["prompting", "retrieval", "finetuning", "finetuning with retrieval"] | None
    """The ingredient that all tied arms share and no other has; None when undecided."""
    sentence: str


class Advice(Record):
    """Prompt, RAG, finetune or both: derived from the tests, and honest when they do not decide."""

    sentence: str
    """The verdict in one sentence."""
    caveats: tuple[str, ...]
    """Questions that the tests leave open, one sentence each."""
    metrics: tuple[MetricAdvice, ...]


class SampleAnswer(Record):
    """Answer of one arm to a sample question."""

    arm: str
    text: str
    error: str | None
    scores: dict[str, float]
    """By metric, measures left out."""
    retrieved_ids: tuple[str, ...]


class Sample(Record):
    """One question, drawn at random by the seed, and every arm's answer."""

    row_id: str
    question: str
    gold: dict[str, Any]
    answers: tuple[SampleAnswer, ...]


class MetricInfo(Record):
    """A line of the glossary."""

    name: str
    unit: str
    better: str
    kind: Literal["binary", "graded", "measure"]
    meaning: str


class Slice(Record):
    """The questions that share a field's value: what was looked at, not what was claimed."""

    field: str
    value: str
    n: int
    scores: dict[str, Score]
    """Arm -> the primary metric."""
    differences: tuple[Difference, ...]
    """Every arm against the baseline on the primary metric; BH over all slices of the report."""


# The decision card.

Remedy = Literal[
    "neither", "prompt", "grammar", "rag", "rag with a grammar", "retriever", "finetune", "both", "retrain", "undecided"
]
"""both: an adapter trained with retrieved passages, distractors among them (RAFT). retriever: a better one. retrain: at
a lower rank, or with other rows mixed in."""


class Share(Record):
    """A share of answers with its Wilson interval."""

    count: int
    n: int
    value: float
    low: float
    high: float
    signature: str


class CauseShare(Record):
    """Count of the reference's probed failures with one cause. A wrong value in a wrong form counts in two."""

    cause: str
    share: Share
    state: Literal["matters", "dismissed", "open"]
    """Shown to be above `min_share`, shown to be below it, or neither."""
    more_questions: int | None
    """Further questions that would settle an open one at the share seen; None where it is settled, or where more
    failures of these questions only have to be probed."""


class Lift(Record):
    """Of the reference's failures with one cause, the share that another arm answers wholly right."""

    arm: str
    kind: ArmKind
    remedy: Remedy
    """Remedy that the arm is an example of."""
    cause: str
    """`all`: any."""
    share: Share


class ArmCauses(Record):
    """One arm's failures by cause."""

    arm: str
    kind: ArmKind
    failures: int
    probed: int
    causes: dict[str, int]


class ArmCost(Record):
    """Cost of an arm."""

    arm: str
    kind: ArmKind
    latency_ms: float | None
    """Median of the arm alone, one request in flight; None: not measured."""
    tokens: float | None
    """Of prompt and answer, mean."""
    training_min: float | None
    """Steps of the run that made its adapter; None: no adapter, or not recorded."""
    adapter_gib: float | None


class DecisionCard(Record):
    """Causes of the reference's failures, arms that fix them, remedy: prompt, RAG, finetune, both, or a grammar."""

    reference: str
    n: int
    """Questions."""
    failures: int
    """Wrong answers of the reference; failed requests are not among them."""
    probed: int
    failure_rate: Share
    min_share: float
    """The share of the failures from which on a cause counts."""
    alpha: float
    causes: tuple[CauseShare, ...]
    grammar_is_enough: Share | None
    """Of its answers of wrong form, those that a repaired text or a grammar makes wholly right (with the gold passage
    where the value was wrong)."""
    known: Share | None
    """Of its answers that lack information, those whose right answer it prefers to every distractor without context."""
    lifts: tuple[Lift, ...]
    arms: tuple[ArmCauses, ...]
    costs: tuple[ArmCost, ...]
    remedy: Remedy
    asked_for: Remedy
    """Remedy by the causes alone; `remedy` differs where an arm that was measured does better."""
    sentence: str
    open: tuple[str, ...]
    """Open points, and the questions that they need."""


class JudgedArm(Record):
    """Preferences of the judge between one arm's answers and the baseline's."""

    arm: str
    kind: ArmKind
    wins: int
    """Questions on which it was preferred in both orders."""
    losses: int
    ties: int
    """The same text, or another preference when the order was swapped."""
    preferred: float
    """Wins and half of the ties."""
    strength: float
    """Log strength (Bradley-Terry with ties, Davidson), the baseline's taken away."""
    low: float
    high: float
    signature: str


class JudgeReport(Record):
    """An LLM judge's preferences, and how far it can be believed. No part of the verdict."""

    judge: str
    baseline: str
    questions: int
    asked: int
    """Judgements: two orders for each pair of different answers."""
    failed: int
    agreement: Share | None
    """Pairs on which both orders gave the same answer. A coin agrees on half of them."""
    first: Share | None
    """Judgements for the answer that stood first; 1/2 without position bias, for each pair was asked in both orders."""
    sides_with_gold: Share | None
    """Of its decided pairs on which the primary metric differs, those where it prefers the better answer."""
    arms: tuple[JudgedArm, ...]


class CompareReport(Record):
    """The result of `compare`: byte-identical JSON for the same answers and seed."""

    name: str
    baseline: str
    n: int
    alpha: float
    equivalence_margin: float
    seed: int
    base_digest: str | None
    data_fingerprint: str
    primary: str
    """The metric that the verdict is about."""
    cluster: str | None
    """The field whose equal values make questions depend on each other; null: all are independent."""
    clusters: int | None
    metrics: tuple[MetricInfo, ...]
    arms: tuple[ArmReport, ...]
    differences: tuple[Difference, ...]
    """Every arm against the baseline, for each metric."""
    contrasts: tuple[Difference, ...]
    """The contrasts that the spec declared."""
    slices: tuple[Slice, ...]
    card: DecisionCard | None
    """Present if the spec asks for probes."""
    judge: JudgeReport | None
    """Present if the spec names a judge."""
    advice: Advice
    samples: tuple[Sample, ...]
    notes: tuple[str, ...]


# Training.


class StepSeries(Record):
    """A figure of a kind's own, by optimizer step."""

    name: str
    points: tuple[tuple[int, float], ...]


class TrainRun(Record):
    """One training run and the adapter it published."""

    name: str
    adapter: str | None = None
    loss: tuple[tuple[int, float], ...]
    eval_loss: tuple[tuple[int, float], ...] = ()
    rows: int
    dropped_rows: int = 0
    """Training rows longer than `max_length`."""
    eval_rows: int = 0
    dropped_eval_rows: int = 0
    """Held-out rows longer than `max_length`."""
    tokens: int
    tokens_per_s: float
    wall_s: float
    peak_memory_bytes: tuple[int, ...]
    """Highest resident memory of each worker."""
    method: str = ""
    """Short, e.g. `LoRA r16 on nf4, lr 2e-3`."""
    workers: int = 1
    reused: bool = False
    series: tuple[StepSeries, ...] = ()
    notes: tuple[str, ...] = ()


class PlanRow(Record):
    """Predicted and actual cost of a stage. None: not predicted, or not measured."""

    stage: str
    predicted_bytes: int | None = None
    actual_bytes: int | None = None
    predicted_s: float | None = None
    actual_s: float | None = None


class StageTime(Record):
    """Wall time of one stage of the job."""

    stage: str
    wall_s: float
    reused: bool = False
    found: str = ""
    """The stage's one line."""


# Serving.


class AdapterLatency(Record):
    """Requests to one adapter, or to the base."""

    name: str
    version: str | None = None
    n: int
    failed: int = 0
    ttft_ms: Distribution | None
    latency_ms: Distribution | None
    tokens_per_s: float | None = None
    """Generated tokens of all its requests over the time in which they ran."""


class SwapRecord(Record):
    """A new adapter version published under live traffic."""

    alias: str
    old_version: str
    new_version: str
    requests: int
    failed: int
    answers_by_version: dict[str, int]
    swap_ms: float
    """From the request to swap until the first request was admitted on the new version."""


class ServingRecord(Record):
    """Activity of the endpoint during the job."""

    latency: tuple[AdapterLatency, ...] = ()
    swap: SwapRecord | None = None
    max_adapters_in_batch: int | None = None
    """Most different adapters (base included) seen in one decoding step."""
    note: str = ""
