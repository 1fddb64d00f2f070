"""A number with its machine: what is recorded, and what never is."""

import json
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import psutil
import pytest

from graftwork import environment

ROOT = Path(__file__).parents[2]
SECRET = "s3cr3t-Value/with+signs"


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_a_record_is_json_and_names_code_machine_seed_and_command() -> None:
    record = json.loads(json.dumps(environment.collect(7, ["graftwork", "train", "a.yaml"])))
    assert record["seed"] == 7
    assert record["argv"] == ["graftwork", "train", "a.yaml"]
    assert record["packages"]["torch"] == metadata.version("torch")
    assert record["hardware"]["memory_bytes"] == psutil.virtual_memory().total
    assert 1 <= record["hardware"]["cores"] <= psutil.cpu_count()
    assert record["hardware"]["cpu"]
    assert record["time"].endswith("+00:00")


def test_the_commit_and_its_dirty_flag_are_those_of_the_checkout(tmp_path: Path) -> None:
    package = tmp_path / "checkout" / "graftwork"
    package.mkdir(parents=True)
    copy_code(package)
    git(package.parent, "init", "-q")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-q", "-m", "x")
    sha = git(package.parent, "rev-parse", "HEAD")
    assert collected_in(package.parent)["git"] == {"sha": sha, "dirty": False}
    with (package / "__init__.py").open("a") as file:
        file.write("# edited\n")
    assert collected_in(package.parent)["git"] == {"sha": sha, "dirty": True}


def test_an_installed_copy_inside_somebody_elses_repository_claims_no_commit(tmp_path: Path) -> None:
    package = tmp_path / "venv" / "graftwork"
    package.mkdir(parents=True)
    copy_code(package)
    git(tmp_path, "init", "-q")
    (tmp_path / "theirs.txt").write_text("x")
    git(tmp_path, "add", "theirs.txt")
    git(tmp_path, "commit", "-q", "-m", "x")
    assert collected_in(package.parent)["git"] is None


def test_no_secret_of_the_environment_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "RAY_AUTH_TOKEN", "MY_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    record = environment.collect(0, ["graftwork"])
    assert SECRET not in json.dumps(record)
    assert record["environment"]["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize(
    ("given_words", "shown"),
    [
        (["--token", SECRET], ["--token", "***"]),
        (["--api-key=" + SECRET], ["--api-key=***"]),
        (["AWS_SECRET_ACCESS_KEY=" + SECRET], ["AWS_SECRET_ACCESS_KEY=***"]),
        (["--set", "hub.token=" + SECRET], ["--set", "hub.token=***"]),
        (["s3://key:pass@bucket/x"], ["s3://***@bucket/x"]),
        (["root=http://u:p@host/x"], ["root=http://***@host/x"]),
        (["--set", "max_new_tokens=96"], ["--set", "max_new_tokens=96"]),
        (["--set", "token_env=MY_TOKEN"], ["--set", "token_env=MY_TOKEN"]),
        (["--token", "--json"], ["--token", "--json"]),
        (["chat", "airport-card@latest"], ["chat", "airport-card@latest"]),
    ],
)
def test_a_command_line_is_recorded_without_its_secrets(given_words: list[str], shown: list[str]) -> None:
    assert environment.redact(given_words) == shown


@pytest.mark.parametrize(
    "flag", ["--token", "--hf-token", "--password", "--client_secret", "--api-key", "AWS_ACCESS_KEY"]
)
def test_no_form_of_a_secret_flag_shows_its_value(flag: str) -> None:
    assert SECRET not in " ".join(environment.redact([f"{flag}={SECRET}", "x"]))
    if flag.startswith("--"):
        assert SECRET not in " ".join(environment.redact(["x", flag, SECRET]))


def copy_code(package: Path) -> None:
    """What `graftwork.environment` imports."""
    shutil.copytree(ROOT / "graftwork" / "storage", package / "storage", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "environment.py", "errors.py"):
        (package / name).write_bytes((ROOT / "graftwork" / name).read_bytes())


def collected_in(root: Path) -> dict[str, object]:
    """`collect` as run from a copy of the code under `root`."""
    code = "import json; from graftwork.environment import collect; print(json.dumps(collect(0, [])))"
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(root)!r}); {code}"],
        check=True,
        capture_output=True,
        text=True,
    )
    record: dict[str, object] = json.loads(done.stdout)
    return record
