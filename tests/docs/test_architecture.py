"""Pages about the code against the code: folders, files, named functions, their order on real runs, and links."""

import ast
import asyncio
import difflib
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest
import yaml

from graftwork.base.load import resolve
from graftwork.base.model_shape import facts_of
from graftwork.serving.api.auth import Keys
from graftwork.serving.spec import ServeSpec
from tests.docs import call_trace, file_tree
from tests.local_endpoint import local_client
from tests.service import publish
from tests.training import task

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ARCHITECTURE, GLOSSARY = DOCS / "architecture.md", DOCS / "glossary.md"
PAGES = sorted(path for path in DOCS.glob("*.md") if path.name != "log.md")
PROSE = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
MAX_LINES, MAX_COLUMNS = 130, 100
NAME = re.compile(r"`((?:graftwork|cluster|training|serving|tuning)(?:\.[A-Za-z_]\w*)+)`")
STEP = re.compile(r"^\d+\. ")
BY_RAY_SERVE = ("serving.router.AdapterRouter.choose_replicas",)
"""Steps of a request that only an endpoint on Ray Serve has; tests/ray runs them."""
NOT_WRAPPED = ("extending.md", "stuck.md", "studies.md")
"""Pages whose lines may be longer than `MAX_COLUMNS`; studies.md is written by a script."""
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(
    r"`((?:graftwork|cluster|training|serving|tuning|tests|benchmarks|examples|k8s|docs)/[\w./-]+\.(?:py|yaml|md|html|c))`"
)


def names_in(page: Path) -> list[tuple[str, str]]:
    """(page:line, dotted name) of every function, class or module that a page names."""
    found = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        found += [(f"docs/{page.name}:{number}", name) for name in NAME.findall(line)]
    return found


def steps(heading: str) -> list[str]:
    """First function of each numbered step below a heading of docs/architecture.md."""
    section = ARCHITECTURE.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    firsts = [NAME.search(line) for line in section.splitlines() if STEP.match(line)]
    assert firsts, f"no numbered steps below '{heading}'"
    assert all(firsts), f"a step of '{heading}' does not begin with a function name"
    return [match[1] for match in firsts if match]


def definitions(name: str) -> list[str]:
    """Modules that define a function or class of this name: where one that was moved may be."""
    found = []
    for path in file_tree.modules():
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == name:
                found.append(f"{path}:{node.lineno}")
    return found


def test_the_architecture_fits_one_page() -> None:
    lines = ARCHITECTURE.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_LINES
    assert [line for line in lines if len(line) > MAX_COLUMNS] == []


def test_the_tree_has_exactly_the_folders_of_the_code() -> None:
    listed = file_tree.folders()
    real = {str(parent) for path in file_tree.modules() for parent in path.parents if str(parent) != "."}
    missing, gone = sorted(real - set(listed)), sorted(set(listed) - real)
    assert not missing, f"add to the tree in docs/architecture.md: {missing}"
    assert not gone, f"remove from the tree in docs/architecture.md: {gone}"
    assert all(listed.values()), f"folders without a clause: {[name for name, what in listed.items() if not what]}"


def test_the_list_of_files_is_that_of_the_code() -> None:
    lacking = [str(path) for path in file_tree.modules() if not file_tree.clause(path)]
    assert not lacking, f"modules without a docstring: {lacking}"
    expected, page = file_tree.render(file_tree.folders()), file_tree.PAGE.read_text(encoding="utf-8")
    diff = "\n".join(difflib.unified_diff(page.splitlines(), expected.splitlines(), "docs/files.md", "code", n=0))
    assert page == expected, f"run `{file_tree.COMMAND}`:\n{diff}"


@pytest.mark.parametrize(("where", "name"), [*names_in(ARCHITECTURE), *names_in(GLOSSARY)])
def test_every_named_function_class_and_module_exists(where: str, name: str) -> None:
    try:
        call_trace.resolve(name)
    except LookupError as error:
        last = name.rsplit(".", 1)[-1]
        pytest.fail(f"{where}: `{name}`: {error}; {last!r} is defined in {definitions(last) or 'no module'}")


