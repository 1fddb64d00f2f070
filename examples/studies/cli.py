"""`python -m examples.studies FILE`: a published result scaled down, and the claims of it that show."""

from typing import Annotated

import typer

from examples.studies.plan import plan_study
from examples.studies.run import check_study, cpus_of, run_study
from examples.studies.schema import StudyClaim, StudyMeasure, StudyReport, StudyScore
from examples.studies.spec import StudySpec
from graftwork import config
from graftwork.cli.options import JsonFlag, Sets, SpecFile
from graftwork.cli.plan import show_plan
from graftwork.cli.render import echo, print_json, print_table
from graftwork.cluster.session import session
from graftwork.report import format as words


def study(
    file: SpecFile,
    sets: Sets = [],  # noqa: B006
    plan: Annotated[bool, typer.Option("--plan", help="Predict memory and time of every stage, and run none.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train, measure and test each published claim against the numbers; finished runs are reused."""
    spec = config.load_as(StudySpec, file, sets)
    if plan:
        show_plan(f"plan of {file}", plan_study(spec, file.parent), as_json)
        return
    adapters = check_study(spec, file.parent)
    with session("local", num_cpus=cpus_of(spec, adapters)) as here:
        found = run_study(spec, adapters, here, quiet=as_json)
    if as_json:
        print_json(found.report.model_dump(mode="json"))
        return
    show_study(found.report)
    echo(f"\n{found.report.sentence}\n\nreport: {found.html_uri}")


def show_study(report: StudyReport) -> None:
    """Every measure's arms with intervals, then the claims."""
    for measure in report.measures:
        _show_measure(measure)
    print_table(
        f"published patterns (paired, Holm over {len(report.claims)}, {100 * (1 - report.alpha):g}% intervals)",
        ("claim", "on", "difference", "p", "n", "here"),
        [
            (c.statement, c.metric, _interval(c, signed=True), f"{c.p_adjusted:.2g}", c.n, _outcome(c))
            for c in report.claims
        ],
    )


def _show_measure(measure: StudyMeasure) -> None:
    groups = list(dict.fromkeys(score.group for score in measure.scores))
    units = "" if measure.units == measure.questions else f" about {measure.units} {measure.unit}s"
    for group in groups:
        here = [score for score in measure.scores if score.group == group]
        metrics, arms = (list(dict.fromkeys(getattr(s, key) for s in here)) for key in ("metric", "arm"))
        cells = {(score.arm, score.metric): _interval(score) for score in here}
        part = f", {measure.by} {group} (n={here[0].n})" if group else f": {measure.questions} questions{units}"
        print_table(
            f"{measure.name}{part}",
            ("arm", *metrics),
            [(arm, *[cells[arm, metric] for metric in metrics]) for arm in arms],
        )


def _interval(score: StudyScore | StudyClaim, signed: bool = False) -> str:
    if signed:
        return f"{words.signed(score.value)} {words.signed_interval(score.low, score.high)}"
    return f"{words.score(score.value)} {words.interval(score.low, score.high)}"


def _outcome(claim: StudyClaim) -> str:
    detects = f" (detects {words.score(claim.detects)})" if claim.outcome == "undecided" else ""
    return claim.outcome + detects
