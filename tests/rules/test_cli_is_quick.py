"""`graftwork --help` and `config check` answer before a person wonders: they import neither torch nor ray."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMES = ("torch", "ray", "transformers", "peft", "trl", "datasets", "s3fs", "pandas", "scipy")
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
