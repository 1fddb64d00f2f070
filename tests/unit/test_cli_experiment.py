"""`graftwork experiment` against an endpoint over real HTTP: what a person types and reads, right and wrong."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from typer.testing import CliRunner

from graftwork.cli import app
from graftwork.errors import ConfigError
from graftwork.serving.api_error import ApiError
from graftwork.serving.spec import ServeSpec
from tests.local_endpoint import local_endpoint
from tests.tiny import write_tiny_base


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    tmp = tmp_path_factory.mktemp("cli")
    spec = {"base": str(write_tiny_base(tmp / "base")), "root": str(tmp / "root"), "quant": {"kind": "none"},
            "engine": {"max_seq_len": 128, "num_threads": 1}, "arms": [{"name": "a"}, {"name": "b"}]}  # fmt: skip
    with local_endpoint(ServeSpec.model_validate(spec)) as running:
        yield running


@pytest.fixture
def file(url: str, tmp_path: Path) -> Path:
    arms = [{"name": "a", "weight": 0.5}, {"name": "b", "weight": 0.5}]
    spec = {"kind": "experiment", "name": "cards", "endpoint": url, "arms": arms, "control": "a", "primary": "thumbs"}
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def run(*words: str) -> str:
    """What the command prints, on one line."""
    done = CliRunner().invoke(app, ["experiment", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def listed(*words: str) -> Any:
    return json.loads(CliRunner().invoke(app, ["experiment", *words, "--json"], catch_exceptions=False).output)


def test_it_is_started_watched_ramped_and_stopped(url: str, file: Path) -> None:
    assert "no experiments" in run("status", url)
    assert '"model": "experiment/cards"' in run("start", str(file))
    for number in range(4):
        body = {"model": "experiment/cards", "user": f"u{number}", "messages": [{"role": "user", "content": "Hello"}]}
        request_id = httpx.post(f"{url}/v1/chat/completions", json={**body, "max_tokens": 1}).json()["id"]
        httpx.post(f"{url}/v1/feedback", json={"request_id": request_id, "scores": {"thumbs": number % 2}})
    (found,) = listed("status", str(file))
    assert sum(arm["answers"] for arm in found["arms"]) == 4
    said = until_judged(file)
    assert "undecided" in said
    assert "0 dropped" in said
    assert "0.25" in run("ramp", str(file), "--weight", "a=0.75", "--weight", "b=0.25")
    assert listed("kill", url)["status"] == "killed"
    assert listed("resume", url, "--name", "cards")["status"] == "running"
    with pytest.raises(ConfigError, match="it runs with control=a"):
        run("report", str(file), "--set", "control=b")
    assert "stopped" in run("stop", url)
    assert "cards: thumbs, split" in run("report", str(file), "--out", str(file.parent))
    assert (file.parent / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def until_judged(file: Path) -> str:
    """What `status` says once the rows are written and judged, which is a moment after the answers."""
    deadline = time.monotonic() + 60
    while "thumbs: b" not in (said := run("status", str(file))):
        assert time.monotonic() < deadline, said
        time.sleep(0.1)
    return said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("ramp", "FILE", "--weight", "a=0.75", "--weight", "b=0.3"), "sum to 1"),
        (("ramp", "FILE", "--weight", "a=most"), "no number"),
        (("start", "FILE", "--set", "control=c"), "none of the arms"),
        (("start", "FILE", "--set", "arms.0.weight=0.4"), "sum to 1"),
        (("start", "FILE", "--set", "name=third", "--set", "arms.0.model=nosuch"), "does not exist"),
        (("stop", "URL", "--name", "nosuch"), "does not exist"),
        (("status", "URL", "--name", "nosuch"), "none of this name"),
    ],
)
def test_what_is_wrong_is_said(url: str, file: Path, words: tuple[str, ...], said: str) -> None:
    file.write_text(file.read_text().replace("name: cards", "name: other"))
    start = ("start", str(file))
    if words[0] == "ramp":
        run(*start)
    given = [{"FILE": str(file), "URL": url}.get(word, word) for word in words]
    with pytest.raises((ConfigError, ApiError)) as refused:
        run(*given)
    assert said in str(refused.value)
