"""Parsing functions of the measurements of the code's structure, on small sources."""

import ast
from pathlib import Path

import pytest

from benchmarks import house
from benchmarks.house import ROOT


def trees(**sources: str) -> dict[Path, ast.Module]:
    return {ROOT / name.replace("__", "/") / "m.py": ast.parse(text) for name, text in sources.items()}


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("graftwork/config.py", "graftwork.config"),
        ("graftwork/base/__init__.py", "graftwork.base"),
        ("serving/engine/request.py", "graftwork.serving.engine.request"),
        ("training/__init__.py", "graftwork.training"),
    ],
)
def test_a_file_is_named_as_it_is_imported(file: str, name: str) -> None:
    assert house.dotted(ROOT / file) == name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"""Whether it is so."""', True),
        ('"""Whichever it is."""', False),
        ('"""How, in words."""', True),
        ('"""Howl of a wolf."""', False),
        ('"""Return the rows."""', False),
        ("x = 1", False),
    ],
)
def test_docstrings_are_judged_by_their_first_word(text: str, expected: bool) -> None:
    path = ROOT / "training" / "m.py"
    assert house.wrong_openings({path: ast.parse(text)}) == ([path] if expected else [])


def test_a_class_is_counted_where_two_modules_define_its_name_at_the_top() -> None:
    found = house.defined_twice(
        trees(training="class A: pass\nclass B: pass", serving="class A: pass\ndef f():\n    class B: pass")
    )
    assert found == {"A": [ROOT / "training/m.py", ROOT / "serving/m.py"]}


def test_a_module_with_one_importer_counts_where_the_importer_is_its_neighbour() -> None:
    folder = ROOT / "training"
    sources = {
        "a": "from graftwork.training import b\nfrom graftwork.training.c import f",
        "b": "from graftwork.training.c import f",
        "c": "",
        "d": "from graftwork.training.d import x",
    }
    found = house.single_importers({folder / f"{name}.py": ast.parse(text) for name, text in sources.items()})
    assert found == [folder / "b.py"]
    far = {folder / "a.py": ast.parse("from graftwork.serving import b"), ROOT / "serving/b.py": ast.parse("x = 1")}
    assert house.single_importers(far) == []


@pytest.mark.parametrize(
    ("file", "term", "expected"),
    [
        ("serving/engine/kv_cache.py", "kv cache", True),
        ("cluster/kuberay/pods.py", "pods", True),
        ("tuning/forkserver.py", "fork server", False),
        ("cluster/jobs/supervisor.py", "supervisor", True),
        ("training/checkpoint_resume.py", "resume", True),
        ("serving/router.py", "adapter slots", False),
    ],
)
def test_a_term_is_found_by_the_name_of_a_file_or_its_folder(file: str, term: str, expected: bool) -> None:
    assert house.is_named(ROOT / file, term) == expected


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("import os\nfrom ray._private import services", [2]),
        ("from torch import _C", [1]),
        ("from graftwork.training import _x\nfrom os import _exit", []),
        ("from ray import __version__", []),
    ],
)
def test_private_imports_are_those_of_other_libraries(source: str, lines: list[int]) -> None:
    assert list(house.private_imports(ast.parse(source))) == lines


def test_short_modules_leave_out_those_of_a_package() -> None:
    counts = {Path("a/__init__.py"): 1, Path("a/b.py"): house.SHORT - 1, Path("a/c.py"): house.SHORT}
    assert house.short(counts) == [Path("a/b.py")]
    assert house.line_count("a\nb\n") == 2
    assert not house.has_code(ast.parse('"""Only this."""'))
    assert house.has_code(ast.parse('"""This."""\nx = 1'))


def test_the_files_of_a_diff_are_counted_below_its_heading() -> None:
    page = [
        "# Page",
        "## Scorer",
        "```diff",
        "+++ b/serving/x.py",
        "+++ b/tests/x.py",
        "```",
        "## Objective",
        "+++ b/y",
    ]
    assert house.edited_by_heading(page) == {"": 0, "Scorer": 2, "Objective": 1}


def test_the_checkout_is_measured() -> None:
    found = house.measure({"functions": 90, "files": 15}, {"functions": 220, "files": 35})
    assert found["modules"] > 200
    assert found["files on the path of a chat request"] == 15
    assert found["class names defined in two or more modules"] == 0
    assert all(isinstance(value, int | str) for value in found.values())
