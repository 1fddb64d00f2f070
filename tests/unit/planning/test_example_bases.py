"""Specs of examples/BASE/: checked, and planned from the config.json next to them; the table of examples/README.md.

python -m tests.unit.planning.test_example_bases      writes the table
"""

import json
from pathlib import Path

import pytest

from graftwork import config
from graftwork.base.model_shape import ModelShape
from graftwork.cli.config import check
from graftwork.config import Spec
from graftwork.errors import UserError
from graftwork.planning.hardware import GIB, GPUS
from graftwork.planning.memory import StagePlan
from graftwork.stages.plans import plan_spec

EXAMPLES = Path(__file__).parents[3] / "examples"
README = EXAMPLES / "README.md"
BEGIN, END = "<!-- table: python -m tests.unit.planning.test_example_bases -->\n", "<!-- end of the table -->\n"
PARAMETERS = {  # published totals, of the models' pages
    "qwen3-0.6b": 0.596e9,
    "qwen3-8b-h100": 8.19e9,
    "llama-3.1-8b": 8.03e9,
    "gemma-3-4b": 4.30e9,
    "gpt-oss-20b": 20.9e9,
    "qwen3-30b-a3b": 30.5e9,
}
MACHINES = {"1 x 24": ("rtx4090", 1), "1 x 80": ("h100", 1), "8 x 80": ("h100", 8)}


@pytest.fixture(autouse=True)
def nothing_in_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize("name", PARAMETERS)
def test_an_example_is_checked_and_planned_from_its_config_alone(name: str) -> None:
    for stage in ("train", "serve", "compare"):
        check(EXAMPLES / name / f"{stage}.yaml")
    for stage in ("train", "serve"):
        for gpu, count in MACHINES.values():
            found = planned(load(name, stage), EXAMPLES / name, gpu, count)
            if isinstance(found, StagePlan):
                assert found.stage.split()[0] == stage
                assert any("is not on this machine" in one for one in found.warnings)
            else:
                assert "95%" in found.rule, f"{stage} on {gpu}: {found}"
    [line] = plan_spec(load(name, "compare"), EXAMPLES / name)
    assert line.peak_bytes_per_process > 0


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_facts_of_a_config_make_the_published_number_of_parameters(name: str) -> None:
    facts = json.loads((EXAMPLES / name / "config.json").read_text(encoding="utf-8"))
    assert ModelShape.from_config(facts).params == pytest.approx(PARAMETERS[name], rel=0.002)


def test_the_readme_shows_the_plans() -> None:
    assert table() in README.read_text(encoding="utf-8"), "python -m tests.unit.planning.test_example_bases"


def load(name: str, stage: str) -> Spec:
    return config.load(EXAMPLES / name / f"{stage}.yaml", [])


def planned(spec: Spec, folder: Path, gpu: str, count: int) -> StagePlan | UserError:
    """The plan on `count` GPUs, or the error that names what the least setting would take."""
    workers = count if spec.model_dump()["kind"] == "train" else None
    try:
        [line] = plan_spec(spec, folder, GPUS[gpu], workers)
    except UserError as error:
        return error
    return line


def table() -> str:
    """A line an example and stage: GiB of a GPU, and of the least setting where it does not fit."""
    lines = [f"| example | stage | parameters | {' | '.join(MACHINES)} |", f"|---|---|---|{'---|' * len(MACHINES)}"]
    for name, total in PARAMETERS.items():
        for stage in ("train", "serve"):
            cells = []
            for gpu, count in MACHINES.values():
                if stage == "serve" and count > 1:
                    cells.append("as 1 x 80, a replica")
                    continue
                found = planned(load(name, stage), EXAMPLES / name, gpu, count)
                if isinstance(found, StagePlan):
                    gib = f"{found.peak_bytes_per_process / GIB:.1f} GiB"
                    cells.append(gib if found.fits else f"no: {gib}")
                else:
                    least = found.problem.partition("can take is ")[2].split(" ")[0]
                    cells.append(f"no: {least} GiB")
            lines.append(f"| {name} | {stage} | {total / 1e9:.3g}B | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    README.write_text(before + BEGIN + table() + END + rest.split(END)[1], encoding="utf-8")
