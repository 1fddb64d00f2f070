"""`graftwork rag index|search|eval FILE`: build an index, search it, and evaluate retrievers on it."""

from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from graftwork import config
from graftwork.cli.options import JsonFlag, Sets, SpecFile, Target
from graftwork.cli.render import duration, echo, print_json, print_table, progress_bar

if TYPE_CHECKING:
    from graftwork.report.schema import Score
    from graftwork.serving.rag.eval import RagReport
    from graftwork.serving.rag.spec import RagSpec

app = typer.Typer(help="Index documents, search them, and evaluate retrievers.", no_args_is_help=True)
_SHOWN_CHARS = 160


@app.command()
def index(file: SpecFile, sets: Sets = [], as_json: JsonFlag = False) -> None:  # noqa: B006
    """Build or update the index. Only changed documents are indexed, and endpoints reload it within a second."""
    import time

    from graftwork.serving.rag.eval import make_index

    spec, began = _spec(file, sets), time.perf_counter()
    with progress_bar(f"rag index {spec.name}", as_json) as bar:
        done = make_index(spec, on_progress=lambda at, total: bar(at, total, "passages embedded"))
    if as_json:
        print_json(
            {
                **done.manifest.model_dump(),
                "uri": done.uri,
                "added": done.added,
                "removed": done.removed,
                "kept": done.kept,
                "embedded": done.embedded,
                "reused": done.reused,
                "notes": done.notes,
            }
        )
        return
    changed = "nothing changed" if done.reused else f"{done.added} added, {done.removed} removed, {done.kept} kept"
    vectors = f", {done.embedded} embedded" if spec.needs_vectors else ""
    echo(
        f"{spec.name} {done.manifest.version}: {done.manifest.passages} passages ({changed}{vectors}) in "
        f"{duration(time.perf_counter() - began)}"
    )
    for note in done.notes:
        echo(f"note: {note}")
    echo(f"in an arm: retriever: {{corpus: {done.uri}}}")


@app.command()
def search(
    file: SpecFile,
    query: Annotated[str, typer.Argument(metavar="QUERY", help="Query as plain text.")],
    kind: Annotated[
        str, typer.Option("--kind", metavar="KIND", help="lexical, dense, hybrid, or auto (the choice of `rag eval`).")
    ] = "auto",
    sets: Sets = [],  # noqa: B006
    as_json: JsonFlag = False,
) -> None:
    """Search the index and print the passages, best first."""
    from graftwork.errors import ConfigError
    from graftwork.serving.rag.eval import open_made

    if kind not in ("lexical", "dense", "hybrid", "auto"):
        raise ConfigError(f"--kind {kind}", "no such retriever", "kinds are lexical, dense, hybrid and auto")
    spec = _spec(file, sets)
    hits = open_made(spec, kind).search(query, spec.k)
    if as_json:
        print_json([{"id": hit.passage.id, "score": hit.score, "text": hit.passage.text} for hit in hits])
        return
    if not hits:
        echo("nothing found: no passage shares a word with the query")
        return
    print_table(
        f"{spec.name}: {query}",
        ("rank", "id", "score", "text"),
        [(rank, hit.passage.id, f"{hit.score:.3f}", _short(hit.passage.text)) for rank, hit in enumerate(hits, 1)],
    )


@app.command(name="eval")
def evaluate(file: SpecFile, target: Target = "local", sets: Sets = [], as_json: JsonFlag = False) -> None:  # noqa: B006
    """Evaluate each retriever on the questions of the spec, test it against lexical, and recommend one."""
    spec = _spec(file, sets)
    from graftwork.cluster.session import session
    from graftwork.serving.rag.eval import questions_of, run_eval

    questions_of(spec)
    with (
        progress_bar(f"rag eval {spec.name}", as_json) as bar,
        session(target) if spec.rerank else nullcontext() as here,
    ):
        report = here.run(run_eval, spec, on_progress=bar) if here else run_eval(spec, on_progress=bar)
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        show_retrievers(report)


def show_retrievers(report: "RagReport") -> None:
    """Print a line per retriever, a line per difference, and the choice."""
    names = list(report.retrievers[0].scores)
    titles = {"hit": f"hit@{report.k}", "hit_1": "hit@1", "mrr": "MRR@10", "in_context": f"answer in {report.k}"}
    print_table(
        f"{report.name} {report.version}: {report.n} questions, {report.passages} passages",
        ("retriever", *[titles[name] for name in names], "ms p50", "p99"),
        [
            (
                row.name,
                *[_interval(row.scores[name]) for name in names],
                *["" if value is None else f"{value:.1f}" for value in (row.ms_p50, row.ms_p99)],
            )
            for row in report.retrievers
        ],
    )
    if report.differences:
        print_table(
            "against lexical (paired, Holm within a metric)",
            ("retriever", "metric", "difference", "p", "verdict", "detectable"),
            [
                (
                    d.a,
                    titles[d.metric],
                    f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]",
                    f"{d.p_adjusted:.2g}",
                    d.verdict,
                    f"{d.mde:.3f}",
                )
                for d in report.differences
            ],
        )
    for note in report.notes:
        echo(f"note: {note}")
    echo(report.sentence)
    if report.questions_uri:
        echo(f"each question: {report.questions_uri}")


def _spec(file: SpecFile, sets: Sets) -> "RagSpec":
    from graftwork.serving.rag.spec import RagSpec

    spec = config.load(file, sets, expect="rag")
    assert isinstance(spec, RagSpec)
    return spec


def _interval(score: "Score") -> str:
    from graftwork.report.format import rounded

    return f"{rounded(score.value, 3)} [{rounded(score.low, 3)}, {rounded(score.high, 3)}]"


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _SHOWN_CHARS else flat[: _SHOWN_CHARS - 2] + " …"
