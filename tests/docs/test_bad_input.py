"""Bad input on the command line: each ends with its exit code, names key and value, and leaves nothing half-made."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.ports import free_port
from tests.tiny import write_tiny_base

ROOT = Path(__file__).parents[2]


def run(*argv: str, cwd: Path = ROOT, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The command as a person runs it."""
    done = subprocess.run(
        [Path(sys.executable).with_name("graftwork"), *argv],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT), **(env or {})},
    )
    assert "Traceback" not in done.stderr + done.stdout
    return done


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """The command ended with `code` and said all of `words`."""
    assert done.returncode == code, done.stdout + done.stderr
    for word in words:
        assert word in done.stderr, f"{word!r} is not in:\n{done.stderr}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def spec(base: Path, tmp_path: Path) -> dict[str, object]:
    """A valid training spec on a tiny base."""
    rows = [{"id": str(i), "prompt": f"card {i}", "completion": f'{{"n":{i}}}'} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "kind": "train",
        "name": "cards",
        "root": str(tmp_path / "root"),
        "base": str(base),
        "quant": {"kind": "none"},
        "data": {"train": str(tmp_path / "rows.jsonl")},
    }


def write(tmp_path: Path, spec: dict[str, object], **changed: object) -> str:
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump({**spec, **changed}))
    return str(path)


def test_unknown_key_names_the_nearest(tmp_path: Path, spec: dict[str, object]) -> None:
    refused(run("train", write(tmp_path, spec, adaptor={"rank": 4})), 2, "adaptor", "did you mean 'adapter'?")


def test_wrong_type_names_key_and_value(tmp_path: Path, spec: dict[str, object]) -> None:
    refused(run("train", write(tmp_path, spec, num_workers="two")), 2, "num_workers='two'", "integer")


def test_set_reaches_nested_keys_and_is_checked(tmp_path: Path, spec: dict[str, object]) -> None:
    refused(run("config", "check", write(tmp_path, spec), "--set", "adapter.rank=0"), 2, "adapter.rank=0")


def test_an_unknown_kind_names_the_nearest(tmp_path: Path, spec: dict[str, object]) -> None:
    path = write(tmp_path, spec, objective={"kind": "dop"})
    refused(run("train", path), 2, "objective.kind='dop'", "kind is one of sft, cpt", "did you mean 'dpo'?")


def test_missing_file(tmp_path: Path) -> None:
    refused(run("train", str(tmp_path / "none.yaml")), 2, "none.yaml", "does not exist")


def test_wrong_stage_names_the_right_command(tmp_path: Path, spec: dict[str, object]) -> None:
    refused(run("serve", write(tmp_path, spec)), 2, "graftwork train")


def test_json_errors_are_json(tmp_path: Path, spec: dict[str, object]) -> None:
    done = run("train", write(tmp_path, spec, adaptor=1), "--json")
    assert done.returncode == 2
    assert json.loads(done.stderr)["error"]["exit_code"] == 2


def test_bad_row_is_named_by_number_before_anything_starts(tmp_path: Path, spec: dict[str, object]) -> None:
    rows = tmp_path / "bad.jsonl"
    rows.write_text('{"id": "1", "prompt": "a", "completion": "b"}\n{"id": "2", "prompt": "a"}\n')
    refused(run("train", write(tmp_path, spec, data={"train": str(rows)})), 2, "row 2", "completion")
    assert not (tmp_path / "root" / "adapters").exists()


def test_empty_dataset(tmp_path: Path, spec: dict[str, object]) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    refused(run("train", write(tmp_path, spec, data={"train": str(tmp_path / "empty.jsonl")})), 2, "empty.jsonl")


def test_rows_too_long_are_refused_by_setting(tmp_path: Path, spec: dict[str, object]) -> None:
    rows = tmp_path / "long.jsonl"
    rows.write_text(json.dumps({"id": "1", "prompt": "word " * 400, "completion": "x"}) + "\n")
    path = write(tmp_path, spec, data={"train": str(rows)}, max_length=64, on_overlong="refuse")
    refused(run("train", path), 2, "row 1", "64")


def test_base_that_does_not_exist(tmp_path: Path, spec: dict[str, object]) -> None:
    refused(run("train", write(tmp_path, spec, base=str(tmp_path / "nothing"))), 2, "nothing", "Hint:")


