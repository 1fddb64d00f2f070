"""A checkout without the parts of the Kubernetes tests says so: `make test-k8s` fails, CI's last line names the gap."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.k8s.server import crd_files
from tests.process_races import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make here: apt-get install make")
NOT_TESTED = re.compile(
    r"NOT TESTED ON KUBERNETES: GRAFTWORK_CRDS='[^']*' is no folder with KubeRay's CRDs\. Get them: git clone .*"
)


@pytest.mark.parametrize("crds", ["", "/nowhere"])
def test_make_fails_without_crds_before_it_builds_anything(tmp_path: Path, crds: str) -> None:
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")  # under `make test` the inner make would print its folder last
    own = {key: value for key, value in os.environ.items() if key not in outer}
    own |= {"GRAFTWORK_CRDS": crds, "GRAFTWORK_CACHE": str(tmp_path)}
    command = ["make", "test-k8s", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True)
    assert done.returncode == 2
    assert NOT_TESTED.fullmatch(done.stdout.splitlines()[-1])
    assert list(tmp_path.iterdir()) == []


def run_ci(folder: Path, make: str) -> "subprocess.CompletedProcess[str]":
    """The real script, with `make` and the build of the API server in place of programs that take half an hour."""
    checkout, bin_ = folder / "checkout", folder / "bin"
    (checkout / "tests" / "k8s").mkdir(parents=True)
    (checkout / ".ci").mkdir()
    bin_.mkdir()
    shutil.copy(ROOT / ".ci" / "run", checkout / ".ci" / "run")
    shutil.copy(ROOT / "tests" / "k8s" / "require_parts.sh", checkout / "tests" / "k8s")
    (checkout / "tests" / "k8s" / "build_apiserver.sh").write_text("exit 0\n")
    for name in ("make", "apt-get", "etcd", "openssl"):
        (bin_ / name).write_text(f"#!/bin/sh\n{make if name == 'make' else ''}\n")
        (bin_ / name).chmod(0o755)
    own = {key: value for key, value in os.environ.items() if key != "GRAFTWORK_CRDS"}
    own |= {"PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}", "GRAFTWORK_CACHE": str(folder)}
    return subprocess.run(["bash", str(checkout / ".ci" / "run")], env=own, capture_output=True, text=True)


@pytest.mark.parametrize("there", [False, True])
def test_ci_says_last_that_nothing_was_tested_on_kubernetes(tmp_path: Path, there: bool) -> None:
    log = tmp_path / "log"
    if there:
        crds = tmp_path / "shared" / "kuberay-crds"
        crds.mkdir(parents=True)
        (crds / "ray.io_rayjobs.yaml").touch()
    done = run_ci(tmp_path, f'echo "crds=$GRAFTWORK_CRDS $*" >> {log}')
    assert done.returncode == 0, done.stderr
    made = [line.split(" ") for line in log.read_text().splitlines()]
    targets = [[word for word in words if "=" not in word] for _, *words in made]
    assert targets == [["check"], ["coverage", "rest"], ["long"], *([["test-k8s"]] if there else [])]
    if there:
        assert made[-1][0] == f"crds={tmp_path / 'shared' / 'kuberay-crds'}"
        assert "NOT TESTED" not in done.stdout
    else:
        assert NOT_TESTED.fullmatch(done.stdout.splitlines()[-1].removeprefix("*** "))


@pytest.mark.parametrize("fails", ["check", "coverage", "long", "test-k8s"])
def test_ci_fails_where_one_part_fails(tmp_path: Path, fails: str) -> None:
    (tmp_path / "shared" / "kuberay-crds").mkdir(parents=True)
    (tmp_path / "shared" / "kuberay-crds" / "ray.io_rayjobs.yaml").touch()
    done = run_ci(tmp_path, f'echo "made $1"; [ "$1" != {fails} ]')
    assert done.returncode != 0
    assert done.stdout.splitlines()[-1] == f"made {fails}"


def test_the_tests_take_crds_from_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAFTWORK_CRDS", raising=False)
    assert crd_files() == []


def test_the_docs_name_the_version_that_is_shipped() -> None:
    said = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    values = (ROOT / "k8s" / "operator-values.yaml").read_text(encoding="utf-8")
    [version] = re.findall(r"tag: (v[\d.]+)", values)
    script = (ROOT / "tests" / "k8s" / "require_parts.sh").read_text(encoding="utf-8")
    for text in (said, script):
        assert f"git clone --depth 1 --branch {version} " in text
        assert "ray-operator/config/crd/bases" in text
