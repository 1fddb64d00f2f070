"""Wheel, sdist, zip archive, editable install and checkout: each has the four folders of the top level and runs.

A checkout imports them through links in graftwork/, with the real path of every module: debuggers and type checkers.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import graftwork

ROOT = Path(__file__).parents[2]
FOLDERS = ("cluster", "training", "serving", "tuning")
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


def make_venv(folder: Path) -> Path:
    """Return the folder of a new venv that has the libraries of this process, but not its graftwork."""
    venv.create(folder, with_pip=True, system_site_packages=False)
    find: list[str | Path] = [folder / "bin/python", "-c", "import site; print(site.getsitepackages()[0])"]
    site = subprocess.run(find, capture_output=True, text=True, check=True).stdout.strip()
    own = [path for path in sys.path if path.endswith("site-packages")]
    (Path(site) / "host.pth").write_text("\n".join(own))  # .pth files in these folders are not read
    return folder


def run_in(folder: Path, *command: str | Path) -> str:
    """Return what a command prints that is started in `folder` without PYTHONPATH. It must succeed."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_runs_outside_the_checkout(dist: Path, tmp_path: Path) -> None:
    made = make_venv(tmp_path / "venv")
    wheel = next(dist.glob("*.whl"))
    run_in(tmp_path, made / "bin/python", "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel)
    assert str(made) in run_in(tmp_path, made / "bin/python", "-c", CODE), "the wheel's own copy was imported"
    assert "train" in run_in(tmp_path, made / "bin/graftwork", "--help")


@pytest.mark.long
def test_an_editable_install_imports_the_checkout_by_its_real_paths(tmp_path: Path) -> None:
    made = make_venv(tmp_path / "venv")
    options = ["-q", "--no-index", "--no-deps", "--no-build-isolation"]
    run_in(tmp_path, made / "bin/python", "-m", "pip", "install", *options, "-e", ROOT)
    names = "; ".join(f"import graftwork.{folder}.spec; print(graftwork.{folder}.spec.__file__)" for folder in FOLDERS)
    found = run_in(tmp_path, made / "bin/python", "-c", names).split()
    assert found == [str(ROOT / folder / "spec.py") for folder in FOLDERS]
    assert run_in(tmp_path, made / "bin/graftwork", "--version").strip() == f"graftwork {graftwork.__version__}"


@pytest.mark.parametrize(
    ("file", "function", "arguments"),
    [
        ("cluster/session.py", "is_loopback", ("127.0.0.1",)),
        ("serving/arms.py", "base_name", ("bases/small.gguf",)),
        ("training/lr_schedule.py", "factor_at", (((0.5, 2.0),), 1, 4)),
        ("tuning/retry.py", "message_of", ("out of memory",)),
    ],
)
def test_a_breakpoint_in_a_folder_of_the_top_level_is_hit(
    file: str, function: str, arguments: tuple[object, ...], tmp_path: Path
) -> None:
    [found] = [
        node
        for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == function
    ]
    line = found.body[1].lineno  # behind the docstring
    program = f"""
import bdb

class Stop(bdb.Bdb):
    def user_line(self, frame):
        print("stopped at", frame.f_code.co_filename, frame.f_lineno)
        self.set_continue()

from graftwork.{file.removesuffix(".py").replace("/", ".")} import {function}
debugger = Stop()
problem = debugger.set_break({str(ROOT / file)!r}, {line})
assert problem is None, problem
debugger.reset()
debugger.set_continue()
import sys
sys.settrace(debugger.trace_dispatch)
{function}(*{arguments!r})
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, env=env, check=True
    )
    assert f"stopped at {ROOT / file} {line}" in done.stdout.splitlines()


PYRIGHT = Path(sys.executable).with_name("basedpyright")
PROBE = """
from graftwork.cluster.spec import ClusterSpec
from graftwork.serving.spec import ServeSpec
from graftwork.training.spec import TrainSpec
from graftwork.tuning.spec import TuneSpec


def probe(cluster: ClusterSpec, serving: ServeSpec, training: TrainSpec, tuning: TuneSpec) -> None:
    a: int = cluster
    b: int = serving
    c: int = training
    d: int = tuning
"""
"""Four lines that are wrong where the type checker knows the four classes; mypy reads the same four below."""

if TYPE_CHECKING:
    from graftwork.cluster.spec import ClusterSpec
    from graftwork.serving.spec import ServeSpec
    from graftwork.training.spec import TrainSpec
    from graftwork.tuning.spec import TuneSpec

    def probe(cluster: ClusterSpec, serving: ServeSpec, training: TrainSpec, tuning: TuneSpec) -> None:
        """`make check` fails at a comment that ignores nothing, which is where mypy does not know the class."""
        cluster_of: int = cluster  # type: ignore[assignment]
        serving_of: int = serving  # type: ignore[assignment]
        training_of: int = training  # type: ignore[assignment]
        tuning_of: int = tuning  # type: ignore[assignment]
        print(cluster_of, serving_of, training_of, tuning_of)


@pytest.mark.long
@pytest.mark.skipif(not PYRIGHT.exists(), reason="basedpyright of the extra dev is not installed")
def test_pyright_knows_the_classes_of_the_four_folders(tmp_path: Path) -> None:
    (tmp_path / "probe.py").write_text(PROBE)
    (tmp_path / "pyrightconfig.json").write_text(f'{{"extraPaths": ["{ROOT}"], "typeCheckingMode": "basic"}}')
    command: list[str | Path] = [PYRIGHT, "--pythonpath", sys.executable, "--project", "."]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env, check=False).stdout
    for name in ("ClusterSpec", "ServeSpec", "TrainSpec", "TuneSpec"):
        assert f'Type "{name}" is not assignable to declared type "int"' in said, said
    assert "4 errors" in said


@pytest.fixture
def unlinked(tmp_path: Path) -> Path:
    """A checkout as a zip of the repository leaves it: each link is a file that holds its target."""
    tree = tmp_path / "tree"
    tree.mkdir()
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", "HEAD"], capture_output=True, check=False)
    if archive.returncode:
        pytest.skip("not a git checkout")
    subprocess.run(["tar", "x", "-C", str(tree)], input=archive.stdout, check=True)
    for folder in FOLDERS:
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
