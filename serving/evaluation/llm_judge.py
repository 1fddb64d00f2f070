"""LLM judge: compares each arm's answers with the baseline's in both orders and reports its position bias.

A pair counts as won only where both orders say so. The served base judges by which of the letters A and B it finds
likelier; a model behind another endpoint by the letter that it writes. Answers are data in the judge's prompt and may
try to persuade it: its word is no part of the verdict.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from graftwork import stats
from graftwork.artifacts.manifest import AdapterManifest
from graftwork.datasets.rows import DatasetRow
from graftwork.errors import RunError
from graftwork.metrics import signature
from graftwork.report.schema import JudgedArm, JudgeReport, Share
from graftwork.serving.api.auth import own_token
from graftwork.serving.evaluation.answers import AnswerSet, EvalAnswer, EvalRequest, Messages, answer_key, question
from graftwork.serving.evaluation.compare import arm_kind
from graftwork.serving.evaluation.differences import ScoredArms
from graftwork.serving.evaluation.failures.classify import share
from graftwork.serving.evaluation.spec import CompareSpec, JudgeSpec
from graftwork.serving.spec import ArmSpec
from graftwork.stats import Preference
from graftwork.stats.preference import Outcome

Side = Literal["first", "second"]
ORDERS = ("ab", "ba")

_LETTER = re.compile(r"\b([AB])\b")
_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class AnswerPair:
    """One question with two different answers: an arm's and the baseline's."""

    row: DatasetRow
    arm: str
    text: str
    baseline_text: str


class JudgeRun:
    """The judge's questions and what its answers say. Runs in the driver."""

    def __init__(
        self,
        spec: CompareSpec,
        judge: JudgeSpec,
        rows: Sequence[DatasetRow],
        answers: AnswerSet,
        manifest: AdapterManifest | None = None,
    ) -> None:
        """manifest: what the judge's adapter resolves to."""
        self.spec, self.judge, self.answers = spec, judge, answers
        self.rows = rows[: judge.limit]
        self._version = f"{judge.url} {judge.model}" if judge.url else manifest.version if manifest else None
        self.arm = ArmSpec(name="graftwork.judge", adapter=manifest.ref if manifest else None, max_new_tokens=8)

    @property
    def name(self) -> str:
        """Name of the judge."""
        return self.judge.model or self.judge.adapter or "the served base"

    def jobs(self) -> list[EvalRequest]:
        """Two for each pair of different answers."""
        return [self._job(pair, order) for pair in self._pairs() for order in ORDERS]

    def report(self, found: AnswerSet, scored: ScoredArms, primary: str) -> JudgeReport:
        """found: the judge's answers."""
        sides_of = {(pair.arm, pair.row.id): self._find_sides(pair, found) for pair in self._pairs()}
        sides = [side for two in sides_of.values() for side in two if side]
        both = [two for two in sides_of.values() if None not in two]
        agreed = sum(first != second for first, second in both)  # the same answer stands in the other place
        outcomes = {pair: _outcome(two) for pair, two in sides_of.items()}
        return JudgeReport(
            judge=self.name,
            baseline=self.spec.baseline,
            questions=len(self.rows),
            asked=2 * len(sides_of),
            failed=2 * len(sides_of) - len(sides),
            agreement=self._share("agreement", agreed, len(both)),
            first=self._share("first", sides.count("first"), len(sides)),
            sides_with_gold=self._with_gold(outcomes, scored, primary),
            arms=self._arms(outcomes),
        )

    def _others(self) -> list[ArmSpec]:
        return [arm for arm in self.spec.arms if arm.name != self.spec.baseline]

    def _pairs(self) -> Iterator[AnswerPair]:
        for row in self.rows:
            base = self.answers.find(self.spec.baseline, row.id)
            for arm in self._others():
                own = self.answers.find(arm.name, row.id)
                if base and own and own.text.strip() != base.text.strip():
                    yield AnswerPair(row, arm.name, own.text, base.text)

    def _job(self, pair: AnswerPair, order: str) -> EvalRequest:
        texts = (pair.text, pair.baseline_text) if order == "ab" else (pair.baseline_text, pair.text)
        messages = _put(pair.row, texts, self.judge.criteria)
        label, letters = f"{pair.arm}~judge-{order}", () if self.judge.url else ("A", "B")
        key = answer_key(self.spec, label, self.arm, pair.row, self._version, messages=messages, continuations=letters)
        return EvalRequest(key, label, pair.row.id, self.arm, messages, letters)

    def _find_sides(self, pair: AnswerPair, found: AnswerSet) -> tuple[Side | None, Side | None]:
        ab, ba = (_judge_side(found.find(f"{pair.arm}~judge-{order}", pair.row.id)) for order in ORDERS)
        return ab, ba

    def _share(self, name: str, count: int, n: int) -> Share | None:
        recipe = {"judge": self.name.replace(" ", "-"), "vs": self.spec.baseline, "seed": self.spec.seed}
        return share(f"judge_{name}", count, n, self.spec.alpha, recipe) if n else None

    def _with_gold(self, outcomes: Mapping[tuple[str, str], Outcome], scored: ScoredArms, primary: str) -> Share | None:
        place = {row.id: index for index, row in enumerate(self.rows)}
        agreed, total = 0, 0
        for (arm, row), outcome in outcomes.items():
            gain = (scored.values[arm][primary] - scored.values[self.spec.baseline][primary])[place[row]]
            if gain != 0 and outcome != "tie":
                total += 1
                agreed += (gain > 0) == (outcome == "a")
        return self._share("sides_with_gold", agreed, total)

    def _arms(self, outcomes: Mapping[tuple[str, str], Outcome]) -> tuple[JudgedArm, ...]:
        """The same text and a failed judgement are ties."""
        table: dict[str, list[Outcome]] = {
            arm.name: [outcomes.get((arm.name, row.id), "tie") for row in self.rows] for arm in self._others()
        }
        preferences = [
            Preference(row.id, arm, self.spec.baseline, outcome)
            for arm, outcomes in table.items()
            for row, outcome in zip(self.rows, outcomes, strict=True)
        ]
        strengths = stats.bradley_terry(preferences, self.spec.alpha, seed=self.spec.seed)
        base = strengths[self.spec.baseline].value
        recipe = {
            "judge": self.name.replace(" ", "-"),
            "vs": self.spec.baseline,
            "model": "davidson",
            "ci": "bootstrap",
            "seed": self.spec.seed,
        }
        return tuple(
            JudgedArm(
                arm=arm.name,
                kind=arm_kind(arm),
                wins=table[arm.name].count("a"),
                losses=table[arm.name].count("b"),
                ties=table[arm.name].count("tie"),
                preferred=(table[arm.name].count("a") + table[arm.name].count("tie") / 2) / len(self.rows),
                strength=strengths[arm.name].value - base,
                low=strengths[arm.name].interval.low - base,
                high=strengths[arm.name].interval.high - base,
                signature=signature("judge", len(self.rows), {"arm": arm.name, **recipe}),
            )
            for arm in self._others()
        )


