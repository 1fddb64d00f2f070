"""Feedback as rows: from real requests and thumbs over HTTP to a trained adapter, and what is left out."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from typer.testing import CliRunner, Result

from graftwork.artifacts import publish as artifact
from graftwork.artifacts.manifest import aliases
from graftwork.base import load as base_model
from graftwork.base.source import BaseSpec
from graftwork.cli import app
from graftwork.errors import ConfigError, DataError
from graftwork.serving.ab_test.feedback import FeedbackFilter, FeedbackRows
from graftwork.serving.ab_test.log import LogRow, Segments, SegmentWriter
from graftwork.serving.ab_test.log_reader import read_log
from graftwork.serving.ab_test.spec import ExperimentSpec
from graftwork.serving.spec import ServeSpec
from graftwork.storage.store import Store
from graftwork.training.loop import run_steps
from graftwork.training.objectives.rows import prepare
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import TrainJob
from tests.adapters import facts
from tests.engines import write_lora
from tests.local_endpoint import local_endpoint
from tests.tiny import write_tiny_base
from tests.waiting import until

ARMS = [{"name": name, "model": f"arm/{name}", "weight": 0.5} for name in ("plain", "tuned")]
CARDS: dict[str, Any] = {"kind": "experiment", "name": "cards", "control": "plain", "primary": "thumbs", "arms": ARMS}


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ServeSpec:
    tmp = tmp_path_factory.mktemp("feedback")
    base = write_tiny_base(tmp / "base")
    store, digest = Store(str(tmp / "root")), base_model.resolve(BaseSpec(uri=str(base))).digest
    folder = write_lora(base, tmp / "card", 0, r=4, target_modules=["q_proj"])
    artifact.publish(store, "card", folder, **facts(base_digest=digest, prompt={"system": None}), alias="latest")
    coded = {"grammar": {"regex": "[A-Z]{3}"}}
    return ServeSpec.model_validate(
        {
            "base": str(base),
            "root": store.uri,
            "quant": {"kind": "none"},
            "arms": [{"name": "plain", **coded}, {"name": "tuned", "adapter": "card@latest", **coded}],
            "engine": {"max_seq_len": 128, "num_threads": 1},
        }
    )


@pytest.fixture(scope="module")
def url(spec: ServeSpec) -> Iterator[str]:
    with local_endpoint(spec) as running:
        yield running


def ask(url: str, number: int, **changes: Any) -> dict[str, str]:
    """Ask one question; the answer's id, arm, text and the question."""
    question = f"Which code has airport {number}?"
    turns = [{"role": "system", "content": "Answer with a code."}, {"role": "user", "content": question}]
    body = {"model": "experiment/cards", "messages": turns, "max_tokens": 16, "user": f"user{number}", **changes}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    text = found["choices"][0]["message"]["content"]
    return {"id": found["id"], "arm": answer.headers["x-graftwork-arm"], "text": text, "question": question}


def rate(url: str, request_id: str, **scores: float) -> None:
    def counted() -> bool:
        body = {"request_id": request_id, "scores": scores}
        return httpx.post(f"{url}/v1/feedback", json=body, timeout=60).status_code == 200

    until(counted, within_s=30)


def command(*given: object) -> Result:
    return CliRunner().invoke(app, ["experiment", "feedback", *map(str, given)])


def test_thumbs_become_rows_that_kto_trains_on(url: str, spec: ServeSpec, tmp_path: Path) -> None:
    file = tmp_path / "cards.yaml"
    file.write_text(yaml.safe_dump({**CARDS, "endpoint": url, "log_prompts": True, "log_every_s": 0.1}))
    assert CliRunner().invoke(app, ["experiment", "start", str(file)]).exit_code == 0
    asked = [ask(url, number) for number in range(16)]
    for number, answer in enumerate(asked[:14]):
        rate(url, answer["id"], thumbs=float(number % 3 > 0))
    cut = ask(url, 99, max_tokens=1)
    rate(url, cut["id"], thumbs=1.0)
    out = tmp_path / "rows.jsonl"

    def complete() -> bool:
        result = command(file, "-o", out, "--json")
        return result.exit_code == 0 and json.loads(result.output)["left_out"] == {"cut at max_tokens": 1}

    until(complete, within_s=30)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 14
    assert {row["id"]: row["completion"] for row in rows} == {answer["id"]: answer["text"] for answer in asked[:14]}
    assert sum(row["label"] for row in rows) == 9
    assert {turn["content"] for row in rows for turn in row["prompt"] if turn["role"] == "user"} == {
        answer["question"] for answer in asked[:14]
    }
    told = command(file, "-o", out).output
    assert f"{out}: 14 rows, label true in 9, false in 5" in told
    assert "left out: 1 cut at max_tokens" in told

    of_arm = json.loads(command(file, "-o", tmp_path / "arm.jsonl", "--arm", "tuned", "--json").output)
    version = aliases(Store(spec.root), "card")["latest"]
    args = ("-o", tmp_path / "version.jsonl", "--version", version[:8], "--json")
    of_version = json.loads(command(file, *args).output)
    assert of_arm["rows"] == of_version["rows"] == sum(answer["arm"] == "tuned" for answer in asked[:14])
    assert 0 < of_arm["rows"] < 14
    assert (tmp_path / "arm.jsonl").read_text() == (tmp_path / "version.jsonl").read_text()

    train = {
        "name": "card",
        "root": spec.root,
        "base": str(spec.base.uri),
        "quant": {"kind": "none"},
        "data": {"train": str(out)},
        "objective": {"kind": "kto"},
        "optim": {"epochs": 6, "lr": 1e-2},
        "num_workers": 1,
    }
    run = TrainSpec.model_validate(train)
    result = run_steps(TrainJob(run, prepare(run)), lambda _: True)
    assert result.train_loss[-1][1] < result.train_loss[0][1]


