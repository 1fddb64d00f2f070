"""`graftwork train|serve|exec|chat|demo FILE`, and the run of every stage command: here, or as a job."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from graftwork import config
from graftwork.cli.options import JsonFlag, LaunchOptions, Sets, SpecFile, Target, with_options
from graftwork.cli.render import (
    console,
    duration,
    echo,
    gib,
    left_behind,
    line_of,
    next_commands,
    note,
    print_json,
    progress_bar,
    show_outcomes,
)
from graftwork.cluster.jobs.launch import follow, root_flag, start_or_find
from graftwork.cluster.jobs.models import JobStatus
from graftwork.cluster.jobs.store import JobStore
from graftwork.cluster.session import JOB
from graftwork.config import Spec, SpecT
from graftwork.errors import ConfigError
from graftwork.planning.hardware import accelerators_here, is_auto, with_gpus
from graftwork.spec_errors import did_you_mean
from graftwork.stages.jobs import job_of, root_of_job, with_demand

if TYPE_CHECKING:
    from graftwork.serving.client import Client
    from graftwork.serving.spec import ServeSpec
    from graftwork.training.report import TrainReport
    from graftwork.training.spec import TrainSpec

ResultT = TypeVar("ResultT")
MOST_NAMED = 12
"""Models that are named when an endpoint has started."""


def run_stage(
    kind: str,
    file: Path,
    options: LaunchOptions,
    run: Callable[[Any, LaunchOptions], ResultT],
    show: Callable[[Any, ResultT], None],
    as_json: Callable[[ResultT], object],
) -> None:
    """Load the spec of a stage; submit it as a job, or run it here and print its result.

    `run` and `show` take the spec, with its GPUs resolved for this machine. `show` prints the result for people.
    """
    spec = spec_to_run(kind, file, options)
    if spec is not None:
        result = run(spec, options)
        print_json(as_json(result)) if options.as_json else show(spec, result)


def spec_to_run(kind: str, file: Path, options: LaunchOptions) -> Spec | None:
    """Return the spec of a stage that this command runs itself. Launches a stage of another target: None."""
    spec = config.load(file, options.sets, expect=kind)
    if options.is_job:
        launch(spec, file, options)
        return None
    return resolve_here(spec, options.target, options.as_json)


def resolve_here(spec: SpecT, on: str, quiet: bool) -> SpecT:
    """Resolve `auto` GPUs for a stage that this command runs on this machine, and print the number with its reason.

    In a job, `auto` is resolved before the job is named.
    """
    if on != "local" or not is_auto(spec):
        return spec
    resolved, reason = with_gpus(spec, accelerators_here())
    if reason is not None and not quiet:
        echo(f"note: {reason}")
    return resolved


def launch(spec: Spec, file: Path, options: LaunchOptions) -> None:
    """Submit a stage as a job. Unless detached, print its log to its end, and exit with its exit code."""
    from graftwork.cluster.targets import backend_of

    cluster = options.cluster_spec()
    backend = backend_of(options.target, root_of_job(spec, cluster), cluster)
    if is_auto(spec):
        spec, reason = with_gpus(spec, backend.machines(cluster).accelerators)
        note(f"note: {reason}")
    job = job_of(spec, cluster, options.target)
    if not JobStore(job.root).attempts(job.job_id):
        for one in job.inputs:
            note(f"note: {one.path} ({gib(one.bytes)}) is copied to the store as {'/'.join(one.key)}")
        job, _, findings = with_demand(job, spec, file.parent, backend.machines(cluster))
        for finding in findings:
            note(f"note: {finding.code} {finding.problem}")
    started = start_or_find(backend, job)
    status, previous = started.status, started.previous
    if started.other_limits:
        note("note: it runs with the limits that it was submitted with; cancel it and run this again to change them")
    if previous is not None:
        ended = f"attempt {previous.attempt} ended {previous.state} ({previous.why})"
        note(f"job {status.job_id} on {options.target}: {ended}; it goes on as attempt {status.attempt}")
    else:
        added = {"found": " (found; started before)", "succeeded": ": nothing to start"}.get(started.outcome, "")
        note(f"job {line_of(status)}{added}")
    if options.detach:
        if options.as_json:
            print_json({**asdict(status), "root": job.root})
            return
        flag = root_flag(job.root)
        if not status.ended:
            echo(f"  follow it: graftwork jobs logs -f {job.job_id}{flag}")
            echo(f"  end it: graftwork jobs cancel {job.job_id}{flag}")
        return
    if not status.ended:
        stream = sys.stderr if options.as_json else sys.stdout
        status = follow(backend, job.root, job.job_id, stream, note, cancels=started.is_ours)
    leave(status, job.root, options.as_json)


def leave(status: JobStatus, root: str, as_json: bool = False) -> None:
    """Print the end of a job and its results. Exit with the code of its command, 1 where it has none."""
    left = left_behind(JobStore(root), status)
    if as_json:
        print_json({**asdict(status), "root": root, "left": left})
    else:
        took = duration(status.ended_at - status.started_at) if status.ended_at and status.started_at else None
        echo(f"job {line_of(status)}" + (f", after {took}" if took else ""))
        if status.state == "succeeded":
            for line in left:
                echo(f"  {line}")
        elif status.ended:
            for move in next_commands(status, root):
                echo(f"  next: {move}")
    code = status.exit_code if status.exit_code is not None else int(status.state != "succeeded")
    if code:
        raise typer.Exit(code if code > 0 else 1)


@with_options
def train(
    file: SpecFile,
    options: LaunchOptions,
    curve: Annotated[
        str | None,
        typer.Option(
            "--curve", metavar="N,N,...", help="Train once for each number of rows and report the learning curve."
        ),
    ] = None,
) -> None:
    """Train one adapter and publish it. A finished run is reused; an unfinished one resumes."""
    if curve is not None:
        from graftwork.cli.compare import run_curve

        run_curve(file, curve, options)
        return
    notes: list[str] = []

    def run(spec: "TrainSpec", options: LaunchOptions) -> "TrainReport":
        from graftwork.cluster.session import session
        from graftwork.training.run import ResolvedRun, train_resolved

        resolved = ResolvedRun.resolve(spec)
        notes[:] = resolved.notes_before_start()
        if not options.as_json:
            for one in notes:
                echo(f"note: {one}")
        many, quiet = spec.num_workers > 1, options.as_json
        with progress_bar(f"train {spec.name}", quiet) as bar, session(options.target, needs_ray=many) as here:
            return here.run(
                train_resolved,
                resolved,
                on_progress=lambda p: bar(p.step, p.total_steps, f"loss {p.loss:.3f}  {p.tokens_per_s:.0f} tok/s"),
            )

    def show(spec: "TrainSpec", report: "TrainReport") -> None:
        _show_run(spec, report, notes)

    run_stage("train", file, options, run, show, lambda report: report.as_dict())


def _show_run(spec: "TrainSpec", report: "TrainReport", printed: list[str]) -> None:
    """Print a training run. `printed`: notes that were printed before its start."""
    done = "reused the finished run" if report.reused else f"{report.steps} steps in {duration(report.wall_s)}"
    echo(
        f"{report.run_id}: {done}; {report.rows_text}, {report.tokens_per_s:.0f} tok/s, "
        f"training loss {report.train_loss[-1][1]:.3f}"
    )
    if report.held_out:
        echo(f"  {report.held_out}")
    for one in report.notes:
        if one not in printed:
            echo(f"  {one}")
    echo(
        f"published {report.published_name}"
        + (f", alias {spec.name}@{spec.alias}" if spec.alias and report.adapter else "")
    )
    if report.outcomes is not None:
        show_outcomes(report.outcomes)
    if report.page:
        echo(f"report: {report.page}")


@with_options
def serve(
    file: SpecFile,
    options: LaunchOptions,
) -> None:
    """Serve the base and its adapters over an OpenAI-compatible endpoint until Ctrl-C."""
    spec = spec_to_run("serve", file, options)
    if spec is None:
        return
    from graftwork.cluster.session import session
    from graftwork.serving.deploy import deploy
    from graftwork.serving.spec import ServeSpec

    assert isinstance(spec, ServeSpec)
    _check_before_ray(spec, options.target)
    with session(options.target), deploy(spec) as endpoint:
        with endpoint.client() as client:
            models = [model["id"] for model in client.models()]
        if options.as_json:
            print_json({"url": f"{endpoint.url}/v1", "models": models})
            sys.stdout.flush()
            signal.pause()
        more = f" and {len(models) - MOST_NAMED} more (GET /v1/models)" if len(models) > MOST_NAMED else ""
        echo(f"serving at {endpoint.url}/v1  models: {', '.join(models[:MOST_NAMED])}{more}")
        token = f'-H "Authorization: Bearer ${spec.token_env}" ' if spec.token_env else ""
        echo(
            f"  curl {endpoint.url}/v1/chat/completions {token}-H 'Content-Type: application/json' "
            f"-d '{json.dumps({'model': models[-1], 'messages': [{'role': 'user', 'content': 'Hello'}]})}'"
        )
        echo("  Ctrl-C ends it")
        signal.pause()


@with_options
def exec_program(
    file: SpecFile,
    options: LaunchOptions,
) -> None:
    """Run a command (kind: exec), on this machine or as a job."""
    spec = spec_to_run("exec", file, options)
    if spec is None:
        return
    from graftwork.cluster.jobs.models import ExecSpec

    assert isinstance(spec, ExecSpec)
    if options.target != "local":
        raise ConfigError(
            f"--target {options.target}",
            "a command runs on this machine or as a job",
            "targets are local, http(s)://HOST:PORT of a Ray dashboard, and k8s:CONTEXT/NAMESPACE",
        )
    try:
        code = subprocess.run(spec.argv, check=False).returncode
    except OSError as error:
        raise ConfigError(
            f"argv: {spec.argv[0]}",
            f"it cannot be started ({error.strerror})",
            "the first word is a program of this machine",
        ) from None
    if code:
        raise typer.Exit(code if code > 0 else 1)


def demo(file: SpecFile, target: Target = "local", sets: Sets = [], as_json: JsonFlag = False) -> None:  # noqa: B006
    """Run the demo: plan, tune, train, serve with an adapter swap under load, compare, report."""
    from graftwork.stages.demo_spec import DemoSpec

    spec = config.load(file, sets, expect="demo")
    assert isinstance(spec, DemoSpec)
    from graftwork.demo import run_demo

    report = run_demo(spec, file.parent, target, quiet=as_json)
    if as_json:
        print_json({"report_json": report.json_uri, "report_html": report.html_uri, "verdict": report.verdict})


def trial(file: SpecFile, target: Target = JOB) -> None:
    """Train one trial of a sweep. The sweep reads its progress from the object store."""
    from graftwork.cluster.session import session
    from graftwork.tuning.trial_store import TrialSpec

    spec = config.load(file, expect="trial")
    assert isinstance(spec, TrialSpec)
    from graftwork.tuning.remote_trial import run_trial_job

    with session(target, needs_ray=spec.train.num_workers > 1) as here:
        result = here.run(run_trial_job, spec)
    losses = f"held-out loss {result.eval_loss[-1][1]:.4f}" if result.eval_loss else "no held-out loss"
    echo(f"trial {spec.trial_id} of {spec.sweep}: {result.steps} steps, {losses}")


def chat(
    file: Annotated[str, typer.Argument(metavar="FILE|URL", help="Serve spec, or the URL of a running endpoint.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="Model name as in /v1/models. Default: the first arm, or the base if there is none.",
        ),
    ] = None,
    message: Annotated[
        str | None, typer.Option("--message", metavar="TEXT", help="Send one message, print the answer and exit.")
    ] = None,
    token_env: Annotated[
        str | None,
        typer.Option(
            "--token-env",
            metavar="NAME",
            help="Environment variable with the API token, for a URL. A FILE names its own (`token_env`).",
        ),
    ] = None,
    target: Target = "local",
    sets: Sets = [],  # noqa: B006
) -> None:
    """Chat with a model. Uses the endpoint at the address in FILE, or starts one for this chat if none runs."""
    from graftwork.serving.api.auth import own_token
    from graftwork.serving.client import Client

    if file.startswith(("http://", "https://")):
        with Client(file, own_token(token_env, "--token-env")) as client:
            _chat_loop(client, model, message)
        return
    from graftwork.serving.spec import ServeSpec

    spec = config.load(file, sets, expect="serve")
    assert isinstance(spec, ServeSpec)
    running = _running_client(spec)
    if running is not None:
        with running as client:
            _chat_loop(client, model, message)
        return
    from graftwork.cluster.session import session
    from graftwork.serving.deploy import deploy

    _check_before_ray(spec, target)
    echo(f"no endpoint answers at {spec.host}:{spec.port}: starting one")
    with session(target), deploy(spec) as endpoint, endpoint.client() as client:
        _chat_loop(client, model, message)


def _check_before_ray(spec: "ServeSpec", on: str) -> None:
    """Reject a wrong serve spec before a Ray starts, where the endpoint runs on this machine."""
    from graftwork.serving.deploy import check_spec
    from graftwork.serving.ray_serve_lifecycle import require_port_here

    if on == "local":
        require_port_here(spec.host, spec.port)
        check_spec(spec)


def _running_client(spec: "ServeSpec") -> "Client | None":
    from graftwork.serving.api.auth import own_token
    from graftwork.serving.client import Client

    client = Client(f"http://{spec.host}:{spec.port}", own_token(spec.token_env, "token_env"))
    if client.ready():
        return client
    client.close()
    return None


def _chat_loop(client: "Client", model: str | None, message: str | None) -> None:
    from graftwork.prompts.render import Message
    from graftwork.serving.client import ChatCall, ClientReply

    names = [entry["id"] for entry in client.models()]
    if model is not None and model not in names and ":" not in model:
        raise ConfigError(
            f"--model {model}",
            "no such model",
            f"served: {', '.join(names)}",
            did_you_mean(model, names) or f"--model {names[0]}",
        )
    chosen = model or next((name for name in names if name.startswith("arm/")), names[0])
    messages: list[Message] = []
    if message is None:
        echo(f"talking to {chosen}; an empty line ends it. Also served: {', '.join(n for n in names if n != chosen)}")
    while text := message if message is not None else _read_line():
        messages.append(Message("user", text))
        answer = ""
        for part in client.stream(ChatCall(model=chosen, messages=tuple(messages))):
            if isinstance(part, ClientReply):
                continue
            answer += part
            console.print(part, end="", markup=False, soft_wrap=True)
        console.print()
        messages.append(Message("assistant", answer))
        if message is not None:
            return


def _read_line() -> str:
    """Return a line from the terminal, stripped; empty at the end of the input."""
    try:
        return console.input("> ").strip()
    except EOFError:
        console.print()
        return ""
