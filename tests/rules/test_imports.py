"""The dependence rule of docs/architecture.md, read from the code itself."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("cluster", "training", "serving", "tuning")
MAY_IMPORT = {
    "spine": set(),
    "cluster": {"spine"},
    "training": {"spine", "cluster"},
    "serving": {"spine", "cluster"},
    "tuning": {"spine", "cluster", "training"},
    "cli": {"spine", "cluster", "training", "serving", "tuning"},
}
SPEC_NAMES = (  # memory and plan predict from them; they are pure data
    "graftwork.training.spec",
    "graftwork.training.adapter_spec",
    "graftwork.training.objective_spec",
    "graftwork.training.strategy_spec",
    "graftwork.serving.spec",
)
TOP = {"cli", "demo"}  # may import everything
OUTSIDE = ("examples", "benchmarks", "tests")  # not installed


def room(path: Path) -> str:
    """The room a source file belongs to."""
    first = path.relative_to(ROOT).parts[0]
    if first in FOLDERS:
        return first
    part = path.relative_to(ROOT / "graftwork").parts[0].removesuffix(".py")
    return "cli" if part in TOP else "spine"


def imported(tree: ast.AST) -> set[str]:
    """Absolute module names that a file imports anywhere."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import at line {node.lineno}"
            module = node.module or ""
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def sources() -> list[Path]:
    own = [
        p for p in (ROOT / "graftwork").rglob("*.py") if not set(p.relative_to(ROOT / "graftwork").parts) & set(FOLDERS)
    ]
    return own + [p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_each_room_imports_only_what_it_may(path: Path) -> None:
    here = room(path)
    for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
        parts = name.split(".")
        assert parts[0] not in FOLDERS, f"{path}: import graftwork.{name}, not {name}"
        assert parts[0] not in OUTSIDE, f"{path} imports {name}, which an installed package does not have"
        if parts[0] != "graftwork" or len(parts) == 1 or name.startswith(SPEC_NAMES):
            continue
        there = parts[1] if parts[1] in FOLDERS else "cli" if parts[1] in TOP else "spine"
        assert there == here or there in MAY_IMPORT[here] or there == "spine", (
            f"{path} ({here}) imports {name} ({there})"
        )


SPINE = [
    p
    for folder in ("graftwork", "graftwork/memory", "graftwork/plan")
    for p in (ROOT / folder).glob("*.py")
    if p.stem not in TOP
]


@pytest.mark.parametrize("path", SPINE, ids=lambda p: p.name)
def test_spine_imports_neither_torch_nor_ray_at_module_level(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top_level = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    heavy = {name.split(".")[0] for node in top_level for name in imported(ast.Module([node], []))}
    assert not heavy & {"torch", "ray", "transformers", "peft", "trl", "datasets", "s3fs", "fsspec"}


def test_the_spine_finds_recipes_by_name_and_imports_none() -> None:
    found = [p for p in sources() if room(p) != "cli" and "recipes" not in p.parts]
    names = {p: imported(ast.parse(p.read_text(encoding="utf-8"))) for p in found}
    assert [p for p, used in names.items() if any(name.startswith("graftwork.recipes") for name in used)] == []


def test_ray_is_started_in_one_room() -> None:
    starts = {room(p) for p in sources() if "ray.init(" in p.read_text(encoding="utf-8")}
    assert starts == {"cluster"}, f"ray.init outside cluster/: {starts}"
