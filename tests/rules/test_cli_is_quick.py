"""What people wait for answers before they wonder: it imports neither torch nor ray, nor what one place alone needs."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from graftwork.cluster.jobs.models import Job
from graftwork.cluster.jobs.store import JobStore
from graftwork.environment import measure_speed, speed_file

ROOT = Path(__file__).parents[2]
NAMES = ("torch", "ray", "transformers", "peft", "trl", "datasets", "s3fs", "pandas", "scipy", "kubernetes", "httpx")
HEAVY = f"[m for m in {NAMES} if m in sys.modules]"


def heavy_after(*argv: str) -> str:
    code = (
        f"import sys; sys.argv = ['graftwork', *{list(argv)!r}]\n"
        "from graftwork.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"print('HEAVY', {HEAVY})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_imports_nothing_heavy() -> None:
    assert "HEAVY []" in heavy_after("--help")


def test_config_check_imports_nothing_heavy() -> None:
    assert "HEAVY []" in heavy_after("config", "check", "examples/train-airport-card.yaml")


@pytest.mark.parametrize("verb", [("ls",), ("status", "cards"), ("logs", "cards")], ids=lambda verb: verb[0])
def test_jobs_of_a_disk_import_nothing_heavy(tmp_path: Path, verb: tuple[str, ...]) -> None:
    job = Job("cards", "exec", "a" * 64, str(tmp_path), {"argv": ["true"]})
    runs = JobStore(job.root)
    runs.record(job, "local")
    runs.open_attempt(job.job_id, 1)
    assert "HEAVY []" in heavy_after("jobs", *verb, "--root", job.root)


def test_a_plan_of_training_imports_nothing_heavy() -> None:
    if not (file := speed_file()).exists():  # a busy machine keeps no figure
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(measure_speed())))
    heavy_after("plan", "examples/train-airport-card.yaml")  # the first plan of a base counts its sizes with torch
    assert "HEAVY []" in heavy_after("plan", "examples/train-airport-card.yaml")


def test_the_driver_of_a_run_imports_neither_torch_nor_ray() -> None:
    """Its worker imports them: 5 s of CPU that the driver of a single local worker would pay again."""
    code = "import sys, graftwork.training.run\nassert not {'torch', 'peft', 'trl', 'ray'} & {*sys.modules}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
