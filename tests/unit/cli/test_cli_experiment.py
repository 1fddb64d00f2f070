"""`graftwork experiment` against an endpoint over real HTTP: what a person types and reads, right and wrong."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from typer.testing import CliRunner

from graftwork import config
from graftwork.artifacts import publish as artifact
from graftwork.base import load as base_model
from graftwork.base.source import BaseSpec
from graftwork.cli import app
from graftwork.errors import ConfigError
from graftwork.serving.ab_test.spec import ExperimentSpec
from graftwork.serving.api.errors import ApiError
from graftwork.serving.spec import ServeSpec
from graftwork.stages.shadow import check_shadow, place_shadow, shadow_spec
from graftwork.storage.store import Store
from graftwork.training.report import TrainReport
from graftwork.tuning.spec import TuneSpec
from graftwork.tuning.trials import SearchDecision, TuneReport, Winner
from tests.adapters import facts
from tests.engines import write_lora
from tests.local_endpoint import local_endpoint
from tests.tiny import write_tiny_base
from tests.waiting import until


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, and `root` of the endpoint."""
    folder = tmp_path_factory.mktemp("cli")
    write_tiny_base(folder / "base")
    return folder


@pytest.fixture(scope="module")
def url(root: Path) -> Iterator[str]:
    spec = {
        "base": str(root / "base"),
        "root": str(root / "root"),
        "quant": {"kind": "none"},
        "engine": {"max_seq_len": 128, "num_threads": 1},
        "arms": [{"name": "a"}, {"name": "b"}],
    }
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


def test_it_is_started_watched_ramped_and_stopped(url: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no experiments" in run("status", url)
    assert '"model": "experiment/cards"' in run("start", str(file))
    for number in range(4):
        body = {"model": "experiment/cards", "user": f"u{number}", "messages": [{"role": "user", "content": "Hello"}]}
        request_id = httpx.post(f"{url}/v1/chat/completions", json={**body, "max_tokens": 1}, timeout=60).json()["id"]
        httpx.post(f"{url}/v1/feedback", json={"request_id": request_id, "scores": {"thumbs": number % 2}}, timeout=60)
    (found,) = listed("status", str(file))
    assert sum(arm["answers"] for arm in found["arms"]) == 4
    said = until_judged(file)
    assert "undecided" in said
    assert "thumbs, plain means: " in said, "named apart from the difference, which is weighted"
    assert not re.search(r"b [01]\.\d+ against a [01]\.\d+: [+-]", said)
    assert "0 dropped" in said
    assert "0.25" in run("ramp", str(file), "--weight", "a=0.75", "--weight", "b=0.25")
    assert listed("kill", url)["status"] == "killed"
    assert listed("resume", url, "--name", "cards")["status"] == "running"
    with pytest.raises(ConfigError, match="it runs with control=a"):
        run("report", str(file), "--set", "control=b")
    assert "stopped" in run("stop", url)
    monkeypatch.chdir(file.parent)
    assert "cards: thumbs, split" in run("report", str(file))
    page = file.parent / "cards-report" / "report.html"
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert not (file.parent / "report.html").exists(), "a report overwrites no file of the working directory"
    assert "cards: thumbs, split" in run("report", str(file), "--out", str(file.parent / "elsewhere"))
    assert (file.parent / "elsewhere" / "report.json").is_file()


def until_judged(file: Path) -> str:
    """What `status` says once the rows are written and judged, which is a moment after the answers."""
    until(lambda: "thumbs, weighted difference of b against a" in run("status", str(file)), "the rows are judged")
    return run("status", str(file))


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


@pytest.fixture(scope="module")
def versions(root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two published adapters of the endpoint's base; `latest` points at the first."""
    store, digest = Store(str(root / "root")), base_model.resolve(BaseSpec(uri=str(root / "base"))).digest
    found = []
    for seed, alias in ((1, "latest"), (2, None)):
        folder = write_lora(root / "base", tmp_path_factory.mktemp("lora"), seed, r=2, target_modules=["q_proj"])
        known = facts(base_digest=digest, prompt={"system": None})
        found.append(artifact.publish(store, "tiny", folder, **known, alias=alias).version)
    return found


def sweep(root: Path, experiment: Any, start: bool) -> TuneSpec:
    train = {"name": "tiny", "base": str(root / "base"), "data": {"train": "t.jsonl", "eval": "e.jsonl"}}
    shadow = {"against": "latest", "experiment": experiment, "start": start}
    space = {"adapter.rank": {"kind": "choice", "values": [2]}}
    given = {"name": "s", "root": str(root / "root"), "train": train, "space": space, "winner": {"shadow": shadow}}
    return config.validate(TuneSpec, given, where="s.yaml")


def swept(spec: TuneSpec, beside: str | None, version: str) -> TuneReport:
    """What a sweep reports whose winner was published."""
    trained = TrainReport("tiny-00000000", f"tiny@{version}", version, False, 1, 1, 0, 1, 1.0, 1.0, (), (), (1,), (0,))
    winner = Winner(trained, None, None, beside, False, "no alias was asked for")
    choice = SearchDecision("a", "a", "said", "rule")
    return TuneReport("s-00000000", (), "a", {}, spec.train, "grid", choice, 1, 1.0, False, winner)


def test_a_sweeps_winner_is_put_into_shadow(url: str, root: Path, versions: list[str]) -> None:
    spec = sweep(root, {"endpoint": url, "primary": "thumbs"}, start=True)
    check_shadow(spec)
    found = place_shadow(spec, swept(spec, *versions))
    assert found["started"]["model"] == "experiment/tiny-shadow"
    (running,) = [one for one in listed("status", url) if one["name"] == "tiny-shadow"]
    assert (running["mode"], running["control"], running["status"]) == ("shadow", "current", "running")
    assert {arm["name"]: arm["adapter"] for arm in running["arms"]} == {
        "current": f"tiny@{versions[0]}",
        "winner": f"tiny@{versions[1]}",
    }
    written = config.load(found["spec"], expect="experiment")
    assert run("start", found["spec"]), "the file that was written starts the same one"
    assert isinstance(written, ExperimentSpec)
    assert written.endpoint == url


def test_a_shadow_takes_the_other_keys_of_an_experiment_file(url: str, root: Path, file: Path) -> None:
    spec = sweep(root, str(file), start=False)
    asked = shadow_spec(spec, "a" * 12, "b" * 12)
    assert (asked.name, asked.endpoint, asked.control, asked.mode) == ("cards", url, "current", "shadow")
    assert [arm.weight for arm in asked.arms] == [None, None]
    assert "nothing to compare it with" in place_shadow(spec, swept(spec, "a" * 12, "a" * 12))["why"]


@pytest.mark.parametrize(
    ("experiment", "said"),
    [
        ({"primary": "thumbs", "arms": []}, "winner.shadow.experiment.arms: the sweep sets it"),
        ({"endpoint": "http://127.0.0.1:8000"}, "winner.shadow.experiment: primary: the key is missing"),
        ({"primary": "thumbs", "endpont": "x"}, "did you mean 'endpoint'"),
        ({"primary": "thumbs", "holdout": 0.5}, "the control answers all"),
        ("nosuch.yaml", "it does not exist"),
    ],
)
def test_a_shadow_that_could_not_start_is_refused_before_the_sweep(root: Path, experiment: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_shadow(sweep(root, experiment, start=False))
