"""The table that people read is that of the committed results, and every goal has a benchmark that tells its figure."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import adapter_kinds, run, table
from benchmarks.goals import GOALS, Goal
from benchmarks.record import RESULTS, Clock, Figure, figure, ratios, write
from benchmarks.table import README, Row

ROOT = Path(__file__).parents[2]


def test_the_readmes_table_is_that_of_the_committed_results() -> None:
    text = README.read_text(encoding="utf-8")
    assert text == table.inserted(text, table.shown(table.rows())), "run: python -m benchmarks.table --write"


def test_the_guides_table_of_adapters_is_that_of_the_committed_result() -> None:
    rows = adapter_kinds.recorded(RESULTS / "adapter_kinds.json")
    assert adapter_kinds.shown(rows) in (ROOT / "docs" / "guide-training.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_committed_result_says_where_it_was_taken(path: Path) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    assert set(document) == {"run_info", "result", "meta_info"}
    assert document["run_info"]["hardware"]["cores"] > 0
    assert path.stem in run.BENCHMARKS + run.RECORDINGS
    for found in document["result"].get("figures", {}).values():
        assert found["q1"] <= found["value"] <= found["q3"]
        assert found["n"] > 0


@pytest.mark.parametrize("name", run.BENCHMARKS)
def test_every_benchmark_is_a_module_with_a_main(name: str) -> None:
    tree = ast.parse((ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8"))
    assert "main" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert f"python -m benchmarks.{name}" in (ast.get_docstring(tree) or "")


def test_every_goal_names_a_benchmark() -> None:
    assert {goal.benchmark for goal in GOALS} <= set(run.BENCHMARKS)


def test_a_goal_is_met_or_missed_by_a_share_of_its_limit() -> None:
    least, most = Goal("b", "f", "t", "at least", 0.8), Goal("b", "f", "t", "at most", 10.0)
    cases = ((least, 0.8), (least, 0.6), (most, 10.0), (most, 15.0))
    verdicts = [Row(goal, measured(value)).verdict for goal, value in cases]
    assert verdicts == ["met", "missed by 25%", "met", "missed by 50%"]
    assert Row(most, None).verdict == "not measured"


def test_a_result_is_written_and_read_back_into_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "GOALS", (Goal("speed", "fast", "how fast", "at least", 2.0),))
    found = figure(ratios([6.0, 9.0, 4.0], [2.0, 3.0, 4.0]), "x")
    write("speed", tmp_path / "speed.json", {"fast": found}, None, {"rows": 3}, Clock())
    document: dict[str, Any] = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    assert document["result"]["figures"]["fast"] == {"value": 3.0, "q1": 2.0, "q3": 3.0, "n": 3, "unit": "x"}
    assert "| how fast | >= 2 | 3 (2 to 3; 3) | met |" in table.shown(table.rows(tmp_path))


def measured(value: float) -> Figure:
    return Figure(value=value, q1=value, q3=value, n=1, unit="x")
