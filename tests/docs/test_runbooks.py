"""Commands, files and specs in the documentation exist and are valid; each finding is listed with its fix."""

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from graftwork.cli import app
from graftwork.cluster.spec import ClusterSpec
from graftwork.config import load
from tests.docs.finding_codes import findings, table

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / name for name in ("clusters.md", "stuck.md")]
GUIDES = [
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("guide", "guide-training", "guide-tuning", "ray-cluster", "glossary")),
]
BLOCK = re.compile(r"^```(?:bash)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPEC = re.compile(r"^```yaml\n(# \w+\.yaml\nkind: .*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(graftwork [^`]+)`")
REMOVED = ("graftwork command", "graftwork study FILE", "graftwork cluster start|join|stop")
"""Commands that docs/glossary.md names as the old ones."""


def commands() -> list[tuple[str, str]]:
    """(page, command) of every graftwork command, in blocks and in the text; `ls|show` is two commands."""
    found = []
    for page in [*PAGES, *GUIDES]:
        text = page.read_text(encoding="utf-8")
        lines = [line for block in BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()]
        written = [line.strip() for line in lines if line.strip().startswith("graftwork ")]
        for command in [*written, *(inline.replace("\\|", "|") for inline in INLINE.findall(text))]:
            if command not in REMOVED:
                found += [(page.name, alternative) for alternative in alternatives(command)]
    return list(dict.fromkeys(found))


def alternatives(command: str) -> list[str]:
    """`graftwork rag index|search FILE` as one command per verb."""
    words = command.split(" ")
    place = next((n for n, word in enumerate(words) if "|" in word and not word.startswith("-")), None)
    if place is None:
        return [command]
    return [" ".join([*words[:place], verb, *words[place + 1 :]]) for verb in words[place].split("|")]


@pytest.mark.parametrize(("page", "command"), commands())
def test_every_command_and_its_flags_exist(page: str, command: str) -> None:
    words = shlex.split(command, comments=True)[1:]
    here = typer.main.get_command(app)
    while words and hasattr(here, "commands"):
        assert words[0] in here.commands, f"{page}: {command}: no verb {words[0]}"
        here = here.commands[words.pop(0)]
    flags = {flag for parameter in here.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        if word.startswith("-") and word != "-":
            assert word.partition("=")[0] in flags, f"{page}: {command}: no flag {word}"


@pytest.mark.parametrize("text", SPEC.findall((ROOT / "README.md").read_text(encoding="utf-8")))
def test_the_specs_of_the_readme_are_valid(text: str, tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(text)
    load(file)


def test_the_runbooks_files_exist() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for path in re.findall(r"(?:-f|-k) (k8s/[\w./-]+)", text):
            assert (ROOT / path).exists(), f"{page.name}: {path}"
        for link in re.findall(r"\]\(([\w./-]+)\)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_runbooks_cluster_file_is_valid(tmp_path: Path) -> None:
    [text] = re.findall(r"^```yaml\n(kind: cluster.*?)^```", PAGES[0].read_text(encoding="utf-8"), re.M | re.S)
    assert yaml.safe_load(text)["kind"] == "cluster"
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    spec = load(file, expect="cluster")
    assert isinstance(spec, ClusterSpec)
    assert spec.retry.on == ("lost", "preempted"), "YAML 1.1 takes a bare `on` for true"


def test_every_finding_is_listed() -> None:
    page = PAGES[1].read_text(encoding="utf-8")
    codes = {one.code for one in findings()}
    assert codes
    missing = sorted(code for code in codes if f"| `{code}` |" not in page)
    assert not missing, f"python -m tests.docs.finding_codes --write: {missing}"


def test_the_list_of_findings_has_no_codes_that_are_gone() -> None:
    listed = set(re.findall(r"^\| `([EW]-[A-Z0-9-]+)` \|", PAGES[1].read_text(encoding="utf-8"), re.MULTILINE))
    assert listed == set(re.findall(r"^\| `([EW]-[A-Z0-9-]+)` \|", table(), re.MULTILINE))


def test_every_finding_has_a_rule_and_a_fix() -> None:
    rows = re.findall(r"^\| `([EW]-[A-Z0-9-]+)` \| (.*?) \| (.*?) \|$", table(), re.MULTILINE)
    assert rows
    assert [code for code, rule, fix in rows if len(rule.strip(". ")) < 4 or len(fix.strip(". ")) < 4] == []


def test_at_most_three_findings_share_a_fix() -> None:
    fixes = [fix for _, fix in re.findall(r"^\| `([EW]-[A-Z0-9-]+)` \| .*? \| (.*?) \|$", table(), re.MULTILINE)]
    assert {fix: fixes.count(fix) for fix in fixes if fixes.count(fix) > 3} == {}
