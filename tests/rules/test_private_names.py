"""No module outside graftwork/compat imports or reaches a private name of another library; read from the code."""

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rules.test_imports import ROOT, sources

COMPAT = ROOT / "graftwork" / "compat"
PRIVATE = re.compile(r"_(?!_)\w+")
METHODS = (ast.FunctionDef, ast.AsyncFunctionDef)
OWN_OBJECTS = {"self", "cls"}
ALLOWED = {
    "os._exit",  # the standard library documents these two under their names
    "_asdict",
    "_preload_content",  # the kubernetes client documents these two arguments
    "_request_timeout",
}
REACHED_BY_NAME = {"getattr", "setattr", "hasattr", "delattr"}


def outside() -> list[Path]:
    """Sources but compat."""
    return [path for path in sources() if COMPAT not in path.parents]


def is_private(name: str) -> bool:
    return any(PRIVATE.fullmatch(part) for part in name.split("."))


def is_foreign(module: str) -> bool:
    top = module.split(".")[0]
    return top != "graftwork" and top not in sys.stdlib_module_names


def own_names(tree: ast.AST) -> set[str]:
    """Private names that this file defines: functions, classes, methods, fields and what it assigns to self."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and on_self(node):
            names.add(node.attr)
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def on_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in OWN_OBJECTS


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def found_in(source: str) -> list[str]:
    """`line: name` of each private name of another library that the source uses."""
    tree = ast.parse(source)
    own, found = own_names(tree), []
    for line, name in imports(tree):
        if is_foreign(name) and (is_private(name) or ".core.generated" in name):
            found.append(f"{line}: {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and PRIVATE.fullmatch(node.attr):
            text = ast.unparse(node)
            if node.attr not in own and text not in ALLOWED and node.attr not in ALLOWED:
                found.append(f"{node.lineno}: {text}")
        elif isinstance(node, ast.Call):
            found += [f"{node.lineno}: {name}" for name in named_in(node) if name not in own | ALLOWED]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value  # a module to import later: "ray._raylet", "package._private.thing:function"
            if re.fullmatch(r"[a-z]\w*(\.\w+)+(:\w+)?", text) and is_private(text.replace(":", ".")):
                found.append(f"{node.lineno}: {text!r}")
    return found


def named_in(call: ast.Call) -> Iterator[str]:
    """Private names in getattr's and its relatives' strings, and private keywords of a call."""
    name = call.func.id if isinstance(call.func, ast.Name) else ""
    if name in REACHED_BY_NAME and len(call.args) > 1:
        target = call.args[1]
        if isinstance(target, ast.Constant) and PRIVATE.fullmatch(str(target.value)):
            yield str(target.value)
    yield from (keyword.arg for keyword in call.keywords if keyword.arg and PRIVATE.fullmatch(keyword.arg))


@pytest.mark.parametrize("path", outside(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_uses_no_private_name_of_another_library(path: Path) -> None:
    found = found_in(path.read_text(encoding="utf-8"))
    assert not found, f"{path.relative_to(ROOT)}: move these into graftwork/compat: {found}"


@pytest.mark.parametrize(
    "line",
    [
        "import ray._private.services",
        "from ray._private import services",
        "from ray.train.v2._internal.execution.context import get_train_context",
        "from ray.core.generated import autoscaler_pb2",
        "from torch.utils._pytree import tree_iter",
        "from bitsandbytes.functional import _convert",
        "import ray\nray._private.worker.global_worker",
        "import ray\nray.serve.context._get_global_client().http_config",
        "def f(model): return model.config._attn_implementation",
        "def f(scheduler): scheduler._last_lr = [1.0]",
        "class T(Trainer):\n    def log(self): return self._metrics['train']",
        "class T(Trainer):\n    def log(self): return super()._prepare_inputs()",
        "def f(p): return getattr(p, '_local_tensor', p)",
        "def f(p): setattr(p, '_step', 1)",
        "import importlib\nimportlib.import_module('ray._raylet')",
        "import ray\nray.init(_temp_dir='x')",
    ],
)
def test_the_rule_finds(line: str) -> None:
    assert found_in(line)


@pytest.mark.parametrize(
    "line",
    [
        "import os\nos._exit(1)",
        "def f(key): return key._asdict()",
        "class A:\n    def __init__(self): self._x = 1\ndef f(a): return a._x",
        "from graftwork.statistics import _own",
        "from __future__ import annotations",
        "key = '_name_or_path'",
        "f(__debug__)",
    ],
)
def test_the_rule_allows(line: str) -> None:
    assert not found_in(line)


def overriding() -> list[tuple[Path, str]]:
    """Classes outside compat that define private methods and have a base class."""
    return [
        (path, node.name)
        for path in outside()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
        and node.bases
        and any(isinstance(one, METHODS) and PRIVATE.fullmatch(one.name) for one in node.body)
    ]


@pytest.mark.parametrize(("path", "name"), overriding(), ids=lambda one: one if isinstance(one, str) else one.stem)
def test_a_class_overrides_no_private_method_of_another_library(path: Path, name: str) -> None:
    relative = path.relative_to(ROOT).with_suffix("")
    module = ".".join(relative.parts if relative.parts[0] == "graftwork" else ("graftwork", *relative.parts))
    kind = getattr(importlib.import_module(module), name, None)
    assert inspect.isclass(kind), f"{path}: {name} is defined in a function: its private methods can't be checked"
    foreign = [base for base in kind.__mro__ if is_foreign(base.__module__)]
    for method in (one for one in vars(kind) if PRIVATE.fullmatch(one) and inspect.isfunction(vars(kind)[one])):
        assert not [base for base in foreign if method in vars(base)], f"{path}: {name}.{method} overrides"


@pytest.mark.parametrize("name", ["ray", "hf"])
def test_hooks_that_the_core_imports_load_no_library(name: str) -> None:
    tree = ast.parse((COMPAT / f"{name}.py").read_text(encoding="utf-8"))
    top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    assert not [module for _, module in imports(top) if is_foreign(module)]
