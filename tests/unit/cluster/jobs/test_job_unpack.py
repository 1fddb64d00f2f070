"""This code as a pod gets it: fetched from the store, held against its name, laid out, importable."""

import subprocess
import sys
from pathlib import Path

import pytest

from graftwork.cluster.jobs.packaging import build_wheel, unpack
from graftwork.errors import StorageError
from graftwork.storage.store import Store


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(folder of the store, name of the wheel in it)."""
    root = tmp_path_factory.mktemp("store")
    name, data = build_wheel()
    Store(str(root)).write_bytes(data, "wheels", name)
    return root, name


def test_a_pod_runs_the_code_that_was_submitted(wheels: tuple[Path, str], tmp_path: Path) -> None:
    root, name = wheels
    unpack(f"{root}/wheels/{name}", tmp_path)
    code = "import graftwork.cluster.jobs.driver as run; print(run.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(tmp_path)},
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(tmp_path / "graftwork" / "cluster" / "jobs" / "driver.py")


def test_other_bytes_under_its_name_are_refused(wheels: tuple[Path, str], tmp_path: Path) -> None:
    root, name = wheels
    other = name.replace(name[name.index("+") + 1 :][:12], "0" * 12)
    store = Store(str(root))
    store.write_bytes(store.read_bytes("wheels", name), "wheels", other)
    with pytest.raises(StorageError, match="hash of its content"):
        unpack(f"{root}/wheels/{other}", tmp_path)
    assert list(tmp_path.iterdir()) == []
