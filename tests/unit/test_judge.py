"""An LLM judge with known habits, and the choice of an option by its likelihood."""

import asyncio
import json
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graftwork import config
from graftwork.chat import Message
from graftwork.data import Row
from graftwork.errors import ConfigError, DataError
from graftwork.report import ReportInput, render_html
from graftwork.report.records import CompareReport, JudgeReport
from graftwork.serving.experiment.answers import Answers
from graftwork.serving.experiment.compare import compare, score_arms
from graftwork.serving.experiment.judge import JudgeRun, OtherEndpoint
from graftwork.serving.experiment.judge_spec import JudgeSpec
from graftwork.serving.experiment.offline import Job, ask_jobs, option_jobs, run_offline
from graftwork.serving.experiment.scorers.load import load_scorers
from graftwork.serving.experiment.spec import CompareSpec
from tests.scripted_arms import SCHEMA, Script, airports, spec

ARMS = [{"name": "base"}, {"name": "finetuned", "adapter": "airport-card@closed"}]
CHANCES = {"base": (0.5, 0.5), "finetuned": (1.0, 0.9)}


def shown(job: Job) -> tuple[str, str]:
    """The two answers as the judge sees them."""
    parts = job.messages[-1]["content"].split("\n\n")
    return parts[1].removeprefix("Answer A:\n"), parts[2].removeprefix("Answer B:\n")


def judged(folder: Path, habit: Any, n: int = 80, **changes: Any) -> tuple[JudgeReport, CompareReport, list[Job]]:
    rows, asked = airports(n), spec(ARMS, judge=changes or {"limit": n})
    assert asked.judge is not None
    answers = asyncio.run(run_offline(asked, rows, Script(rows, CHANCES), folder / "answers.jsonl"))
    run = JudgeRun(asked, asked.judge, rows, answers)
    jobs = run.jobs()

    async def send(job: Job) -> dict[str, Any]:
        return habit(job)  # type: ignore[no-any-return]

    found = asyncio.run(ask_jobs(jobs, send, folder / "judge.jsonl", 16))
    report = run.report(found, score_arms(asked, rows, answers, SCHEMA), "both")
    return report, compare(asked, rows, answers, SCHEMA, judged=report), jobs


def letters(first: bool) -> dict[str, Any]:
    return {"logprobs": [(-0.1, 1), (-2.0, 1)] if first else [(-2.0, 1), (-0.1, 1)]}


def prefers_objects(job: Job) -> dict[str, Any]:
    a, b = (text.startswith("{") for text in shown(job))
    rng = random.Random(job.key)
    return letters(a if a != b else rng.random() < 0.5)


def test_each_pair_is_asked_in_both_orders(tmp_path: Path) -> None:
    _, _, jobs = judged(tmp_path, prefers_objects)
    by = {(job.row_id, job.label): shown(job) for job in jobs}
    rows = {job.row_id for job in jobs}
    assert len(jobs) == 2 * len(rows)
    for row in rows:
        assert by[row, "finetuned~judge-ab"] == by[row, "finetuned~judge-ba"][::-1]
        assert by[row, "finetuned~judge-ab"][0] != by[row, "finetuned~judge-ab"][1], "the same text is not judged"
    assert {job.continuations for job in jobs} == {("A", "B")}


def test_a_judge_with_a_reason_agrees_with_itself(tmp_path: Path) -> None:
    report, whole, _ = judged(tmp_path, prefers_objects)
    [arm] = report.arms
    assert arm.wins > 25
    assert arm.losses < arm.wins / 4
    assert arm.strength > 0.5
    assert arm.low > 0
    assert report.agreement is not None
    assert report.agreement.low > 0.5
    assert report.first is not None
    assert report.first.low < 0.5 < report.first.high
    assert report.sides_with_gold is not None
    assert report.sides_with_gold.value > 0.8
    html = render_html(ReportInput(title="t", created_at="now", compare=whole))
    assert 'id="judge"' in html
    assert arm.signature in html


def test_a_judge_that_takes_what_stands_first_decides_nothing(tmp_path: Path) -> None:
    report, _, _ = judged(tmp_path, lambda job: letters(True))
    [arm] = report.arms
    assert (arm.wins, arm.losses, arm.ties) == (0, 0, 80)
    assert report.first is not None
    assert report.agreement is not None
    assert (report.first.value, report.agreement.value) == (1, 0)
    assert report.sides_with_gold is None
    assert arm.low <= 0 <= arm.high


