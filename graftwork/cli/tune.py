"""`graftwork tune FILE`: a sweep, what it found, how sure that is, and what became of its winner."""

import math
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftwork import config
from graftwork.cli.launch import LaunchOptions, launch, resolve_here
from graftwork.cli.options import SpecFile, with_options
from graftwork.cli.render import duration, echo, print_json, print_table, show_outcomes
from graftwork.cli.sweep_progress import sweep_progress
from graftwork.errors import ConfigError
from graftwork.planning.accelerators import with_gpus

TrialTarget = Annotated[
    str | None,
    typer.Option(
        "--trial-target",
        metavar="TARGET",
        help="Run each trial as its own job on this target, e.g. to queue distributed trials one by one.",
    ),
]

if TYPE_CHECKING:
    from graftwork.report.sweep_schema import SweepRecord
    from graftwork.tuning.remote_trial import Elsewhere
    from graftwork.tuning.spec import TuneSpec
    from graftwork.tuning.trials import TrialRecord, TuneReport, Winner


@with_options
def tune(
    file: SpecFile,
    options: LaunchOptions,
    trial_target: TrialTarget = None,
) -> None:
    """Search hyperparameters; print the trials and the best one with its confidence. Trains the winner if requested.

    `graftwork plan FILE` predicts time and memory. A finished sweep is reused; an unfinished one resumes.
    """
    from graftwork.tuning.spec import TuneSpec

    spec = config.load(file, options.sets, expect="tune")
    assert isinstance(spec, TuneSpec)
    elsewhere = _elsewhere(options, trial_target) if trial_target is not None else None
    if elsewhere is None and options.elsewhere:
        return launch(spec, file, options)
    from graftwork.cli.plan import say_plan
    from graftwork.cli.shadow import check_shadow, place_shadow
    from graftwork.cluster.session import session
    from graftwork.tuning.report import SweepEnd, sweep_record
    from graftwork.tuning.run import check, tune

    if elsewhere is None:
        spec = resolve_here(spec, options.target, options.as_json)
    else:
        spec, _ = with_gpus(spec, elsewhere.accelerators(spec.root))
    assert isinstance(spec, TuneSpec)
    check_shadow(spec)
    notes = check(spec)
    if not options.as_json:
        for note in notes:
            echo(f"note: {note}")
        say_plan(spec, file.parent, options.target)
    with sweep_progress(f"tune {spec.name}", options.as_json) as update, session(options.target) as here:
        report = here.run(tune, spec, on_progress=update, elsewhere=elsewhere)
    shadow = place_shadow(spec, report) if spec.winner and spec.winner.shadow else None
    ended = SweepEnd("finished", report.eval_rows, report.sampler, report.wall_s, report.choice, report.reused)
    sweep = sweep_record(spec, report.trials, ended)
    if options.as_json:
        print_json(sweep_json(report, sweep, shadow))
    else:
        show(spec, report, sweep, shadow)


def _elsewhere(options: LaunchOptions, trial_target: str) -> "Elsewhere":
    """Return the target of the trial jobs. Raises ConfigError if the driver of the sweep would not run here."""
    from graftwork.tuning.remote_trial import Elsewhere

    if options.target != "local" or options.detach:
        other = "--detach" if options.detach else f"--target {options.target}"
        raise ConfigError(
            f"--trial-target {trial_target} with {other}",
            "two targets for one sweep",
            "with --trial-target the driver of the sweep runs here, in the foreground",
            f"remove {other}",
        )
    return Elsewhere(trial_target, options.cluster_spec().model_dump(mode="json"))


def sweep_json(report: "TuneReport", sweep: "SweepRecord", shadow: dict[str, Any] | None) -> dict[str, Any]:
    """For machines: `heat.rates` is the claim of one learning rate for all ranks, `stops` what stops saved."""
    said = sweep.model_dump(mode="json", include={"stops": True, "heat": {"rates"}})
    return {**report.as_dict(), **said, "shadow": shadow}


def show(spec: "TuneSpec", report: "TuneReport", sweep: "SweepRecord", shadow: dict[str, Any] | None) -> None:
    """The trials and the finals, the verdict and what else the trials tell, and what became of the winner."""
    from graftwork.cli.shadow import show_shadow
    from graftwork.report.sweep_views import rates_words, stops_words
    from graftwork.tuning.report import settings

    _show_trials(report)
    for line in (report.choice.verdict, *report.choice.notes):
        echo(line)
    if report.choice.front:
        objectives = ", ".join(goal.metric for goal in spec.objectives)
        echo(f"no trial beats these in all of {objectives}: {', '.join(report.choice.front)}")
    if sweep.heat is not None and sweep.heat.rates is not None:
        echo(rates_words(sweep.heat.rates))
    if sweep.stops is not None:
        echo(stops_words(sweep.stops))
    echo(f"best: {settings(report.best)}")
    if report.winner is not None:
        _show_winner(spec, report.winner)
    if shadow is not None:
        show_shadow(shadow)
    echo(f"report: {report.page}")


