"""Builder of the `DecisionCard` from the evidence of all failures: the same bytes for the same answers."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from graftwork.artifacts.manifest import AdapterManifest
from graftwork.datasets.rows import DatasetRow
from graftwork.errors import ConfigError
from graftwork.metrics import distribution
from graftwork.prompts.render import PromptSpec
from graftwork.report import format as words
from graftwork.report.schema import ArmCauses, ArmCost, ArmKind, CauseShare, DecisionCard, Lift, Remedy, Share
from graftwork.serving.evaluation.answers import AnswerSet, timed
from graftwork.serving.evaluation.compare import arm_kind
from graftwork.serving.evaluation.differences import ScoredArms
from graftwork.serving.evaluation.failures.classify import (
    CAUSES,
    Cause,
    ProbeEvidence,
    classify,
    n_to_settle,
    share,
    state,
)
from graftwork.serving.evaluation.failures.probe import Prober, WrongAnswer
from graftwork.serving.evaluation.spec import CompareSpec
from graftwork.serving.spec import ArmSpec

# Remedy from the shares of causes. Only shown shares count; the card names open ones with the questions they need.
#
# | shown to matter | remedy |
# |---|---|
# | nothing: few answers fail | neither |
# | form | grammar where that is enough, else finetune |
# | information | rag; prompt where the base knows it, and a better retriever where it has one that misses |
# | information and form | rag with a grammar where that is enough, else both (RAFT) |
# | use of context or distraction, whatever else | both (RAFT) |
# | forgetting alone | retrain: lower rank, other rows mixed in |
#
# What was measured has the last word: where another arm fixes more of the same failures, its kind is the advice.


Enough = Literal["yes", "no", "open"]

_STANDS_FOR: dict[Remedy, Remedy] = {"retriever": "rag", "retrain": "finetune"}
"""An arm that is another retriever, or another adapter, is an example of the plain remedy."""
_SAYS: dict[Remedy, str] = {
    "neither": "Neither is needed",
    "prompt": "Prompt first",
    "grammar": "Decode under a grammar",
    "rag": "RAG",
    "rag with a grammar": "RAG, decoded under a grammar",
    "retriever": "A better retriever",
    "finetune": "Finetune",
    "both": "Both: finetune with retrieved passages, distractors among them (RAFT-style)",
    "retrain": "Train another adapter: a lower rank, or other tasks' rows mixed in",
    "undecided": "Undecided",
}


@dataclass(frozen=True)
class Findings:
    """Facts that decide the remedy."""

    rare: bool
    """The failure rate itself is shown to be below the limit."""
    causes: Collection[str]
    """Those shown to matter."""
    grammar: Enough
    known: Enough
    """The base prefers the right answer without any context."""
    retrieves: bool
    """The reference has a retriever."""


def enough(found: Share | None) -> Enough:
    """Return whether the share is shown to be more than half."""
    if found is None:
        return "open"
    return "yes" if found.low > 0.5 else "no" if found.high <= 0.5 else "open"


def ask_for(found: Findings) -> Remedy:
    """Return the remedy that the causes ask for."""
    facts, form = {"information", "retrieval"} & set(found.causes), "form" in found.causes
    if found.rare:
        return "neither"
    if {"use_of_context", "distraction"} & set(found.causes):
        return "both"
    if facts and form:
        return "rag with a grammar" if found.grammar == "yes" else "both"
    if facts:
        return "retriever" if found.retrieves else "prompt" if found.known == "yes" else "rag"
    if form:
        return "grammar" if found.grammar == "yes" else "finetune"
    return "retrain" if "forgetting" in found.causes else "undecided"


def measured(asked: Remedy, lifts: Sequence[Lift]) -> tuple[Remedy, Lift | None, Lift | None]:
    """(remedy, the best arm over all failures, the best arm of the kind asked for). Lifts of the cause `all`."""
    of_all = [lift for lift in lifts if lift.cause == "all"]
    best = max(of_all, key=lambda lift: lift.share.value, default=None)
    example = _STANDS_FOR.get(asked, asked)
    own = max((lift for lift in of_all if lift.remedy == example), key=lambda lift: lift.share.value, default=None)
    if asked in ("neither", "undecided") or best is None or own is None or own.share.high >= best.share.low:
        return asked, best, own
    return best.remedy, best, own


def example_of(kind: ArmKind, *, grammar: bool) -> Remedy:
    """Remedy that an arm stands for when it fixes failures."""
    if kind == "prompt":
        return "grammar" if grammar else "prompt"
    if kind == "rag":
        return "rag with a grammar" if grammar else "rag"
    return "finetune" if kind == "finetune" else "both"


def sentence(
    reference: str, remedy: Remedy, asked: Remedy, causes: Sequence[CauseShare], best: Lift | None, own: Lift | None
) -> str:
    """The advice with its reasons, all of them measured."""
    shown = [cause for cause in causes if cause.state == "matters"]
    why = (
        _join([f"{spoken(cause.cause)} in {_percent(cause.share)}" for cause in shown]) or "no cause is shown to matter"
    )
    n = causes[0].share.n if causes else 0
    said = f"{_SAYS[remedy]}: of {n} probed failures of {reference}, {why}"
    if remedy != asked and own is not None:
        said += f". The causes alone ask for {_SAYS[asked].lower()}, but {own.arm} fixes only {_percent(own.share)}"
    if own is None and remedy not in ("neither", "undecided"):
        said += " (no other arm here does that)"
    if best is not None and best.share.count:
        said += f"; measured here, {best.arm} fixes {_percent(best.share)} of them"
    elif best is not None:
        said += "; no other arm here fixes any"
    return said + "."


def spoken(cause: str) -> str:
    """A cause as people say it."""
    return {
        "information": "missing information",
        "retrieval": "passages not found",
        "form": "wrong form",
        "unknown": "causes unknown",
    }.get(cause, cause.replace("_", " "))


def _percent(found: Share) -> str:
    return f"{words.percent(found.value)} {words.percents(found.low, found.high)}"


def _join(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + f" and {parts[-1]}" if len(parts) > 1 else "".join(parts)


@dataclass(frozen=True)
class AdapterFacts:
    """From the manifest of an arm's adapter."""

    size_bytes: int
    train_s: float | None