def test_a_judge_that_says_no_letter_is_counted(tmp_path: Path) -> None:
    report, _, jobs = judged(tmp_path, lambda job: {"text": "I would rather not."})
    assert report.failed == report.asked == len(jobs)
    assert (report.agreement, report.first) == (None, None)


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An endpoint that writes the letter of the longer answer."""
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            seen.append({**body, "path": self.path, "auth": self.headers.get("authorization")})
            parts = body["messages"][-1]["content"].split("\n\n")
            letter = "Answer A." if len(parts[1]) > len(parts[2]) else "B"
            reply = json.dumps({"choices": [{"message": {"content": letter}, "finish_reason": "stop"}]}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    server.server_close()
    thread.join(10)


def test_a_judge_behind_another_endpoint(
    elsewhere: tuple[str, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, seen = elsewhere
    monkeypatch.setenv("JUDGE_TOKEN", "secret-token-of-the-judge")
    judge = JudgeSpec(url=url, model="big", token_env="JUDGE_TOKEN")
    rows, asked = airports(6), spec(ARMS)
    answers = Answers()
    for row in rows:
        for arm, text in (("base", "short"), ("finetuned", "longer " + row.id)):
            answers.add(_answer(arm, row.id, text))
    run = JudgeRun(asked, judge, rows, answers)
    jobs = run.jobs()

    async def ask() -> list[Any]:
        other = OtherEndpoint(judge)
        return [await other.send(job) for job in jobs]

    told = asyncio.run(ask())
    found = Answers([_answer(job.label, job.row_id, one["text"]) for job, one in zip(jobs, told, strict=True)])
    report = run.report(found, score_arms(asked, rows, answers, SCHEMA), "both")
    assert (report.judge, report.arms[0].wins, report.failed) == ("big", 6, 0)
    assert {(one["model"], one["path"], one["auth"]) for one in seen} == {
        ("big", "/v1/chat/completions", "Bearer secret-token-of-the-judge")
    }
    assert not any(job.continuations for job in jobs)


def _answer(arm: str, row_id: str, text: str) -> Any:
    from graftwork.serving.experiment.answers import Answer

    return Answer(key=f"{arm} {row_id}", arm=arm, row_id=row_id, request_id="r", text=text)


# The choice of an option.

CHOICE = {"kind": "choice", "options": ["yes", "no", "not sure"]}


def quiz(n: int) -> list[Row]:
    return [Row(f"q{i}", (Message("user", f"{i}?"),), gold={"answer": ["yes", "no"][i % 2]}) for i in range(n)]


def chosen(rows: list[Row], folder: Path, scorer: dict[str, Any]) -> dict[str, float]:
    asked = spec(ARMS, answer_schema=None, scorers=[scorer], primary="choice")
    scorers = load_scorers(asked.scorers)
    answers = Answers([_answer(arm["name"], row.id, "") for arm in ARMS for row in rows])

    async def send(job: Job) -> dict[str, Any]:
        gold = next(row.gold for row in rows if row.id == job.row_id) or {}
        right = job.arm.name == "finetuned" or job.row_id == "q0"
        wanted = gold["answer"] if right else "not sure"
        return {"logprobs": [(-1.0 if text == wanted else -3.0 * len(text.split()), len(text.split()))
                             for text in job.continuations]}  # fmt: skip

    jobs = option_jobs(asked, rows, scorers.choices, {})
    options = asyncio.run(ask_jobs(jobs, send, folder / "options.jsonl", 8))
    scored = score_arms(asked, rows, answers, None, options)
    report = compare(asked, rows, answers, None, options=options)
    assert report.primary == "choice"
    return {arm: float(np.mean(values["choice"])) for arm, values in scored.values.items()}


def test_the_likeliest_option_is_chosen(tmp_path: Path) -> None:
    assert chosen(quiz(10), tmp_path, CHOICE) == {"base": 0.1, "finetuned": 1.0}


def test_options_may_be_the_rows_own(tmp_path: Path) -> None:
    rows = [Row(row.id, row.messages, gold={**(row.gold or {}), "of": ["yes", "no", "not sure"]}) for row in quiz(10)]
    assert chosen(rows, tmp_path, {"kind": "choice", "options_field": "of"}) == {"base": 0.1, "finetuned": 1.0}


@pytest.mark.parametrize(
    ("gold", "scorer", "found"),
    [
        ({"answer": "maybe"}, CHOICE, "one of the options"),
        ({"answer": "a", "of": ["a"]}, {"kind": "choice", "options_field": "of"}, "two or more"),
        ({"answer": "a"}, {"kind": "choice", "options_field": "of"}, "found None"),
    ],
)
def test_rows_without_the_right_option_are_refused(gold: dict[str, Any], scorer: dict[str, Any], found: str) -> None:
    asked = spec(ARMS, answer_schema=None, scorers=[scorer])
    with pytest.raises(DataError, match=found):
        load_scorers(asked.scorers).check([Row("r", (Message("user", "?"),), gold=gold)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge": {"url": "http://x"}}, "go together"),
        ({"judge": {"token_env": "X"}}, "cannot take effect"),
        ({"judge": {"url": "http://x", "model": "m", "adapter": "a@b"}}, "of the served base"),
        ({"judge": {"url": "ftp://x", "model": "m"}}, "judge.url"),
        ({"scorers": ["fields", {"kind": "choice"}]}, "options or options_field"),
    ],
)
def test_judges_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    tree = {**json.loads(spec(ARMS).model_dump_json()), **changes}
    with pytest.raises(ConfigError, match=message):
        config.validate(CompareSpec, tree, "compare.yaml")
