"""Folders of the cache: whole or not there, whoever dies."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from graftwork.storage.local import build_once

KILLED_WHILE_BUILDING = """
import os, signal, sys
from pathlib import Path
from graftwork.storage.local import build_once
def build(folder):
    (folder / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL if sys.argv[2] == "kill" else signal.SIGINT)
build_once(Path(sys.argv[1]), build)
"""


def fill(folder: Path) -> None:
    (folder / "whole").write_text("whole", encoding="utf-8")


def test_a_folder_is_built_once(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    assert build_once(folder, fill) == folder
    assert build_once(folder, lambda _: pytest.fail("built twice")) == folder
    assert [path.name for path in folder.iterdir()] == ["whole"]


def test_a_build_that_raises_leaves_nothing_and_the_next_succeeds(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        fill(folder)
        raise ValueError("disk full")

    with pytest.raises(ValueError, match="disk full"):
        build_once(tmp_path / "folder", fail)
    assert [path.name for path in tmp_path.iterdir()] == [".folder.lock"]
    assert (build_once(tmp_path / "folder", fill) / "whole").is_file()


@pytest.mark.parametrize(("how", "code"), [("kill", -signal.SIGKILL), ("interrupt", -signal.SIGINT)])
def test_a_builder_that_dies_leaves_no_folder_and_frees_its_lock(tmp_path: Path, how: str, code: int) -> None:
    folder = tmp_path / "folder"
    command = [sys.executable, "-c", KILLED_WHILE_BUILDING, str(folder), how]
    assert subprocess.run(command, stderr=subprocess.DEVNULL, timeout=60, check=False).returncode == code
    assert not folder.exists()
    assert [path.name for path in build_once(folder, fill).iterdir()] == ["whole"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".folder.lock", "folder"]