def _show_trials(report: "TuneReport") -> None:
    """Lowest loss first, those that ran to their end before those that did not; then the finals."""
    searched = [trial for trial in report.trials if trial.repeat_of is None]
    keys = list(dict.fromkeys(key for trial in searched for key in trial.values))
    order = {"finished": 0, "stopped": 1, "failed": 2}
    ordered = sorted(searched, key=lambda t: (order.get(t.state, 3), t.losses[-1][1] if t.losses else 0.0))
    print_table(
        f"{report.run_id}{' (reused)' if report.reused else ''}",
        ("trial", *_short(keys), "loss", "steps", "state", "trained", "s/step", "time"),
        [
            (
                trial.trial_id,
                *[trial.values.get(key, "-") for key in keys],
                f"{trial.losses[-1][1]:.4f}" if trial.losses else "-",
                trial.steps,
                trial.state,
                *_cost(trial),
                duration(trial.wall_s),
            )
            for trial in ordered
        ],
    )
    _show_finals(report, keys)


def _show_finals(report: "TuneReport", keys: list[str]) -> None:
    """A line a finalist: its loss with each seed, and their mean."""
    repeats = {(one.repeat_of, one.values["seed"]): one for one in report.trials if one.repeat_of is not None}
    if not repeats:
        return
    seeds = list(dict.fromkeys(seed for _, seed in repeats))
    rows = []
    for trial in report.trials:
        runs = [trial, *(repeats.get((trial.trial_id, seed)) for seed in seeds)]
        if any(runs[1:]):
            told = [_loss(run) for run in runs]
            ended = [run.losses[-1][1] for run in runs if run is not None and run.state == "finished"]
            mean = fmean(ended) if len(ended) == len(runs) else math.inf
            mark = "taken" if trial.trial_id == report.best_id else ""
            values = [trial.values.get(key, "-") for key in keys]
            row = (trial.trial_id, *values, *told, f"{mean:.4f}" if math.isfinite(mean) else "-", mark)
            rows.append((mean, row))
    columns = ("trial", *_short(keys), "search", *[f"seed {seed}" for seed in seeds], "mean", "")
    print_table("finals: held-out loss by seed", columns, [row for _, row in sorted(rows, key=lambda one: one[0])])


def _loss(trial: "TrialRecord | None") -> str:
    if trial is None:
        return "-"
    return f"{trial.losses[-1][1]:.4f}" if trial.state == "finished" else trial.state


def _short(keys: list[str]) -> list[str]:
    """The last part of each key, where that tells them apart."""
    last = [key.rsplit(".", 1)[-1] for key in keys]
    return [short if last.count(short) == 1 else key for key, short in zip(keys, last, strict=True)]


def _cost(trial: "TrialRecord") -> tuple[str, str]:
    trained, step_s = trial.metrics.get("trained_parameters"), trial.metrics.get("step_s")
    said = "-" if trained is None else f"{trained / 1e6:.2f} M" if trained >= 1e5 else f"{trained:.0f}"
    return said, "-" if step_s is None else f"{step_s:.2f}"


def _show_winner(spec: "TuneSpec", winner: "Winner") -> None:
    from graftwork.tuning.winner import root_of

    report, root = winner.train, f" --root {root_of(spec)}"
    held_out = f", {report.held_out}" if report.held_out else ""
    took = "reused the finished run" if report.reused else f"{report.steps} steps in {duration(report.wall_s)}"
    echo(f"winner: {report.run_id}, {took}{held_out}; published {report.published_name}")
    if report.outcomes is not None:
        show_outcomes(report.outcomes)
    if winner.alias is not None:
        name = f"{spec.train.name}@{winner.alias}"
        if winner.moved:
            echo(f"{name}: {winner.before or 'nothing'} -> {report.version} ({winner.why})")
            if winner.before:
                echo(f"  back: graftwork adapters rollback {name}{root}")
        else:
            echo(f"{name} was not moved: {winner.why}")
            if winner.before != report.version:
                echo(f"  move it all the same: graftwork adapters promote {report.adapter} {winner.alias}{root}")
    for note in report.notes:
        echo(f"  {note}")
    if report.page:
        echo(f"report of the winner: {report.page}")
