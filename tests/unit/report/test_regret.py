"""LoRA Without Regret on a recorded grid: best rates, their ratio and the gap are those of the curves it is given."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import t

from benchmarks.lora_without_regret import BEGIN, END, GUIDE, RESULT, into_guide, markdown, read, study
from benchmarks.regret_schema import RegretReport
from benchmarks.regret_views import RegretPage, section, sentence
from benchmarks.sweep_curves import FULL_LR, LORA_LR
from graftwork.report import render_html
from tests.unit.report.test_report import Page

LUCK = {0: 0.0, 1: 0.02, 2: -0.01}


def row(values: dict[str, Any], end: float) -> dict[str, Any]:
    error = None if math.isfinite(end) else "diverged"
    losses = [[8, 2.0], [16, end]] if error is None else [[8, 9.0]]
    return {"trial_id": json.dumps(values), "values": values, "losses": losses, "error": error, "wall_s": 1.0}


def recorded(folder: Path, best: Callable[[int], float], *, full: bool = True) -> Path:
    """Parabolas on the log axis: LoRA's lowest point where `best` says, that of all weights at 0.00025, 0.05 lower."""
    detail: dict[str, list[dict[str, Any]]] = {"airport-card": [], "full": []}
    for seed, luck in LUCK.items():
        for rank in (1, 4, 16):
            for rate in LORA_LR:
                end = 1.05 + luck + math.log(rate / best(rank)) ** 2
                end = math.inf if rate == 0.008 and rank == 1 else end
                detail["airport-card"].append(row({"seed": seed, "adapter.rank": rank, "optim.lr": rate}, end))
        for rate in FULL_LR:
            detail["full"].append(row({"seed": seed, "optim.lr": rate}, 1.0 + luck / 2 + math.log(rate / 2.5e-4) ** 2))
    if not full:
        del detail["full"]
    path = folder / "curves.json"
    path.write_text(json.dumps({"result": {"detail": detail}}))
    return path


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> RegretReport:
    return study(recorded(tmp_path_factory.mktemp("regret"), lambda _: 0.0025))


def test_best_rates_are_those_of_the_curves(found: RegretReport) -> None:
    (task,) = found.tasks
    assert [curve.name for curve in task.curves] == ["rank 1", "rank 4", "rank 16", "all weights"]
    assert [curve.best.best for curve in task.curves] == [0.002, 0.002, 0.002, 2e-4]
    assert [curve.best.vertex for curve in task.curves] == [pytest.approx(0.0025)] * 3 + [pytest.approx(2.5e-4)]
    assert task.curves[0].best_by_seed == (0.002, 0.002, 0.002)
    assert task.ratio == pytest.approx(10)
    assert [task.ratio_low, task.ratio_high] == pytest.approx([5, 20])


def test_the_gap_is_paired_by_seed(found: RegretReport) -> None:
    """Against scipy's t on the differences of each seed."""
    differences = 0.05 + np.array(list(LUCK.values())) / 2 + (math.log(0.002 / 0.0025) ** 2 - math.log(2 / 2.5) ** 2)
    half = t.ppf(0.975, 2) * differences.std(ddof=1) / math.sqrt(3)
    for gap in found.tasks[0].gaps:
        assert gap.n == 3
        assert [gap.difference, gap.low, gap.high] == pytest.approx(
            [differences.mean(), differences.mean() - half, differences.mean() + half]
        )


def test_each_pattern_has_its_outcome(found: RegretReport, tmp_path: Path) -> None:
    outcomes = [claim.outcome for claim in found.claims]
    assert outcomes == ["reproduced", "reproduced", *["not reproduced"] * 3]
    moving = study(recorded(tmp_path, lambda rank: 0.004 / rank**0.5))
    assert moving.claims[0].outcome == "not reproduced"


def page_of(found: RegretReport) -> Page:
    whole = RegretPage(title="r", created_at="now", verdict=sentence(found), regret=found)
    return Page(render_html(whole, section(found)))


def test_the_page_and_the_table_show_it(found: RegretReport) -> None:
    page = Page(
        render_html(RegretPage(title="r", created_at="now", verdict=sentence(found), regret=found), section(found))
    )
    for text in ("0.002 [0.0014, 0.0028]", "rank 16", "all weights", "hardly moves with rank", "10 times [5, 20]"):
        assert text in page.text, text
        assert text in markdown(found), text


def test_without_a_full_grid_lora_stands_alone(tmp_path: Path) -> None:
    found = study(recorded(tmp_path, lambda _: 0.002, full=False))
    assert len(found.claims) == 1
    assert found.tasks[0].ratio is None
    page_of(found)


def test_the_guide_takes_the_table(found: RegretReport, tmp_path: Path) -> None:
    guide = tmp_path / "guide.md"
    guide.write_text(f"# Sweeps\n\n{BEGIN}\nold\n{END}\n\nMore.\n")
    into_guide(found, guide)
    once = guide.read_text()
    into_guide(found, guide)
    assert guide.read_text() == once
    assert once.startswith("# Sweeps\n\n")
    assert once.endswith(f"{END}\n\nMore.\n")
    assert markdown(found) in once


@pytest.mark.skipif(not RESULT.exists(), reason="the grids are not recorded yet")
def test_the_guides_table_is_that_of_the_committed_result() -> None:
    assert markdown(read(RESULT)) in GUIDE.read_text(encoding="utf-8")
