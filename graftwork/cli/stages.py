"""`graftwork plan|tune|train|serve|compare|quantize|chat|demo FILE`: one verb a stage, the same flags on each."""

import json
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from graftwork import config
from graftwork.cli.compare import compare, quantize, rebase, run_curve
from graftwork.cli.launch import LaunchOptions, launch, resolve_here
from graftwork.cli.options import JsonFlag, Sets, SpecFile, Target, with_options
from graftwork.cli.plan import plan
from graftwork.cli.render import console, duration, echo, print_json, progress_bar, show_outcomes
from graftwork.cli.tune import tune
from graftwork.cluster.ray_address import JOB
from graftwork.errors import ConfigError
from graftwork.spec_errors import did_you_mean

if TYPE_CHECKING:
    from graftwork.serving.client import Client
    from graftwork.serving.spec import ServeSpec


# `graftwork exec FILE`: run a program of the user, here or as a job.


@with_options
def exec_program(
    file: SpecFile,
    options: LaunchOptions,
) -> None:
    """Run a program of your own (kind: exec), here or as a job."""
    from graftwork.cluster.jobs.models import ExecSpec

    spec = config.load(file, options.sets, expect="exec")
    assert isinstance(spec, ExecSpec)
    if options.elsewhere:
        return launch(spec, file, options)
    if options.target != "local":
        raise ConfigError(
            f"--target {options.target}",
            "a program is no stage that could run through Ray Client",
            "local, http(s)://HOST:PORT of a Ray's dashboard, or k8s:CONTEXT/NAMESPACE",
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


MOST_NAMED = 12
"""Models that are named when an endpoint has started."""


def register(app: typer.Typer) -> None:
    """Add the stage verbs to the command line."""
    for verb in (plan, tune, train, serve, compare, quantize, chat, demo, rebase):
        app.command()(verb)
    app.command("exec")(exec_program)
    app.command(hidden=True)(trial)


@with_options
def train(
    file: SpecFile,
    options: LaunchOptions,
    curve: Annotated[
        str | None, typer.Option("--curve", metavar="N,N,...", help="Train once per row count (learning curve).")
    ] = None,
) -> None:
    """Train one adapter and publish it. A finished run is reused; an unfinished one resumes."""
    from graftwork.training.spec import TrainSpec

    spec = config.load(file, options.sets, expect="train")
    assert isinstance(spec, TrainSpec)
    if curve is not None:
        return run_curve(spec, curve, options.target, options.as_json)
    if options.elsewhere:
        return launch(spec, file, options)
    from graftwork.cluster.session import session
    from graftwork.training.run import ResolvedRun, train_resolved

    spec = resolve_here(spec, options.target, options.as_json)
    run = ResolvedRun.resolve(spec)
    notes = run.notes_before_start()
    if not options.as_json:
        for note in notes:
            echo(f"note: {note}")
    many = spec.num_workers > 1
    with progress_bar(f"train {spec.name}", options.as_json) as bar, session(options.target, needs_ray=many) as here:
        report = here.run(
            train_resolved,
            run,
            on_progress=lambda p: bar(p.step, p.total_steps, f"loss {p.loss:.3f}  {p.tokens_per_s:.0f} tok/s"),
        )
    if options.as_json:
        print_json(report.as_dict())
        return
    done = "reused the finished run" if report.reused else f"{report.steps} steps in {duration(report.wall_s)}"
    echo(
        f"{report.run_id}: {done}; {report.rows_text}, {report.tokens_per_s:.0f} tok/s, "
        f"training loss {report.train_loss[-1][1]:.3f}"
    )
    if report.held_out:
        echo(f"  {report.held_out}")
    for note in report.notes:
        if note not in notes:  # it was said before the start
            echo(f"  {note}")
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
    from graftwork.serving.spec import ServeSpec

    spec = config.load(file, options.sets, expect="serve")
    assert isinstance(spec, ServeSpec)
    if options.elsewhere:
        return launch(spec, file, options)
    from graftwork.cluster.session import session
    from graftwork.serving.deploy import deploy

    spec = resolve_here(spec, options.target, options.as_json)
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


def chat(
    file: Annotated[str, typer.Argument(metavar="FILE|URL", help="Serve spec, or the URL of a running endpoint.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Model name as in /v1/models. Default: the first arm, or the base if there is none."
        ),
    ] = None,
    message: Annotated[
        str | None, typer.Option("--message", help="Send one message, print the answer and exit.")
    ] = None,
    token_env: Annotated[
        str | None,
        typer.Option("--token-env", help="Environment variable that holds the API token of URL; a FILE names its own."),
    ] = None,
    target: Target = "local",
    sets: Sets = [],  # noqa: B006
) -> None:
    """Chat with a model. Uses the endpoint at the address in FILE, or starts one for this chat if none runs."""
    from graftwork.serving.api.auth import own_token
    from graftwork.serving.client import Client

    if file.startswith(("http://", "https://")):
        with Client(file, own_token(token_env, "--token-env")) as client:
            _converse(client, model, message)
        return
    from graftwork.serving.spec import ServeSpec

    spec = config.load(file, sets, expect="serve")
    assert isinstance(spec, ServeSpec)
    running = _running(spec)
    if running is not None:
        with running as client:
            _converse(client, model, message)
        return
    from graftwork.cluster.session import session
    from graftwork.serving.deploy import deploy

    _check_before_ray(spec, target)
    echo(f"no endpoint answers at {spec.host}:{spec.port}: starting one")
    with session(target), deploy(spec) as endpoint, endpoint.client() as client:
        _converse(client, model, message)


def _check_before_ray(spec: "ServeSpec", on: str) -> None:
    """Refuse a wrong serve spec before a Ray starts, where the endpoint runs on this machine."""
    from graftwork.serving.deploy import check_spec
    from graftwork.serving.ray_serve_lifecycle import require_port_here

    if on == "local":
        require_port_here(spec.host, spec.port)
        check_spec(spec)


def _running(spec: "ServeSpec") -> "Client | None":
    from graftwork.serving.api.auth import own_token
    from graftwork.serving.client import Client

    client = Client(f"http://{spec.host}:{spec.port}", own_token(spec.token_env, "token_env"))
    if client.ready():
        return client
    client.close()
    return None


def _converse(client: "Client", model: str | None, message: str | None) -> None:
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
    while text := message if message is not None else _typed():
        messages.append(Message("user", text))
        said = ""
        for part in client.stream(ChatCall(model=chosen, messages=tuple(messages))):
            if isinstance(part, ClientReply):
                continue
            said += part
            console.print(part, end="", markup=False, soft_wrap=True)
        console.print()
        messages.append(Message("assistant", said))
        if message is not None:
            return


def _typed() -> str:
    """Return a line from the terminal, stripped; empty at the end of the input."""
    try:
        return console.input("> ").strip()
    except EOFError:
        console.print()
        return ""


def demo(file: SpecFile, target: Target = "local", sets: Sets = [], as_json: JsonFlag = False) -> None:  # noqa: B006
    """Run the demo: plan, tune, train, serve with an adapter swap under load, compare, report."""
    from graftwork.demo_spec import DemoSpec

    spec = config.load(file, sets, expect="demo")
    assert isinstance(spec, DemoSpec)
    from graftwork.demo import run_demo

    report = run_demo(spec, file.parent, target, quiet=as_json)
    if as_json:
        print_json({"report_json": report.json_uri, "report_html": report.html_uri, "verdict": report.verdict})


# `graftwork trial FILE`: what the driver of a trial runs, where each trial of a sweep is a job.


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
