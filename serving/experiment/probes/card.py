"""Evidence of all failures -> `DecisionCard`. The same bytes for the same answers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graftwork.metrics import distribution
from graftwork.report.records import ArmCauses, ArmCost, CauseShare, DecisionCard, Lift, Share
from graftwork.serving.experiment.answers import AnswerSet
from graftwork.serving.experiment.compare import arm_kind
from graftwork.serving.experiment.offline import timed
from graftwork.serving.experiment.probes.advice import Findings, ask_for, enough, example_of, measured, sentence, spoken
from graftwork.serving.experiment.probes.ask import Prober, WrongAnswer
from graftwork.serving.experiment.probes.classify import CAUSES, Cause, ProbeEvidence, classify
from graftwork.serving.experiment.probes.shares import n_to_settle, share, state
from graftwork.serving.experiment.spec import CompareSpec
from graftwork.serving.experiment.verdict import ScoredArms
from graftwork.serving.spec import ArmSpec


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
        causes, lifts = self._causes(), self._lifts()
        grammar, known = self._grammar(), self._known()
        rate = self._share("failures", self.failed, len(self._answered(self.prober.reference)) or 1)
        asked = ask_for(
            Findings(
                rare=state(rate, self.probes.min_share) == "dismissed",
                causes=[cause.cause for cause in causes if cause.state == "matters"],
                grammar=enough(grammar), known=enough(known), retrieves=self._reference().retriever is not None,
            )
        )  # fmt: skip
        remedy, best, of_kind = measured(asked, lifts)
        return DecisionCard(
            reference=self.prober.reference, n=len(self.prober.rows), failures=self.failed, probed=len(self.own),
            failure_rate=rate, min_share=self.probes.min_share, alpha=self.spec.alpha, causes=causes,
            grammar_is_enough=grammar, known=known, lifts=lifts, arms=self._arms(),
            costs=tuple(self._cost(arm, adapters.get(arm.name)) for arm in self.spec.arms), remedy=remedy,
            asked_for=asked, sentence=sentence(self.prober.reference, remedy, asked, causes, best, of_kind),
            open=(*self._no_split(), *(self._open(cause) for cause in causes if cause.state == "open")),
        )  # fmt: skip

    def _reference(self) -> ArmSpec:
        return next(arm for arm in self.spec.arms if arm.name == self.prober.reference)

    def _failures(self, arm: str) -> int:
        """Wrong answers; a failed request is none, for it says nothing of the model."""
        return sum(not self.prober.rights[arm][row].whole for row in self._answered(arm))

    def _answered(self, arm: str) -> list[str]:
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
        return (f"{judge.primary} does not tell a wrong form from wrong facts: answers that are right and "
                "written otherwise than asked for count in the causes above. Add the scorer qa, or a json_schema or "
                "regex for the form.",)  # fmt: skip

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
        known = [one.evidence.closed_book for one in self.own
                 if "information" in one.causes and one.evidence.closed_book is not None]  # fmt: skip
        return self._share("known", sum(known), len(known), distractors=self.probes.distractors) if known else None

    def _lifts(self) -> tuple[Lift, ...]:
        rows: dict[str, list[str]] = {"all": [one.failure.row.id for one in self.own]}
        for cause in CAUSES:
            rows[cause] = [one.failure.row.id for one in self.own if cause in one.causes]
        others = [arm for arm in self.spec.arms if arm.name != self.prober.reference]
        return tuple(self._lift(arm, cause, ids) for cause, ids in rows.items() if ids for arm in others)

    def _lift(self, arm: ArmSpec, cause: str, rows: Sequence[str]) -> Lift:
        mended = sum(self.prober.rights[arm.name][row].whole for row in rows)
        found = self._share(f"mended_{cause}", mended, len(rows), by=arm.name)
        remedy = example_of(arm_kind(arm), grammar=arm.grammar is not None)
        return Lift(arm=arm.name, kind=arm_kind(arm), remedy=remedy, cause=cause, share=found)

    def _arms(self) -> tuple[ArmCauses, ...]:
        probed = self.probes.arms or tuple(arm.name for arm in self.spec.arms)
        return tuple(self._arm(arm) for arm in self.spec.arms if arm.name in probed)

    def _arm(self, arm: ArmSpec) -> ArmCauses:
        own = [one for one in self.explained if one.failure.arm.name == arm.name]
        counts = {cause: sum(cause in one.causes for one in own) for cause in CAUSES}
        return ArmCauses(arm=arm.name, kind=arm_kind(arm), failures=self._failures(arm.name), probed=len(own),
                         causes={cause: count for cause, count in counts.items() if count})  # fmt: skip

    def _cost(self, arm: ArmSpec, facts: AdapterFacts | None) -> ArmCost:
        said = [answer for row in self.prober.rows if (answer := self.prober.answers.find(arm.name, row.id))]
        alone = timed(self.alone, arm.name)
        took = distribution((one.latency_ms for one in alone if one.latency_ms is not None), "ms")
        tokens = distribution(((one.prompt_tokens or 0) + (one.completion_tokens or 0) for one in said), "tokens")
        return ArmCost(
            arm=arm.name, kind=arm_kind(arm), latency_ms=took.p50 if took else None,
            tokens=tokens.mean if tokens else None,
            training_min=facts.train_s / 60 if facts and facts.train_s is not None else None,
            adapter_gib=facts.size_bytes / 2**30 if facts else None,
        )  # fmt: skip
