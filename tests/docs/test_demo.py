"""The quick main job, as `make demo QUICK=1` runs it: from specs to a report that opens with no network."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ports import free_port

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.long, pytest.mark.model]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """A root and a port of the test's own."""
    return {"root": tmp_path_factory.mktemp("demo"), "overrides.serve.port": free_port()}


@pytest.fixture(scope="module")
def demo(settings: dict[str, object]) -> tuple[Path, str]:
    """(root, what the command printed)."""
    return Path(str(settings["root"])), run(settings)


def run(settings: dict[str, object]) -> str:
    given = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    done = subprocess.run(
        [Path(sys.executable).with_name("graftwork"), "demo", "examples/demo-quick.yaml", *given],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=1500,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(1600)
def test_every_stage_says_what_it_found(demo: tuple[Path, str]) -> None:
    for stage in (
        "prepare",
        "plan",
        "tune",
        "train airport-card",
        "train airport-card-raft",
        "train ua-parse",
        "serve",
        "compare",
    ):
        assert f"[{stage}]" in demo[1]


def test_the_swap_lost_no_request_and_names_each_version(demo: tuple[Path, str]) -> None:
    swap = report(demo[0])["serving"]["swap"]
    assert swap["failed"] == 0
    assert swap["answers_by_version"].get(swap["new_version"], 0) > 0
    assert sum(swap["answers_by_version"].values()) == swap["requests"]
    assert report(demo[0])["serving"]["max_adapters_in_batch"] >= 2


def test_every_arm_answered_every_question(demo: tuple[Path, str]) -> None:
    compare = report(demo[0])["compare"]
    assert {arm["name"] for arm in compare["arms"]} == {
        "base",
        "base+3shot",
        "base+rag",
        "finetuned",
        "finetuned+rag",
        "raft+rag",
    }
    assert all(arm["n"] == compare["n"] and arm["errors"] == 0 for arm in compare["arms"])
    assert compare["advice"]["sentence"]


def test_the_report_fetches_nothing(demo: tuple[Path, str]) -> None:
    [page] = demo[0].glob("runs/demo-quick-*/report.html")
    html = page.read_text(encoding="utf-8")
    assert len(html) < 1_000_000
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)[^"']+""", html)


@pytest.mark.timeout(600)
def test_a_second_run_reuses_what_is_done(demo: tuple[Path, str], settings: dict[str, object]) -> None:
    said = run(settings)
    for stage in ("tune", "train airport-card", "train airport-card-raft", "train ua-parse", "compare"):
        line = next(line for line in said.splitlines() if line.startswith(f"[{stage}]"))
        assert line.rstrip().endswith("(reused)"), line


def report(root: Path) -> dict:  # type: ignore[type-arg]
    [path] = root.glob("runs/demo-quick-*/report.json")
    found: dict = json.loads(path.read_text(encoding="utf-8"))  # type: ignore[type-arg]
    return found