def test_the_steps_of_a_run_happen_in_this_order(tmp_path: Path) -> None:
    """A real `graftwork train` of two steps on a tiny base: the command and its worker process note first calls."""
    expected = steps("Life of a run")
    spec = task(
        tmp_path, checkpoint_every=1, eval_every=1, num_workers=1, **{"optim.rows_per_step": 24, "optim.epochs": 1}
    )
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump({"kind": "train", **spec.model_dump(mode="json", exclude_unset=True)}))
    facts_of(resolve(spec.base).config)  # computed once a cache; it attaches adapters too
    with call_trace.child_environment(tmp_path, expected) as (environment, order):
        command = [sys.executable, "-c", "from graftwork.cli import main; main()", "train", str(file)]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        require_order(expected, order())


def test_the_steps_of_a_request_happen_in_this_order(tmp_path: Path) -> None:
    """One chat request to an adapter with retrieval, over ingress, replica and engine; only Ray Serve is left out."""
    made = publish(tmp_path / "made")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"id": f"p{n}", "text": f"Colour {n} is red."}) + "\n" for n in range(4)))
    spec = ServeSpec.model_validate(
        {
            "base": str(made.base),
            "root": made.store.uri,
            "quant": {"kind": "none"},
            "engine": {"max_seq_len": 256, "num_threads": 1},
            "arms": [{"name": "tuned", "adapter": "card@latest", "retriever": {"corpus": str(corpus), "k": 1}}],
        }
    )
    expected = [name for name in steps("Life of a request") if name not in BY_RAY_SERVE]
    body = {"model": "arm/tuned", "max_tokens": 4, "messages": [{"role": "user", "content": "Colour 1?"}]}
    order: list[str] = []
    recorder = call_trace.Recorder({}, order.append)

    async def ask() -> None:
        async with local_client(spec, Keys()) as client:
            recorder.look_for({call_trace.code_of(name): name for name in expected})
            answer: httpx.Response = await client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text

    recorder.install()
    try:
        asyncio.run(ask())
    finally:
        recorder.remove()
    require_order(expected, order)


def require_order(expected: Sequence[str], order: Sequence[str]) -> None:
    """Fail with the steps that were not called, or the order in which they were."""
    missing = [name for name in expected if name not in order]
    assert not missing, f"steps of docs/architecture.md that were not called: {missing}"
    assert list(order) == list(expected), "the steps of docs/architecture.md were called in this order:\n" + "\n".join(
        order
    )


def places(page: Path) -> Iterator[str]:
    """Links that lead nowhere and files that do not exist, as `page: text`."""
    text = page.read_text(encoding="utf-8")
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = page.parent / target if target else page
        if not file.exists():
            yield f"{page.name}: ({link}): no such file"
        elif anchor and anchor not in anchors(file):
            yield f"{page.name}: ({link}): no such heading"
    for name in FILE.findall(text):
        if not (ROOT / name).exists():
            yield f"{page.name}: `{name}`: no such file"


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.name)
def test_links_and_files_of_a_page_exist(page: Path) -> None:
    assert list(places(page)) == []


@pytest.mark.parametrize("page", [page for page in PROSE if page.name not in NOT_WRAPPED], ids=lambda page: page.name)
def test_prose_is_wrapped(page: Path) -> None:
    """At 100 columns; tables, code blocks and what a script writes between marks may be longer."""
    wide, code, generated = [], False, False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        code ^= line.lstrip().startswith("```")
        generated = line.startswith("<!-- ") and "--write" in line or (generated and not line.startswith("<!-- /"))
        if len(line) > MAX_COLUMNS and not (code or generated or line.startswith("|")):
            wide.append(f"{page.name}:{number}")
    assert wide == []