def write_log(folder: Path, rows: list[LogRow]) -> Store:
    store = Store(str(folder))
    SegmentWriter(Segments(store, ())).publish(rows)
    return store


def answer(number: int, **changes: Any) -> LogRow:
    plain = {
        "kind": "answer",
        "experiment": "e",
        "at": float(number),
        "request_id": f"r{number}",
        "arm": "plain",
        "prompt": json.dumps([{"role": "user", "content": f"question {number}"}]),
        "output": f"answer {number}",
        "finish_reason": "stop",
    }
    return LogRow(**{**plain, **changes})


def score(number: int, value: float, metric: str = "thumbs") -> LogRow:
    scores = {metric: value}
    return LogRow(kind="score", experiment="e", at=0.0, request_id=f"r{number}", detail=metric, scores=scores)


def made(folder: Path, rows: list[LogRow], keep: FeedbackFilter) -> tuple[list[dict[str, Any]], FeedbackRows]:
    store = write_log(folder, rows)
    found = FeedbackRows(keep)
    return list(found.rows(lambda: read_log(store, ()))), found


def test_every_rated_answer_that_is_no_row_is_counted_with_its_reason(tmp_path: Path) -> None:
    unusable = [
        answer(1, output=None, error="disconnected"),
        answer(2, output=" "),
        answer(3, output=None),
        answer(4, finish_reason="length"),
        answer(5, prompt=None),
        answer(6, prompt='"a text"'),
        answer(7, arm="tuned"),
        answer(8, role="shadow"),
        answer(9),
    ]
    rows = [answer(0), *unusable, *(score(number, 1.0) for number in range(9)), score(9, 0.5), score(11, 1.0)]
    found, report = made(tmp_path, rows, FeedbackFilter("thumbs", 0.5, arms=("plain",)))
    turns = [{"role": "user", "content": "question 0"}]
    assert found == [{"id": "r0", "prompt": turns, "completion": "answer 0", "label": True}]
    assert report.left_out == {
        "failed or empty": 2,
        "without a text in the log": 1,
        "cut at max_tokens": 1,
        "without a prompt in the log": 1,
        "of a text without turns (/v1/completions)": 1,
        "of another arm": 1,
        "rated in the middle": 1,
    }


def test_stars_and_times_are_labelled_by_the_middle_of_their_range(tmp_path: Path) -> None:
    primary = {"name": "stars", "low": 1, "high": 5}
    spec = ExperimentSpec.model_validate({**CARDS, "primary": primary, "endpoint": "http://localhost:1"})
    keep = FeedbackFilter.of_spec(spec, None, (), ())
    assert [keep.label(stars) for stars in (1.0, 2.0, 3.0, 4.0)] == [False, False, None, True]
    assert FeedbackFilter.of_spec(spec, "thumbs", (), ()) == FeedbackFilter("thumbs", 0.5, is_primary=False)
    lower = FeedbackFilter("seconds", 2.0, lower_is_better=True)
    assert [lower.label(seconds) for seconds in (1.0, 3.0)] == [True, False]


@pytest.mark.parametrize(
    ("rows", "hint"),
    [
        ([answer(0, prompt=None), score(0, 1.0)], "set log_prompts: true"),
        ([answer(0, output=None), score(0, 1.0)], "set log_outputs: true"),
        ([answer(0), score(0, 1.0, "stars")], "check --metric"),
    ],
)
def test_a_log_without_rows_says_what_is_missing(tmp_path: Path, rows: list[LogRow], hint: str) -> None:
    with pytest.raises(DataError) as error:
        made(tmp_path, rows, FeedbackFilter("thumbs", 0.5))
    assert hint in error.value.hint


@pytest.mark.parametrize(
    ("arms", "versions", "subject"), [(("other",), (), "--arm other"), ((), ("ab",), "--version ab")]
)
def test_names_that_are_none_are_refused(arms: tuple[str, ...], versions: tuple[str, ...], subject: str) -> None:
    spec = ExperimentSpec.model_validate({**CARDS, "endpoint": "http://localhost:1"})
    with pytest.raises(ConfigError) as error:
        FeedbackFilter.of_spec(spec, None, arms, versions)
    assert error.value.subject == subject
