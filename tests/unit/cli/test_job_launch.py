"""A stage's command as a job: started once, found again, gone on with, ended by Ctrl-C; and what is said of it."""

import io
import json
import os
import re
import signal
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from graftwork.cli import app
from graftwork.cli.options import LaunchOptions
from graftwork.cli.render import show_list
from graftwork.cluster.jobs.launch import follow
from graftwork.cluster.jobs.models import ExecSpec, Job, JobStatus
from graftwork.cluster.jobs.store import JobStore
from graftwork.cluster.spec import ClusterSpec
from graftwork.cluster.targets import backend_of
from graftwork.errors import ClusterError, ConfigError, Interrupted
from graftwork.stages.jobs import job_of
from tests.waiting import until


def cli(*argv: str) -> str:
    done = CliRunner().invoke(app, list(argv))
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def write(folder: Path, name: str, code: str) -> str:
    spec = {"kind": "exec", "name": name, "root": str(folder / "root"), "argv": [sys.executable, "-c", code]}
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(spec))
    return str(file)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            LaunchOptions(target="ray://127.0.0.1:10001", detach=True),
            ["--target ray://127.0.0.1:10001", "--target http://127.0.0.1:8265"],
        ),
        (LaunchOptions(target="auto", detach=True), ["--target auto", "--target http://HOST:8265"]),
        (LaunchOptions(deadline="2h", budget=3.0), ["--deadline, --budget with --target local", "add --detach"]),
    ],
)
def test_flags_without_effect_are_refused(options: LaunchOptions, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        _ = options.is_job
    for word in words:
        assert word in str(refused.value)


def test_limits_of_the_command_line_replace_the_clusters(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("kind: cluster\nlimits: {deadline: 12h, pending: 5m}\nprices: {cpu_hour: 0.04}\n")
    limits = LaunchOptions(target="k8s:a/b", cluster_config=file, deadline="2h", budget=20).cluster_spec().limits
    assert (limits.deadline, limits.pending, limits.budget_usd) == (7200, 300, 20)
    with pytest.raises(ConfigError, match="2 hours"):
        LaunchOptions(target="k8s:a/b", cluster_config=file, deadline="2 hours").cluster_spec()
    with pytest.raises(ConfigError, match="no prices"):
        LaunchOptions(target="k8s:a/b", budget=20).cluster_spec()


@pytest.mark.long
def test_the_same_command_finds_goes_on_and_tells_of_success(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "twice",
        f"import os,sys; p={str(tmp_path / 'been')!r}; "
        "print('published x@1') if os.path.exists(p) else (open(p,'w').close(), sys.exit(3))",
    )
    root = ["--root", str(tmp_path / "root")]
    cli("exec", file, "--detach")
    assert CliRunner().invoke(app, ["jobs", "wait", "twice", *root]).exit_code == 3
    [failed] = json.loads(cli("jobs", "ls", "--json", *root))
    assert (failed["state"], failed["attempt"]) == ("failed", 1)
    cli("exec", file, "--detach")  # the same command: it goes on
    waited = json.loads(cli("jobs", "wait", "twice", "--json", *root))
    assert (waited["state"], waited["attempt"], waited["left"]) == ("succeeded", 2, ["published x@1"])
    again = json.loads(cli("exec", file, "--detach", "--json"))
    assert (again["state"], again["attempt"]) == ("succeeded", 2)
    assert cli("jobs", "logs", "twice-a1", *root) == ""
    assert cli("jobs", "logs", "twice", "--tail", "1", *root) == "published x@1\n"
    assert "published x@1" in cli("jobs", "status", "twice", *root)


@pytest.mark.long
@pytest.mark.parametrize("ours", [True, False])
def test_ctrl_c_ends_what_the_command_began_and_no_more(tmp_path: Path, ours: bool) -> None:
    spec = ExecSpec(
        name="long", root=str(tmp_path), argv=(sys.executable, "-uc", "print(1); import time; time.sleep(99)")
    )
    job = job_of(spec, ClusterSpec())
    backend = backend_of("local", job.root)
    backend.submit(job)
    printed = io.StringIO()

    def press() -> None:
        until(lambda: "1" in printed.getvalue(), "the command prints", within_s=20)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    with pytest.raises(Interrupted, match="cancelled at local by Ctrl-C" if ours else "it goes on"):
        follow(backend, job.root, job.job_id, printed, lambda _: None, cancels=ours)
    assert backend.status(job.job_id).state == ("cancelled" if ours else "running")
    assert backend.cancel(job.job_id).state == "cancelled"


def test_jobs_of_a_place_that_does_not_answer_are_told_from_the_store(tmp_path: Path) -> None:
    job = Job("cards", "exec", "a" * 64, str(tmp_path), {"argv": ["true"]})
    runs = JobStore(job.root)
    runs.record(job, "http://127.0.0.1:9")
    runs.open_attempt(job.job_id, 1)
    root = ["--root", job.root]
    for verb in (["ls"], ["status", "cards"]):
        done = CliRunner().invoke(app, ["jobs", *verb, *root])
        assert done.exit_code == 0
        assert job.job_id in done.stdout
        assert "http://127.0.0.1:9 does not answer" in done.stderr
    done = CliRunner().invoke(app, ["jobs", "cancel", "cards", *root])
    assert isinstance(done.exception, ClusterError)
    assert "asked to end by the store" in done.exception.rule
    assert f"graftwork jobs cancel {job.job_id} --root {job.root}" in done.exception.hint


@pytest.mark.parametrize(("columns", "shown"), [(60, ["job", "state", "age"]), (90, ["progress"]), (140, ["where"])])
def test_a_narrow_terminal_keeps_the_id_whole(columns: int, shown: list[str]) -> None:
    out = Console(file=io.StringIO(), width=columns, force_terminal=True, highlight=False)
    name, progress = "a-rather-long-name-0123456789", "[bold]step 4 of 9, " * 20
    job = JobStatus(name, 1, "running", on="k8s:a/b", kind="train", submitted_at=0, progress=progress)
    show_list([job], "r", 1, out)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert name in text
    assert all(word in text for word in shown)
    assert max(map(len, strip_ansi(text).splitlines())) <= columns


def strip_ansi(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