def test_no_cluster_is_exit_3(tmp_path: Path, spec: dict[str, object]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: nobody answers there
        port = taken.getsockname()[1]
        refused(run("train", write(tmp_path, spec), "--target", f"http://127.0.0.1:{port}"), 3, str(port), "Hint:")


def test_a_place_that_is_none(tmp_path: Path, spec: dict[str, object]) -> None:
    refused(run("train", write(tmp_path, spec), "--target", "moon"), 2, "moon", "local")


def test_s3_without_credentials(tmp_path: Path, spec: dict[str, object]) -> None:
    env = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
    refused(run("adapters", "ls", "--root", "s3://bucket/team", env=env), 2, "AWS_ACCESS_KEY_ID", "Hint:")


def test_secret_in_a_uri_is_refused_and_not_repeated(tmp_path: Path, spec: dict[str, object]) -> None:
    done = run("adapters", "ls", "--root", "s3://AKIA:hunter2@bucket/team")
    refused(done, 2, "AWS_ACCESS_KEY_ID")
    assert "hunter2" not in done.stderr + done.stdout


def test_unknown_adapter(tmp_path: Path) -> None:
    refused(run("adapters", "show", "cards@latest", "--root", str(tmp_path)), 2, "cards@latest")


def test_port_in_use(tmp_path: Path, base: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        spec = {
            "kind": "serve",
            "base": str(base),
            "quant": {"kind": "none"},
            "root": str(tmp_path / "r"),
            "port": port,
            "num_cpus": 1,
        }
        path = tmp_path / "serve.yaml"
        path.write_text(yaml.safe_dump(spec))
        refused(run("serve", str(path)), 2, str(port), "Hint:")


STARTED = """
import sys
started = []
sys.addaudithook(lambda event, args: started.append(str(args)) if event == "subprocess.Popen" else None)
from graftwork.cli import main
try:
    main()
finally:
    print(*started)
"""


@pytest.mark.parametrize("wrong", ["adapter", "port"])
def test_a_wrong_serve_spec_is_refused_before_a_ray_starts(tmp_path: Path, base: Path, wrong: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1] if wrong == "port" else free_port()
        spec = {
            "kind": "serve",
            "base": str(base),
            "root": str(tmp_path / "root"),
            "port": port,
            "adapters": ["tickts@latest"] if wrong == "adapter" else [],
        }
        argv = [sys.executable, "-c", STARTED, "serve", write(tmp_path, spec)]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120, env=env)
    refused(done, 2, "tickts" if wrong == "adapter" else f"port={port}")
    assert "raylet" not in done.stdout
    assert "gcs_server" not in done.stdout


def test_a_short_secret_is_masked_as_a_whole_word_alone(tmp_path: Path) -> None:
    port = free_port()
    env = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    done = run("adapters", "ls", "--root", "s3://bucket/b-side", env=env)
    refused(done, 2, "s3://bucket/b-side", "be reached")
    assert "***" not in done.stderr


def test_a_home_folder_is_expanded_in_data_paths(tmp_path: Path, spec: dict[str, object]) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("A text of a few words. " * 50)
    changed: dict[str, object] = {"data": {"train": "~/texts"}, "objective": {"kind": "cpt"}, "max_length": 32}
    done = run(
        "plan", write(tmp_path, spec, **changed), env={"HOME": str(tmp_path), "GRAFTWORK_CACHE": str(tmp_path / "c")}
    )
    assert done.returncode == 0, done.stderr


def test_plan_names_ignored_keys_and_adapters_that_are_not_published(
    tmp_path: Path, base: Path, spec: dict[str, object]
) -> None:
    rows = [{"id": str(i), "prompt": f"card {i}", "completion": "a card", "source": "x"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("plan", write(tmp_path, spec))
    assert "warning: data.train: ignored keys: source (in 4 rows)" in done.stdout
    served: dict[str, object] = {
        "kind": "serve",
        "base": str(base),
        "root": str(tmp_path),
        "adapters": ["tickts@latest"],
    }
    done = run("plan", write(tmp_path, served))
    assert "warning: adapter tickts@latest: no adapter of task 'tickts'" in done.stdout