class OtherEndpoint:
    """A judge behind an OpenAI-compatible endpoint."""

    def __init__(self, judge: JudgeSpec) -> None:
        """Raises ConfigError where `token_env` names an empty variable."""
        assert judge.url is not None, "a judge of another endpoint has an address"
        token = own_token(judge.token_env, "judge.token_env")
        self._judge, self._url = judge, judge.url.rstrip("/")
        self._headers = {"authorization": f"Bearer {token}"} if token else {}

    async def send(self, job: EvalRequest) -> Mapping[str, Any]:
        """The letter it writes. Any exception is a failed judgement."""
        body = {"model": self._judge.model, "messages": job.messages, "max_tokens": 8, "temperature": 0}
        async with httpx.AsyncClient(timeout=_TIMEOUT_S, headers=self._headers) as client:
            response = await client.post(f"{self._url}/v1/chat/completions", json=body)
        if response.is_error:
            raise RunError(f"judge {self._url}", f"status {response.status_code}: {response.text[:200]}")
        choice = response.json()["choices"][0]
        return {"text": choice["message"]["content"] or "", "finish_reason": choice.get("finish_reason")}


def _put(row: DatasetRow, texts: tuple[str, str], criteria: str) -> Messages:
    asked = next(turn["content"] for turn in reversed(question(row)) if turn["role"] == "user")
    rule = f"The better answer is the one of which this is more true: {criteria}\nWhich is better? Say A or B."
    parts = [f"Question:\n{asked}", f"Answer A:\n{texts[0]}", f"Answer B:\n{texts[1]}", rule]
    system = "You compare two answers to a question. Say one letter, A or B, and nothing else."
    return [{"role": "system", "content": system}, {"role": "user", "content": "\n\n".join(parts)}]


def _judge_side(answer: EvalAnswer | None) -> Side | None:
    """Return the side that the judge names; None where it names neither."""
    if answer is None:
        return None
    if answer.logprobs:
        (first, _), (second, _) = answer.logprobs
        return "first" if first > second else "second" if second > first else None
    letters = _LETTER.findall(answer.text)
    return None if not letters else "first" if letters[0] == "A" else "second"


def _outcome(two: tuple[Side | None, Side | None]) -> Outcome:
    """a: the arm (it stood first, then second); b: the baseline; tie: the orders disagree, or one said neither."""
    if two == ("first", "second"):
        return "a"
    return "b" if two == ("second", "first") else "tie"
