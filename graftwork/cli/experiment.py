"""`graftwork experiment start|status|ramp|stop|kill|resume|report|feedback`: a live split or a shadow on an endpoint.

A FILE names the endpoint, the experiment and the variable with the admin token; with a URL they are given as options.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftwork import config
from graftwork.cli.options import JsonFlag, Sets
from graftwork.cli.render import echo, print_json, print_table
from graftwork.errors import ConfigError

if TYPE_CHECKING:
    from graftwork.report.evaluation_schema import ExperimentReport
    from graftwork.serving.ab_test.spec import ExperimentSpec
    from graftwork.serving.client import Client

app = typer.Typer(help="Run A/B tests and shadow tests on a running endpoint.", no_args_is_help=True)
ADMIN_TOKEN = "GRAFTWORK_ADMIN_TOKEN"
Where = Annotated[str, typer.Argument(metavar="FILE|URL", help="Experiment spec, or the URL of its endpoint.")]
Name = Annotated[str | None, typer.Option("--name", metavar="NAME", help="Experiment name, if URL runs several.")]
TokenEnv = Annotated[
    str, typer.Option("--token-env", metavar="NAME", help="Environment variable with the admin token, for a URL.")
]


@app.command()
def start(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Experiment spec; see examples/.")],
    sets: Sets = [],  # noqa: B006
    as_json: JsonFlag = False,
) -> None:
    """Start an experiment. Starting it again has no effect; a changed file is rejected while it runs."""
    spec = _spec(file, sets)
    with client_of(spec.endpoint, spec.admin_token_env) as client:
        found = client.experiment("start", spec=spec.model_dump(mode="json"))
    _show(found, as_json)
    if not as_json:
        echo(f'  request it with "model": "{found["model"]}" and your user\'s name as "user"')


@app.command()
def status(where: Where, name: Name = None, token_env: TokenEnv = ADMIN_TOKEN, as_json: JsonFlag = False) -> None:
    """Show the arms, sequential (always-valid) estimates, guardrails and dropped records."""
    with _client_and_name(where, name, token_env) as (client, chosen):
        found = [one for one in client.experiments() if chosen in (None, one["name"])]
    if chosen is not None and not found:
        raise ConfigError(
            f"experiment {chosen}",
            "the endpoint has none of this name",
            "",
            "start it: graftwork experiment start FILE",
        )
    if as_json:
        print_json(found)
        return
    for one in found:
        _show(one, as_json)
    if not found:
        echo("no experiments: `graftwork experiment start FILE` begins one")


@app.command()
def ramp(
    where: Where,
    weights: Annotated[
        list[str],
        typer.Option(
            "--weight", metavar="ARM=SHARE", help="Weight of an arm; repeat for each arm. The weights sum to 1."
        ),
    ],
    name: Name = None,
    token_env: TokenEnv = ADMIN_TOKEN,
    as_json: JsonFlag = False,
) -> None:
    """Change the traffic weights. A unit keeps its arm unless the new weights move it."""
    given = _weights(weights)
    with _client_and_name(where, name, token_env) as (client, chosen):
        _show(client.experiment("ramp", name=_only_name(client, chosen), weights=given), as_json)


@app.command()
def stop(where: Where, name: Name = None, token_env: TokenEnv = ADMIN_TOKEN, as_json: JsonFlag = False) -> None:
    """Stop an experiment permanently. The control arm then answers all requests."""
    _send("stop", where, name, token_env, as_json)


@app.command()
def kill(where: Where, name: Name = None, token_env: TokenEnv = ADMIN_TOKEN, as_json: JsonFlag = False) -> None:
    """Route all traffic to the control arm immediately, until `resume`."""
    _send("kill", where, name, token_env, as_json)


@app.command()
def resume(where: Where, name: Name = None, token_env: TokenEnv = ADMIN_TOKEN, as_json: JsonFlag = False) -> None:
    """Undo `kill`: restore the traffic weights."""
    _send("resume", where, name, token_env, as_json)


@app.command()
def report(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Experiment spec that it was started with.")],
    log: Annotated[
        str | None,
        typer.Option("--log", metavar="URI", help="Folder of the experiment log. Default: read from the endpoint."),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="FOLDER", help="Folder of report.html and report.json. Default: NAME-report."),
    ] = None,
    sets: Sets = [],  # noqa: B006
    as_json: JsonFlag = False,
) -> None:
    """Print the verdict on the log so far, and write it as a self-contained page. --log needs no endpoint."""
    from graftwork.report import ReportInput, build
    from graftwork.serving.ab_test.log import rules_of
    from graftwork.serving.ab_test.log_reader import read_log
    from graftwork.serving.ab_test.report import analyse_log
    from graftwork.storage.store import Store

    spec = _spec(file, sets)
    found = analyse_log(spec.name, read_log(Store(log or _log_of(spec)), ()), rules_of(spec))
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    now = datetime.now(UTC).isoformat(timespec="seconds")
    page = ReportInput(title=f"Experiment {spec.name}", created_at=now, experiment=found)
    show_online(found)
    echo(f"  page: {build(page, Store(out or f'{spec.name}-report')).html_uri}")


@app.command()
def feedback(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Experiment spec that it was started with.")],
    out: Annotated[str, typer.Option("--out", "-o", metavar="ROWS", help="JSONL to write: a path or s3://.")],
    log: Annotated[
        str | None,
        typer.Option("--log", metavar="URI", help="Folder of the experiment log. Default: read from the endpoint."),
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", metavar="NAME", help="Score by feedback. Default: the primary metric.")
    ] = None,
    arm: Annotated[list[str] | None, typer.Option("--arm", metavar="ARM", help="Only answers of this arm.")] = None,
    version: Annotated[
        list[str] | None,
        typer.Option("--version", metavar="DIGITS", help="Only answers of this adapter version (its first digits)."),
    ] = None,
    sets: Sets = [],  # noqa: B006
    as_json: JsonFlag = False,
) -> None:
    """Write rated answers of the log as rows with a label, which `objective.kind: kto` trains on."""
    import json

    from graftwork.serving.ab_test.feedback import FeedbackFilter, FeedbackRows
    from graftwork.serving.ab_test.log_reader import read_log
    from graftwork.storage.store import Store, open_uri

    spec = _spec(file, sets)
    found = FeedbackRows(FeedbackFilter.of_spec(spec, metric, arm or (), version or ()))
    store = Store(log or _log_of(spec))
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in found.rows(lambda: read_log(store, ()))]
    place, key = open_uri(out)
    place.write_bytes("".join(lines).encode(), key)
    if as_json:
        left_out = dict(found.left_out)
        print_json({"rows": len(lines), "good": found.good, "bad": found.bad, "left_out": left_out, "out": out})
        return
    echo(f"{out}: {len(lines)} rows, label true in {found.good}, false in {found.bad}")
    if found.left_out:
        echo(f"  left out: {found.describe_left_out()}")
    echo("  train on them: objective: {kind: kto}, data: {train: " + out + "}")


def _log_of(spec: "ExperimentSpec") -> str:
    with client_of(spec.endpoint, spec.admin_token_env) as client:
        found = [one for one in client.experiments() if one["name"] == spec.name]
    if not found:
        raise ConfigError(
            f"experiment {spec.name}",
            f"{spec.endpoint} has none of this name",
            "",
            "give the folder of its log: --log URI",
        )
    runs, asked = found[0], {"mode": spec.mode, "control": spec.control, "primary": spec.primary.name}
    if other := [f"{key}={runs[key]}" for key, value in asked.items() if runs[key] != value]:
        raise ConfigError(
            f"experiment {spec.name}",
            f"it runs with {' and '.join(other)}, other than in this file",
            "",
            "report with the file that it was started with",
        )
    return str(runs["log"]["uri"])


def _send(verb: str, where: str, name: str | None, token_env: str, as_json: bool) -> None:
    with _client_and_name(where, name, token_env) as (client, chosen):
        _show(client.experiment(verb, name=_only_name(client, chosen)), as_json)


def _spec(file: str, sets: list[str]) -> "ExperimentSpec":
    from graftwork.serving.ab_test.spec import ExperimentSpec

    spec = config.load(file, sets, expect="experiment")
    assert isinstance(spec, ExperimentSpec)
    return spec


def client_of(url: str, token_env: str | None) -> "Client":
    """Of an endpoint; `token_env` names the variable with its admin token. Raises ConfigError when that is not set."""
    from graftwork.serving.api.auth import own_token
    from graftwork.serving.client import Client

    return Client(url, own_token(token_env, "admin_token_env"))


@contextmanager
def _client_and_name(where: str, name: str | None, token_env: str) -> "Iterator[tuple[Client, str | None]]":
    """Yield a client of the endpoint and the experiment's name, from a FILE or a URL."""
    if where.startswith(("http://", "https://")):
        client = client_of(where, token_env if os.environ.get(token_env) else None)
    else:
        spec = _spec(where, [])
        client, name = client_of(spec.endpoint, spec.admin_token_env), name or spec.name
    with client:
        yield client, name


