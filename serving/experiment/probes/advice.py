"""Shares of causes -> what to do. Only what is shown counts; what is not shown is said, with the questions it needs.

| shown to matter | remedy |
|---|---|
| nothing: few answers fail | neither |
| form | grammar where that is enough, else finetune |
| information | rag; prompt where the base knows it, and a better retriever where it has one that misses |
| information and form | rag with a grammar where that is enough, else both (RAFT) |
| use of context or distraction, whatever else | both (RAFT) |
| forgetting alone | retrain: lower rank, other rows mixed in |

What was measured has the last word: where another arm mends more of the same failures, its kind is the advice.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from graftwork.report import words
from graftwork.report.records import ArmKind, CauseShare, Lift, Remedy, Share

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
    """What the remedy follows from."""

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
    """Whether it holds for more than half, as far as is shown."""
    if found is None:
        return "open"
    return "yes" if found.low > 0.5 else "no" if found.high <= 0.5 else "open"


def ask_for(found: Findings) -> Remedy:
    """What the causes ask for."""
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
    """What an arm shows when it mends."""
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
        said += f". The causes alone ask for {_SAYS[asked].lower()}, but {own.arm} mends only {_percent(own.share)}"
    if own is None and remedy not in ("neither", "undecided"):
        said += " (no other arm here does that)"
    if best is not None and best.share.count:
        said += f"; measured here, {best.arm} mends {_percent(best.share)} of them"
    elif best is not None:
        said += "; no other arm here mends any"
    return said + "."


def spoken(cause: str) -> str:
    """A cause as people say it."""
    return {"information": "missing information", "retrieval": "passages not found", "form": "wrong form",
            "unknown": "causes unknown"}.get(cause, cause.replace("_", " "))  # fmt: skip


def _percent(found: Share) -> str:
    return f"{words.percent(found.value)} {words.percents(found.low, found.high)}"


def _join(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + f" and {parts[-1]}" if len(parts) > 1 else "".join(parts)