@dataclass(frozen=True)
class _Explained:
    failure: WrongAnswer
    evidence: ProbeEvidence
    causes: tuple[Cause, ...]


def make_card(
    prober: Prober, found: AnswerSet, adapters: Mapping[str, AdapterFacts], alone: AnswerSet | None = None
) -> DecisionCard:
    """found: the probes' answers. adapters: by arm name. alone: answers to `offline.alone_jobs`, what times are of."""
    explained = [
        _Explained(failure, evidence, classify(evidence))
        for failure in prober.failures
        for evidence in [prober.evidence(failure, found)]
    ]
    return _Card(prober, explained, alone or AnswerSet()).made(adapters)


def reference_arm(spec: CompareSpec, scored: ScoredArms, primary: str) -> str:
    """Whose failures the card is about where the spec names none: the best prompted base, else the baseline."""
    prompted = [arm.name for arm in spec.arms if arm_kind(arm) == "prompt"]
    asked = [name for name in prompted if spec.probes is None or not spec.probes.arms or name in spec.probes.arms]
    other = spec.probes.arms[0] if spec.probes and spec.probes.arms else spec.baseline
    return max(asked, key=lambda name: scored.mean(name, primary), default=other)


class _Card:
    def __init__(self, prober: Prober, explained: Sequence[_Explained], alone: AnswerSet) -> None:
        self.prober, self.explained, self.alone = prober, explained, alone
        self.spec, self.probes = prober.spec, prober.probes
        self.own = [one for one in explained if one.failure.arm.name == prober.reference]
        self.failed = self._failures(prober.reference)

    def made(self, adapters: Mapping[str, AdapterFacts]) -> DecisionCard:
        reference = next(arm for arm in self.spec.arms if arm.name == self.prober.reference)
        causes, lifts = self._causes(), self._lifts()
        grammar, known = self._grammar(), self._known()
        rate = self._share("failures", self.failed, len(self._answered_rows(self.prober.reference)) or 1)
        asked = ask_for(
            Findings(
                rare=state(rate, self.probes.min_share) == "dismissed",
                causes=[cause.cause for cause in causes if cause.state == "matters"],
                grammar=enough(grammar),
                known=enough(known),
                retrieves=reference.retriever is not None,
            )
        )
        remedy, best, of_kind = measured(asked, lifts)
        return DecisionCard(
            reference=self.prober.reference,
            n=len(self.prober.rows),
            failures=self.failed,
            probed=len(self.own),
            failure_rate=rate,
            min_share=self.probes.min_share,
            alpha=self.spec.alpha,
            causes=causes,
            grammar_is_enough=grammar,
            known=known,
            lifts=lifts,
            arms=tuple(self._arm(arm) for arm in self.spec.arms if arm.name in (self.probes.arms or (arm.name,))),
            costs=tuple(self._cost(arm, adapters.get(arm.name)) for arm in self.spec.arms),
            remedy=remedy,
            asked_for=asked,
            sentence=sentence(self.prober.reference, remedy, asked, causes, best, of_kind),
            open=(*self._no_split(), *(self._open(cause) for cause in causes if cause.state == "open")),
        )

    def _failures(self, arm: str) -> int:
        """Wrong answers; a failed request is none, for it says nothing of the model."""
        return sum(not self.prober.rights[arm][row].whole for row in self._answered_rows(arm))

    def _answered_rows(self, arm: str) -> list[str]:
        return [row.id for row in self.prober.rows if self.prober.answers.find(arm, row.id)]

    def _share(self, name: str, count: int, n: int, **recipe: object) -> Share:
        return share(name, count, n, self.spec.alpha, {"arm": self.prober.reference, **recipe, "seed": self.spec.seed})

    def _causes(self) -> tuple[CauseShare, ...]:
        """A share of each cause; without a form/facts split there is no share of `form` to speak of."""
        causes = [cause for cause in CAUSES if cause != "form" or self.prober.judge.splits]
        return tuple(self._cause(cause) for cause in causes) if self.own else ()

    def _cause(self, cause: Cause) -> CauseShare:
        found = self._share(cause, sum(cause in one.causes for one in self.own), len(self.own))
        settled = state(found, self.probes.min_share)
        more = self._more_questions(found) if settled == "open" else None
        return CauseShare(cause=cause, share=found, state=settled, more_questions=more)

    def _more_questions(self, found: Share) -> int | None:
        """None where these questions have as many failures, and they only need to be probed."""
        needed = n_to_settle(found.value, self.probes.min_share, self.spec.alpha)
        if needed is None or needed <= self.failed:
            return None
        n = len(self.prober.rows)
        return math.ceil(needed * n / self.failed) - n

    def _no_split(self) -> tuple[str, ...]:
        judge = self.prober.judge
        if judge.splits or judge.references is not None:  # containment asks for no form
            return ()
        return (
            f"{judge.primary} does not tell a wrong form from wrong facts: answers that are right and "
            "written otherwise than asked for count in the causes above. Add the scorer qa, or a json_schema or "
            "regex for the form.",
        )

    def _open(self, cause: CauseShare) -> str:
        said = f"Whether {spoken(cause.cause)} matters is undecided"
        if cause.more_questions is not None:
            return f"{said}: {cause.more_questions} more questions would tell."
        if self.failed > len(self.own):
            return f"{said}: probe more than {len(self.own)} of the {self.failed} failures (probes.max_failures)."
        return f"{said}: its share is too near to {self.probes.min_share:g}."

    def _grammar(self) -> Share | None:
        known = [one.evidence.grammar_right for one in self.own if one.evidence.grammar_right is not None]
        return self._share("grammar_is_enough", sum(known), len(known)) if known else None

    def _known(self) -> Share | None:
        known = [
            one.evidence.closed_book
            for one in self.own
            if "information" in one.causes and one.evidence.closed_book is not None
        ]
        return self._share("known", sum(known), len(known), distractors=self.probes.distractors) if known else None

    def _lifts(self) -> tuple[Lift, ...]:
        rows: dict[str, list[str]] = {"all": [one.failure.row.id for one in self.own]}
        for cause in CAUSES:
            rows[cause] = [one.failure.row.id for one in self.own if cause in one.causes]
        others = [arm for arm in self.spec.arms if arm.name != self.prober.reference]
        return tuple(self._lift_of(arm, cause, ids) for cause, ids in rows.items() if ids for arm in others)

    def _lift_of(self, arm: ArmSpec, cause: str, rows: Sequence[str]) -> Lift:
        mended = sum(self.prober.rights[arm.name][row].whole for row in rows)
        found = self._share(f"mended_{cause}", mended, len(rows), by=arm.name)
        remedy = example_of(arm_kind(arm), grammar=arm.grammar is not None)
        return Lift(arm=arm.name, kind=arm_kind(arm), remedy=remedy, cause=cause, share=found)

    def _arm(self, arm: ArmSpec) -> ArmCauses:
        own = [one for one in self.explained if one.failure.arm.name == arm.name]
        counts = {cause: sum(cause in one.causes for one in own) for cause in CAUSES}
        return ArmCauses(
            arm=arm.name,
            kind=arm_kind(arm),
            failures=self._failures(arm.name),
            probed=len(own),
            causes={cause: count for cause, count in counts.items() if count},
        )

    def _cost(self, arm: ArmSpec, facts: AdapterFacts | None) -> ArmCost:
        said = [answer for row in self.prober.rows if (answer := self.prober.answers.find(arm.name, row.id))]
        alone = timed(self.alone, arm.name)
        took = distribution((one.latency_ms for one in alone if one.latency_ms is not None), "ms")
        tokens = distribution(((one.prompt_tokens or 0) + (one.completion_tokens or 0) for one in said), "tokens")
        return ArmCost(
            arm=arm.name,
            kind=arm_kind(arm),
            latency_ms=took.p50 if took else None,
            tokens=tokens.mean if tokens else None,
            training_min=facts.train_s / 60 if facts and facts.train_s is not None else None,
            adapter_gib=facts.size_bytes / 2**30 if facts else None,
        )


# Inputs of the probes.


def probed_corpus(spec: CompareSpec, rows: Sequence[DatasetRow]) -> str | None:
    """Return the location of the gold passages. Raises ConfigError where rows name documents of no known corpus."""
    assert spec.probes is not None
    corpus = spec.probes.corpus or next((arm.retriever.corpus for arm in spec.arms if arm.retriever), None)
    if corpus is None and any(row.doc_id for row in rows):
        raise ConfigError(
            "probes.corpus",
            "no arm has a retriever, and the rows name documents (doc_id)",
            "the gold passage is looked up in a corpus",
            "name the corpus: probes: {corpus: PATH}",
        )
    return corpus


def prompt_of(arm: ArmSpec, manifest: AdapterManifest | None) -> PromptSpec:
    """The arm's prompt, else the one that its adapter was trained with."""
    return arm.prompt or (PromptSpec.model_validate(manifest.prompt) if manifest else PromptSpec())


def adapter_facts(manifest: AdapterManifest) -> AdapterFacts:
    size = sum(file.size_bytes for file in manifest.files.values())
    return AdapterFacts(size, manifest.metrics.get("train_s"))
