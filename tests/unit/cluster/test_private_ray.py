"""Addresses, shipping and the environment of a private Ray; no Ray is started here."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from graftwork.cli import app
from graftwork.cluster.jobs.packaging import LINKED, shipped
from graftwork.cluster.private_ray import environment_of, own_folder
from graftwork.cluster.session import Session, host_and_port, session, without_target
from graftwork.cluster.targets.ray_jobs import run_command
from graftwork.errors import ClusterError, ConfigError
from tests.process_races import ROOT, fork_race
from tests.training import task


@pytest.mark.parametrize(
    ("on", "found"),
    [
        ("http://head", ("head", 80)),
        ("http://127.0.0.1:8265/", ("127.0.0.1", 8265)),
        ("https://ray.example.org", ("ray.example.org", 443)),
        ("http://[::1]:8265", ("::1", 8265)),
    ],
)
def test_addresses(on: str, found: tuple[str, int]) -> None:
    assert host_and_port(on) == found


@pytest.mark.parametrize(
    "on", ["ray://head:10001", "http://", "http://host:port", "http://me:secret@host:8265", "http://host:8265/jobs"]
)
def test_what_is_no_address_is_refused(on: str) -> None:
    with pytest.raises(ConfigError, match="not an address of a Ray"):
        host_and_port(on)


@pytest.mark.parametrize("on", ["kubernetes", "localhost:8265", "s3://bucket"])
def test_an_unknown_place_is_refused_with_the_known_ones(on: str) -> None:
    with pytest.raises(ConfigError, match="not a place to run") as caught, session(on):
        pass
    assert "http(s)://HOST:PORT" in caught.value.rule
    assert "http://HOST:8265" in caught.value.hint


@pytest.mark.parametrize(
    ("verb", "on", "use"),
    [
        ("train", "auto", "--target http://HOST:8265"),
        ("train", "ray://10.0.0.7:10001", "--target http://10.0.0.7:8265"),
        ("train", "ray://", "--target http://HOST:8265"),
        *(
            (verb, "ray://10.0.0.7:10001", "--target http://10.0.0.7:8265")
            for verb in ("train --detach", "serve", "demo", "doctor", "plan")
        ),
    ],
)
def test_an_address_that_a_driver_would_join_is_refused_with_the_dashboards(verb: str, on: str, use: str) -> None:
    name, *flags = verb.split()
    file = {"train": "train-airport-card", "plan": "train-airport-card", "serve": "serve", "demo": "demo"}.get(name)
    argv = [name, *([str(ROOT / "examples" / f"{file}.yaml")] if file else []), *flags, "--target", on]
    done = CliRunner().invoke(app, argv)
    error = done.exception
    assert isinstance(error, ConfigError), (done.output, error)
    assert error.subject == f"--target {on}"
    assert error.problem == "commands do not join a Ray as its driver or client"
    assert "http://HOST:8265" in error.rule
    assert error.hint == use


def test_nobody_listening_is_said_with_what_to_do() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        on = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(ClusterError, match="nothing answers at 127.0.0.1") as caught:
            run_command(on, ["demo", "demo.yaml"])
    assert caught.value.exit_code == 3
    assert "--target local" in caught.value.hint


def test_a_jobs_command_needs_a_surrounding_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ClusterError, match="RAY_ADDRESS is not set"), session("job"):
        pass


def test_an_http_address_takes_commands_not_programs() -> None:
    with pytest.raises(ConfigError, match="not the graftwork command"), session("http://127.0.0.1:8265"):
        pass


def test_a_relative_root_is_refused_on_a_cluster(tmp_path: Path) -> None:
    def stage(spec: object) -> None:
        raise AssertionError("it must not start")

    here = Session("job", "127.0.0.1:6379")
    with pytest.raises(ConfigError, match=r"root=\.graftwork with --target job"):
        here.run(stage, task(tmp_path, root=".graftwork"))


def test_the_on_option_is_left_out_of_what_is_sent() -> None:
    argv = ["train", "a.yaml", "--target", "http://h:1", "--set", "seed=1", "--target=http://x:1", "--json"]
    assert without_target(argv) == ["train", "a.yaml", "--set", "seed=1", "--json"]


def test_the_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    with environment_of({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t"}):
        assert os.environ["RAY_AUTH_MODE"] == "token"
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_the_shipped_folder_runs_without_this_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "specs").mkdir()
    (tmp_path / "specs" / "a.yaml").write_text("kind: train\n")
    program = "import graftwork, graftwork.training.spec, graftwork.serving.spec; print(graftwork.__file__)"
    with shipped([Path("specs/a.yaml")]) as folder:
        assert (folder / "specs" / "a.yaml").read_text() == "kind: train\n"
        assert all((folder / "graftwork" / name / "__init__.py").is_file() for name in LINKED)
        assert not [path for path in folder.rglob("*") if path.is_symlink() or path.name == "__pycache__"]
        environment = {**os.environ, "PYTHONPATH": ""}
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=folder, env=environment, text=True, capture_output=True, check=True
        )
    assert done.stdout.strip() == str(folder / "graftwork" / "__init__.py")
    assert not folder.exists()


def test_private_rays_that_start_together_keep_their_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each start removes the folders of dead owners: never one that another process is just making."""

    def start_and_stop() -> None:
        for _ in range(100):
            folder, lock = own_folder()
            assert folder.is_dir()
            shutil.rmtree(folder)
            os.close(lock)

    with tempfile.TemporaryDirectory(prefix="gwt-", dir="/tmp") as place:
        monkeypatch.setattr(tempfile, "tempdir", place)
        assert fork_race([start_and_stop] * 4) == [{"done": None}] * 4
        assert os.listdir(place) == []