def _only_name(client: "Client", name: str | None) -> str:
    if name is not None:
        return name
    names = [one["name"] for one in client.experiments()]
    if len(names) != 1:
        raise ConfigError(
            "--name",
            f"the endpoint has {len(names)} experiments ({', '.join(names) or '-'})",
            "a URL alone names one only where there is one",
            "give --name, or the FILE",
        )
    return str(names[0])


def _weights(given: list[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for item in given:
        arm, _, share = item.partition("=")
        try:
            found[arm] = float(share)
        except ValueError:
            raise ConfigError(f"--weight {item}", "no number behind '='", "write --weight ARM=SHARE") from None
    return found


def _show(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    age = time.time() - found["started_at"]
    title = f"{found['id']}: {found['mode']}, {found['status']}, {age / 3600:.1f} h, control {found['control']}"
    rows = [
        (arm["name"], arm["adapter"] or "-", f"{arm['weight']:g}", arm["answers"], arm["errors"], arm["cut"] or "-")
        for arm in found["arms"]
    ]
    print_table(title, ("arm", "adapter", "weight", "answers", "errors", "cut"), rows)
    _show_verdict(found["primary"], found["mode"], found["judged"])
    log, shadow = found["log"], found["shadow"]
    echo(
        f"  log {log['uri']}: {log['written']} rows, {log['waiting']} waiting, {log['dropped']} dropped"
        + (f"; NOT WRITTEN: {log['problem']}" if log["problem"] else "")
    )
    if log["damaged"]:
        echo(f"  damaged segments, not counted: {'; '.join(log['damaged'])}")
    if found["mode"] == "shadow":
        echo(f"  shadow: {shadow['waiting']} copies waiting, {shadow['dropped']} dropped")


def _show_verdict(metric: str, mode: str, judged: dict[str, Any]) -> None:
    """Print the verdict, which holds at every look. The difference is not that of the plain means: see `estimator`."""
    from graftwork.report.evaluation_views import estimator

    means = [
        f"{arm['arm']} {arm['mean']:.3f} (n={arm['counted']})" for arm in judged["arms"] if arm["mean"] is not None
    ]
    if means:
        echo(f"  {metric}, plain means: {', '.join(means)}")
    for one in judged["contrasts"]:
        if one["estimate"] is None:
            echo(f"  {metric}: nothing is known of {one['arm']} against {one['control']} yet")
            continue
        estimate = f"{one['estimate']:+.3f}"
        more = f", about {one['n_needed']} units decide" if one["n_needed"] else ""
        echo(
            f"  {metric}, {estimator(mode)} of {one['arm']} against {one['control']}: {estimate}"
            f" [{one['low']:+.3f}, {one['high']:+.3f}] at {one['level']:.0%}, n={one['n']}, "
            f"e={one['e_value']:.3g}: {one['verdict']}{more}"
        )
    for one in judged["guardrails"]:
        value = "-" if one["value"] is None else f"{one['value']:.3f}"
        said = f"BROKEN at {one['broken_at']}" if one["broken_at"] is not None else "holds"
        echo(
            f"  guardrail {one['kind']} of {one['arm']}: {value} of {one['limit']:g} allowed, n={one['n']}, "
            f"e={one['e_value']:.3g}: {said}"
        )
    if judged["blocked"]:
        echo(f"  NO CONCLUSION: {judged['blocked']}")
    if judged["waiting"]:
        unit = "copies" if mode == "shadow" else "units"
        echo(
            f"  {judged['waiting']} {unit} are not counted yet: an answer or score is pending, "
            "theirs or that of one assigned earlier"
        )
    if silent := sum(arm["counted"] - arm["scored"] for arm in judged["arms"]):
        echo(f"  {silent} units got no score in time and count with the middle of the metric's range")
    if judged["left_out"]:
        echo("  not counted: " + ", ".join(f"{count} {reason}" for reason, count in judged["left_out"].items()))


def show_online(report: "ExperimentReport") -> None:
    """Differences with sequences, guardrails, and the verdict in a sentence."""
    from graftwork.report.evaluation_views import effect_interval, estimator, evidence, guard_state, signed
    from graftwork.report.format import NONE, count

    unit = "prompts" if report.mode == "shadow" else "units"
    print_table(
        f"{report.name}: {report.metric}, {report.mode}, {count(report.rows)} rows",
        ("arm", unit, "plain mean", "answers", "failed"),
        [
            (arm.name, arm.units, NONE if arm.mean is None else f"{arm.mean:.3f}", arm.answers, arm.errors)
            for arm in report.arms
        ],
    )
    print_table(
        f"against {report.control} (holds at every look)",
        ("arm", estimator(report.mode), unit, "e-value", "verdict", "would decide"),
        [
            (
                one.arm,
                f"{signed(one.estimate)} {effect_interval(one)}",
                one.n,
                evidence(one.e_value),
                one.verdict,
                NONE if one.n_needed is None else count(one.n_needed),
            )
            for one in report.contrasts
        ],
    )
    if report.guardrails:
        rows = [
            (g.arm, g.says, NONE if g.value is None else f"{g.value:.3f}", g.n, guard_state(g))
            for g in report.guardrails
        ]
        print_table("guardrails", ("arm", "bound", "seen", "n", "state"), rows)
    for note in report.notes:
        echo(f"  {note}")
    echo(report.sentence)
