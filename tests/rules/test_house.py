"""House rules of the code's structure: names, docstrings, sizes of modules, and the verbs of the command line."""

import ast
from pathlib import Path

import pytest
import typer.main
from typer.core import TyperGroup

from benchmarks import house
from benchmarks.house import ROOT
from graftwork.cli import app

MOST_MODULES = 337
SHORT_MODULES = {
    "graftwork/adapters/full.py",  # an adapter kind is a module
    "graftwork/adapters/ia3.py",
    "graftwork/adapters/spec.py",  # their union
    "graftwork/cli/base.py",  # a group of commands is a module
    "graftwork/plugins.py",  # rewards and scorers of other packages
    "graftwork/prequantized/awq.py",  # a format of quantised checkpoints is a module
    "graftwork/prequantized/mxfp4.py",
    "graftwork/recipes/element_prose.py",  # a recipe is a module
    "graftwork/recipes/python_code.py",
    "graftwork/recipes/python_docs.py",
    "graftwork/recipes/ua_parse.py",
    "serving/engine/adapters/prefix.py",
    "serving/evaluation/scorers/plugin.py",  # a scorer is a module
    "serving/evaluation/scorers/protocol.py",
    "serving/rag/rerank.py",
    "training/lr_schedule.py",
    "training/objectives/spec.py",  # the union of the objectives
}
"""Modules that may be shorter than house.SHORT lines: one variant, or one union, a module."""
VERBS = {
    *("plan", "tune", "train", "serve", "compare", "quantize", "chat", "demo", "rebase", "exec", "trial", "doctor"),
    *("swap", "adapters ls", "adapters show", "adapters verify", "adapters promote", "adapters rollback"),
    *("adapters register", "adapters load", "adapters pin", "adapters unpin", "adapters unload", "adapters rm"),
    *(
        "adapters merge",
        "adapters publish",
        "base check",
        "data show",
        "config check",
        "config show",
        "config schema",
        "experiment start",
        "experiment feedback",
    ),
    *("experiment status", "experiment ramp", "experiment stop", "experiment kill", "experiment resume"),
    *("experiment report", "jobs ls", "jobs status", "jobs logs", "jobs wait", "jobs cancel", "jobs resubmit"),
    *("jobs export", "k8s render", "rag index", "rag search", "rag eval"),
}
"""Commands of the command line. A new one is a decision: documents and scripts name them."""


@pytest.fixture(scope="module")
def texts() -> dict[Path, str]:
    return {path: path.read_text(encoding="utf-8") for path in house.modules()}


@pytest.fixture(scope="module")
def trees(texts: dict[Path, str]) -> dict[Path, ast.Module]:
    return {path: ast.parse(text) for path, text in texts.items()}


def relative(paths: list[Path]) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in paths}


def test_no_class_name_is_defined_twice(trees: dict[Path, ast.Module]) -> None:
    assert house.defined_twice(trees) == {}


def test_a_module_docstring_begins_with_a_noun_phrase_or_a_verb(trees: dict[Path, ast.Module]) -> None:
    assert relative(house.wrong_openings(trees)) == set()


def test_the_formatter_formats_every_line() -> None:
    mark = "# fmt: " + "skip"
    folders = (*house.FOLDERS, "tests", "benchmarks", "examples")
    paths = {path for folder in folders for path in (ROOT / folder).rglob("*.py")}
    assert relative([path for path in paths if mark in path.read_text(encoding="utf-8")]) == set()


def test_the_product_has_few_modules_of_a_useful_size(texts: dict[Path, str], trees: dict[Path, ast.Module]) -> None:
    lines = {path: house.line_count(text) for path, text in texts.items() if house.has_code(trees[path])}
    assert len(lines) <= MOST_MODULES
    assert relative(house.short(lines)) - SHORT_MODULES == set()


def test_the_verbs_of_the_command_line_are_the_documented_ones() -> None:
    assert set(verbs_of(typer.main.get_command(app))) == VERBS


def verbs_of(command: object, prefix: str = "") -> list[str]:
    """Return the full names of the commands below a group."""
    if not isinstance(command, TyperGroup):
        return [prefix.strip()]
    return [verb for name, below in command.commands.items() for verb in verbs_of(below, f"{prefix} {name}")]
