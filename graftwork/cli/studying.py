"""`graftwork study FILE`: a published result in small, and whether it shows."""

from typing import TYPE_CHECKING

from graftwork import config
from graftwork.cli.options import JsonFlag, Sets, SpecFile, Target
from graftwork.cli.output import print_json, print_table, say

if TYPE_CHECKING:
    from graftwork.report.study_records import StudyClaim, StudyMeasure, StudyReport, StudyScore


def study(file: SpecFile, target: Target = "local", sets: Sets = [], as_json: JsonFlag = False) -> None:  # noqa: B006
    """Reproduce a published result at small scale and test each claim. Finished runs are reused."""
    from graftwork.study.spec import StudySpec

    spec = config.load(file, sets, expect="study")
    assert isinstance(spec, StudySpec)
    from graftwork.cluster.session import session
    from graftwork.study.run import check_study, cpus_of, run_study

    adapters = check_study(spec, file.parent)
    with session(target, num_cpus=cpus_of(spec, adapters)) as here:
        found = run_study(spec, adapters, here, quiet=as_json)
    if as_json:
        print_json(found.report.model_dump(mode="json"))
        return
    show_study(found.report)
    say(f"\n{found.report.sentence}\n\nreport: {found.html_uri}")


def show_study(report: "StudyReport") -> None:
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


def _show_measure(measure: "StudyMeasure") -> None:
    groups = list(dict.fromkeys(score.group for score in measure.scores))
    units = "" if measure.units == measure.questions else f" about {measure.units} {measure.unit}s"
    for group in groups:
        here = [score for score in measure.scores if score.group == group]
        metrics, arms = (list(dict.fromkeys(getattr(s, key) for s in here)) for key in ("metric", "arm"))
        cells = {(score.arm, score.metric): _interval(score) for score in here}
        part = f", {measure.by} {group} (n={here[0].n})" if group else f": {measure.questions} questions{units}"
        print_table(f"{measure.name}{part}", ("arm", *metrics),
                    [(arm, *[cells[arm, metric] for metric in metrics]) for arm in arms])  # fmt: skip


def _interval(score: "StudyScore | StudyClaim", signed: bool = False) -> str:
    from graftwork.report import words

    if signed:
        return f"{words.signed(score.value)} {words.signed_interval(score.low, score.high)}"
    return f"{words.score(score.value)} {words.interval(score.low, score.high)}"


def _outcome(claim: "StudyClaim") -> str:
    from graftwork.report.words import score

    detects = f" (detects {score(claim.detects)})" if claim.outcome == "undecided" else ""
    return claim.outcome + detects
