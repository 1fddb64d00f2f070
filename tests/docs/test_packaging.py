"""Wheel and sdist carry the whole package, the four linked folders included, and run."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import graftwork

ROOT = Path(__file__).parents[2]
CODE = (
    "import graftwork.training.spec, graftwork.tuning.spec, graftwork.serving.spec, graftwork.cluster; "
    "print(graftwork.__file__)"
)


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel built from the sdist, as pip does it for a user who has only the sdist."""
    out = tmp_path_factory.mktemp("dist")
    build = "import sys; from hatchling.build import build_sdist; print(build_sdist(sys.argv[1]))"
    sdist = subprocess.run(
        [sys.executable, "-c", build, str(out)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    name = sdist.stdout.strip().splitlines()[-1]
    unpacked = out / "unpacked"
    unpacked.mkdir()
    subprocess.run(["tar", "xzf", str(out / name), "-C", str(unpacked), "--strip-components=1"], check=True)
    wheel = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", wheel, str(out)], cwd=unpacked, capture_output=True, text=True, check=True)
    return out


def test_wheel_from_sdist_holds_real_folders_under_one_name(dist: Path) -> None:
    names = zipfile.ZipFile(next(dist.glob("*.whl"))).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"graftwork"}
    for folder in ("training", "serving", "tuning"):
        assert f"graftwork/{folder}/spec.py" in names
    assert "graftwork/serving/api/page/index.html" in names


def test_wheel_runs_outside_the_checkout(dist: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True, system_site_packages=False)
    python = tmp_path / "venv/bin/python"
    site = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True, check=True
    )
    own = [path for path in sys.path if path.endswith("site-packages")]
    (Path(site.stdout.strip()) / "host.pth").write_text(
        "\n".join(own)
    )  # the host's libraries, not the host's graftwork
    pip = [str(python), "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(next(dist.glob("*.whl")))]
    subprocess.run(pip, check=True, capture_output=True)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([python, "-c", CODE], cwd=tmp_path, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "venv") in done.stdout, "the wheel's own copy was imported"
    done = subprocess.run(
        [tmp_path / "venv/bin/graftwork", "--help"], cwd=tmp_path, capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


@pytest.fixture
def unlinked(tmp_path: Path) -> Path:
    """A checkout as a zip of the repository leaves it: each link is a file that holds its target."""
    tree = tmp_path / "tree"
    tree.mkdir()
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", "HEAD"], capture_output=True, check=False)
    if archive.returncode:
        pytest.skip("not a git checkout")
    subprocess.run(["tar", "x", "-C", str(tree)], input=archive.stdout, check=True)
    for folder in ("cluster", "training", "serving", "tuning"):
        (tree / "graftwork" / folder).unlink()
        (tree / "graftwork" / folder).write_text(f"../{folder}")
    return tree


def test_a_zip_of_the_repository_installs_with_its_four_folders(unlinked: Path, dist: Path, tmp_path: Path) -> None:
    zipped = shutil.make_archive(str(tmp_path / "repository"), "zip", unlinked.parent, unlinked.name)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), zipped]
    subprocess.run(pip, check=True, capture_output=True)
    built, usual = (zipfile.ZipFile(next(folder.glob("*.whl"))).namelist() for folder in (tmp_path, dist))
    assert sorted(built) == sorted(usual)
    assert len(built) == len(set(built))


def test_the_sdist_carries_licence_and_rules(dist: Path) -> None:
    for name in ("LICENSE", "CONTRIBUTING.md", "SECURITY.md"):
        assert (dist / "unpacked" / name).read_text(encoding="utf-8").strip()


def test_the_wheel_carries_the_licence(dist: Path) -> None:
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith("licenses/LICENSE"))
        text = wheel.read(name).decode()
        metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith("/METADATA"))).decode()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "License-Expression: Apache-2.0" in metadata


def test_install_advice_names_the_requirements_of_the_extras() -> None:
    """No index has this project's extras, so that messages name the packages themselves."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    known = {requirement for extra in extras.values() for requirement in extra}
    advice = [
        found
        for folder in ("graftwork", "cluster", "training", "serving", "tuning")
        for path in (ROOT / folder).rglob("*.py")
        for found in re.findall(r"pip install ((?:'[^']+' ?)+)", path.read_text(encoding="utf-8"))
    ]
    named = {requirement for found in advice for requirement in re.findall(r"'([^']+)'", found)}
    assert len(named) >= 6
    assert {requirement for requirement in named if "{" not in requirement} <= known  # one is of the cluster's Ray


def test_the_version_is_printed() -> None:
    command = [str(Path(sys.executable).with_name("graftwork")), "--version"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.stdout.strip() == f"graftwork {graftwork.__version__}"


def test_the_shell_completes_commands() -> None:
    command = [str(Path(sys.executable).with_name("graftwork"))]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COMP_WORDS": "graftwork tr", "COMP_CWORD": "1"}
    env["_GRAFTWORK_COMPLETE"] = "complete_bash"
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert "train" in done.stdout.split()


def test_a_checkout_without_links_still_imports(unlinked: Path, tmp_path: Path) -> None:
    tree = unlinked
    env = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=tmp_path, capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    assert str(tree) in done.stdout
