"""Logs of experiments with a known outcome, row by row, and the state that the monitor makes of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from graftwork.serving.ab_test.log import LogRow
from graftwork.serving.ab_test.log_reader import columns_of_rows
from graftwork.serving.ab_test.monitor import Monitor, MonitorState
from graftwork.serving.ab_test.spec import OnlineRules


def rules(**changes: Any) -> OnlineRules:
    """An even split of two arms on a score of 0 or 1."""
    plain = {"arms": ("base", "rag"), "control": "base", "metric": "facts", "weights": {"base": 0.5, "rag": 0.5}}
    return OnlineRules(**{**plain, **changes})


def answer(number: int, arm: str, score: float | None = None, **changes: Any) -> LogRow:
    """One answer of a unit of its own, a second after the last."""
    plain = {
        "kind": "answer",
        "experiment": "e",
        "at": float(number),
        "request_id": f"r{number}",
        "unit": f"{number:016x}",
        "arm": arm,
        "probability": 0.5,
        "latency_ms": 100.0,
        "scores": {} if score is None else {"facts": score},
    }
    return LogRow(**{**plain, **changes})


def split(n: int, base: float, rag: float, seed: int = 0, **changes: Any) -> list[LogRow]:
    """Units drawn evenly to two arms with these shares of right answers."""
    rng = np.random.default_rng(seed)
    arms = np.where(rng.random(n) < 0.5, "rag", "base")
    return [
        answer(k, str(arm), float(rng.random() < (rag if arm == "rag" else base)), **changes)
        for k, arm in enumerate(arms)
    ]


def assignment(answered: LogRow, at: float | None = None) -> LogRow:
    """The row that the ingress writes when it sends the request to its arm."""
    return LogRow(
        kind="assignment",
        experiment="e",
        at=answered.at if at is None else at,
        request_id=answered.request_id,
        unit=answered.unit,
        arm=answered.arm,
        role=answered.role,
        probability=answered.probability,
    )


def assigned(rows: Sequence[LogRow]) -> list[LogRow]:
    """The rows, each answer with its assignment right before it, as if no two requests were ever in flight at once."""
    return [one for row in rows for one in ([assignment(row), row] if row.kind == "answer" else [row])]


def read(rows: Sequence[LogRow], told: OnlineRules | None = None) -> MonitorState:
    return judged(assigned(rows), told)


def judged(rows: Sequence[LogRow], told: OnlineRules | None = None) -> MonitorState:
    monitor = Monitor(told or rules())
    monitor.ingest(columns_of_rows(rows, monitor.numbers))
    return monitor.state()


def shadow(n: int, wins: float, losses: float, seed: int = 0) -> list[LogRow]:
    """Prompts that both arms answer; the copy's answer comes second."""
    rng, rows = np.random.default_rng(seed), []
    for k in range(n):
        draw = rng.random()
        base, rag = (0.0, 1.0) if draw < wins else (1.0, 0.0) if draw < wins + losses else (1.0, 1.0)
        rows += [answer(k, "base", base), answer(k, "rag", rag, role="shadow", probability=None)]
    return rows


def in_flight(
    n: int, per_s: float, fast_s: float, slow_s: float, seed: int, share: float = 0.9, cut: bool = True
) -> list[LogRow]:
    """A log of equal arms, `rag` answers slower: rows by the time of writing; with `cut`, up to the last draw."""
    rng = np.random.default_rng(seed)
    slow = rng.random(n) < 0.5
    drawn = np.cumsum(rng.exponential(1 / per_s, n))
    took = np.where(slow, rng.gamma(20, slow_s / 20, n), rng.gamma(20, fast_s / 20, n))
    answered = [
        answer(
            k,
            "rag" if slow[k] else "base",
            float(rng.random() < share),
            at=float(drawn[k] + took[k]),
            latency_ms=float(took[k] * 1000),
        )
        for k in range(n)
    ]
    rows = [row for k, one in enumerate(answered) for row in (assignment(one, float(drawn[k])), one)]
    rows.sort(key=lambda row: (row.at, row.kind != "assignment"))
    return [row for row in rows if row.at <= drawn[-1] or not cut]
