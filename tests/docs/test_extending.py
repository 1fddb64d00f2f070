"""docs/extending.md: the diff of each section is applied to a copy of the package, and its variant runs there.

A section is a `##` heading with one ```diff block. Its program is `extending/<heading in lower case, - for spaces>.py`,
which runs in a process of its own with the changed copy first on the path and exits with 0 if the variant works.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "extending.md"
PROGRAMS = Path(__file__).parent / "extending"
PARTS = ("graftwork", "training", "serving", "tuning", "cluster")
MOST_FILES = {"adapter-kind": 3, "quantization": 2, "search-algorithm": 2, "objective": 2, "retriever": 2, "scorer": 2}
"""Files that adding one variant may edit, the one with the table or the union included."""


def sections() -> dict[str, list[str]]:
    """Return the diffs of the page by the name of their section."""
    found = {}
    for section in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]:
        diffs = re.findall(r"^```diff\n(.*?)^```$", section, flags=re.M | re.S)
        if diffs:
            found[section.splitlines()[0].strip().lower().replace(" ", "-")] = diffs
    return found


def files_of(diff: str) -> list[str]:
    return re.findall(r"^\+\+\+ b/(\S+)$", diff, flags=re.M)


def test_every_section_with_a_diff_has_a_program_and_every_program_a_section() -> None:
    programs = {path.stem.replace("_", "-") for path in PROGRAMS.glob("*.py")} - {"common"}
    assert programs == set(sections())


@pytest.mark.parametrize("name", sorted(sections()))
def test_adding_a_variant_edits_few_files(name: str) -> None:
    [diff] = sections()[name]
    assert 1 <= len(files_of(diff)) <= MOST_FILES[name]


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(sections()))
def test_a_variant_works_after_its_diff(name: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for part in PARTS:
        shutil.copytree(ROOT / part, copy / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "tests").symlink_to(ROOT / "tests")
    [diff] = sections()[name]
    applied = subprocess.run(["git", "apply", "--whitespace=nowarn", "-"], cwd=copy, input=diff, text=True, check=False)
    assert applied.returncode == 0, "the diff does not fit the sources: update docs/extending.md"
    program = PROGRAMS / f"{name.replace('-', '_')}.py"
    environment = {**os.environ, "PYTHONPATH": str(copy), "GRAFTWORK_CACHE": str(tmp_path / "cache")}
    run = subprocess.run(
        [sys.executable, str(program), str(tmp_path / "work")],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
