"""`docs/studies.md` from the recorded results: `python -m examples.studies.pages` writes it again."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from examples.studies.schema import StudyClaim, StudyMeasure, StudyReport
from graftwork.report import format as words

_INTRODUCTION = """# Studies

Published results scaled down: SmolLM2-135M-Instruct, 4-bit, LoRA, on two CPU cores. Each study is one YAML in
`examples/studies/`, run by `python -m examples.studies FILE` from the root of the repository; its result is stored in
`examples/studies/results/`. The claims were written into the specs before the numbers, are paired by question, and are
tested together (Holm). A pattern is *reproduced* where the test finds the published direction, *not reproduced* where
it finds the other or shows the difference to be within the margin, else *undecided*. Intervals are at 95% and of one
training seed: they cover the choice of questions, not that of the seed.

Left out: that a small finetuned model beats a larger one (LoRA Land, arXiv 2405.00732) needs a larger base than a CPU
answers with in minutes; full finetuning, because training here makes adapters alone.

By the plans (`--plan`) all six take 38 minutes on two idle cores: 13 to train (adapters are shared), 25 to measure.

This page is generated from the results; a test compares them.
"""


def render_markdown(results: Sequence[StudyReport], names: Sequence[str]) -> str:
    """The whole page, one section a result. names: of all studies, so that those without a result are named."""
    left = sorted(set(names) - {result.name for result in results})
    waiting = [f"Written, and without a recorded result so far: {', '.join(f'`{name}`' for name in left)}.\n"]
    return "\n".join([_INTRODUCTION, *(waiting if left else []), *(_section(result) for result in results)])


def _section(result: StudyReport) -> str:
    lines = [
        f"## {result.title}",
        "",
        f"`examples/studies/{result.name}.yaml` · base {result.base} "
        f"(`{result.base_digest[:12]}`) · seed {result.seed}",
        "",
        f"**Published.** {result.paper}",
        "",
        f"**Here.** {result.sentence}",
        "",
    ]
    lines += ["| pattern | on | difference | p (Holm) | n | here |", "|---|---|---|---|---|---|"]
    lines += [_claim(result, claim) for claim in result.claims] + [""]
    for measure in result.measures:
        lines += [*_measure(measure), ""]
    trained = [
        f"{adapter.name} ({adapter.method}; {adapter.rows} rows, {adapter.steps} steps)" for adapter in result.adapters
    ]
    lines += [f"Trained: {'; '.join(trained)}.", ""] if trained else []
    lines += [f"- {line}" for line in result.deviations]
    return "\n".join([*lines, ""])


def _claim(result: StudyReport, claim: StudyClaim) -> str:
    by = next(measure.by for measure in result.measures if measure.name == claim.measure)
    part = f", {by} {claim.of}" if claim.of else ""
    part += f" against {claim.than_of}" if claim.than_of else ""
    n = str(claim.n) if claim.n_than_of is None else f"{claim.n} and {claim.n_than_of}"
    detects = f" (detects {words.score(claim.detects)})" if claim.outcome == "undecided" else ""
    value = f"{words.signed(claim.value)} {words.signed_interval(claim.low, claim.high)}"
    return (
        f"| {claim.statement} | {claim.metric} of {claim.a} − {claim.b}{part} | {value} | "
        f"{words.p_value(claim.p_adjusted)} | {n} | {claim.outcome}{detects} |"
    )


def _measure(measure: StudyMeasure) -> Iterator[str]:
    metrics = [info.name for info in measure.metrics]
    groups = list(dict.fromkeys(score.group for score in measure.scores))
    columns = [(metric, group) for metric in metrics for group in groups]
    heads = [f"{metric}, {measure.by} {group}" if group else metric for metric, group in columns]
    units = "" if measure.units == measure.questions else f" about {measure.units} {measure.unit}s"
    yield f"| {measure.name}: {measure.questions} questions{units} | {' | '.join(heads)} |"
    yield "|---" * (len(columns) + 1) + "|"
    cells = {
        (s.arm, s.metric, s.group): f"{words.signed(s.value) if s.metric == 'bias' else words.score(s.value)} "
        f"{words.interval(s.low, s.high)}"
        for s in measure.scores
    }
    for arm in dict.fromkeys(score.arm for score in measure.scores):
        yield f"| {arm} | {' | '.join(cells[arm, metric, group] for metric, group in columns)} |"


def main() -> None:
    """Write the page of this checkout."""
    root = Path(__file__).parents[2]
    (root / "docs" / "studies.md").write_text(page_of(root / "examples" / "studies"), encoding="utf-8")


def page_of(studies: Path) -> str:
    """The page of a folder of studies and their `results/`."""
    results = [
        StudyReport.model_validate_json(path.read_text(encoding="utf-8"))
        for path in sorted((studies / "results").glob("*.json"))
    ]
    return render_markdown(results, [path.stem for path in studies.glob("*.yaml")])


if __name__ == "__main__":
    main()
