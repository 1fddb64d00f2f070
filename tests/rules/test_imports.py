"""Import rules of docs/architecture.md, read from the code: dependencies of the parts, and imports at module level."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("cluster", "training", "serving", "tuning")
MAY_IMPORT = {
    "core": {"core"},
    "cluster": {"core", "cluster"},
    "training": {"core", "cluster", "training"},
    "serving": {"core", "cluster", "serving"},
    "tuning": {"core", "cluster", "training", "tuning"},
    "stages": {"core", "cluster", "training", "serving", "tuning", "stages"},
    "cli": {"core", "cluster", "training", "serving", "tuning", "stages", "cli"},
}
TOP = {"cli": "cli", "demo": "cli", "stages": "stages"}
"""Modules of graftwork/ that see every stage, by part. stages: plans and jobs of a stage of any kind. demo: runs all
stages and prints, like the command line."""
NOT_INSTALLED = ("examples", "benchmarks", "tests")
TABLES = {
    "graftwork/config.py": "SPEC_KINDS",
    "graftwork/base/meta_model.py": "names of what it builds on the meta device",
    "cluster/private_ray.py": "the check of HTTP requests, which Ray Serve's proxy imports",
    "cluster/kuberay/objects.py": "the application of a RayService, which Ray Serve imports in the cluster",
}
"""Modules that name modules of other parts in strings, which another process or a stage imports."""
HEAVY = {"torch", "ray", "transformers", "peft", "trl", "datasets", "s3fs", "fsspec", "deepspeed", "bitsandbytes"}


def part_of_path(path: Path) -> str:
    """Part of the system that a source file belongs to."""
    first, *rest = path.relative_to(ROOT).parts
    if first in FOLDERS:
        return first
    return TOP.get(rest[0].removesuffix(".py"), "core")


def part_of_name(name: str) -> str:
    """Part that a dotted name of this package belongs to: `graftwork.training.spec` to `training`."""
    second = name.split(".")[1] if "." in name else ""
    return second if second in FOLDERS else TOP.get(second, "core")


def imported(tree: ast.AST) -> set[str]:
    """Absolute names that a file imports anywhere."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import at line {node.lineno}"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def named_in_strings(tree: ast.AST) -> set[str]:
    """Dotted names of this package's modules that stand in string constants (docstrings apart)."""
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {text.split(":")[0] for text in strings if text.startswith("graftwork.") and " " not in text}


def sources() -> list[Path]:
    """Python files of the product, each once: the links of graftwork/ to the other folders are not followed."""
    core = [
        path
        for path in (ROOT / "graftwork").rglob("*.py")
        if path.relative_to(ROOT / "graftwork").parts[0] not in FOLDERS
    ]
    return core + [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_part_imports_only_parts_below_it(path: Path) -> None:
    here, tree = part_of_path(path), tree_of(path)
    for name in imported(tree):
        top = name.split(".")[0]
        assert top not in FOLDERS, f"{path}: import graftwork.{name}, not {name}"
        assert top not in NOT_INSTALLED, f"{path} imports {name}, which an installed package does not have"
        if top == "graftwork":
            there = part_of_name(name)
            assert there in MAY_IMPORT[here], f"{path} ({here}) imports {name} ({there})"
    if str(path.relative_to(ROOT)) not in TABLES:
        for name in named_in_strings(tree):
            there = part_of_name(name)
            assert there in MAY_IMPORT[here], f"{path} ({here}) names {name} ({there}) in a string"


def test_tables_of_names_are_needed() -> None:
    for path in TABLES:
        parts = {part_of_name(name) for name in named_in_strings(tree_of(ROOT / path))}
        assert parts - MAY_IMPORT[part_of_path(ROOT / path)], f"{path} needs no exemption"


@pytest.mark.parametrize(
    "path",
    [path for path in sources() if path.relative_to(ROOT).parts[0] == "graftwork" and path.parent.name != "compat"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_core_loads_no_heavy_library_when_imported(path: Path) -> None:
    top_level = [node for node in tree_of(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
    loaded = {name.split(".")[0] for node in top_level for name in imported(ast.Module([node], []))}
    assert not loaded & HEAVY, f"{path} loads {sorted(loaded & HEAVY)} at module level"


def test_core_finds_recipes_by_name_and_imports_none() -> None:
    found = [path for path in sources() if part_of_path(path) != "cli" and "recipes" not in path.parts]
    users = [path for path in found if any(name.startswith("graftwork.recipes") for name in imported(tree_of(path)))]
    assert users == []


def test_ray_is_started_in_cluster_alone() -> None:
    starts = {part_of_path(path) for path in sources() if starts_ray(tree_of(path))}
    assert starts == {"cluster"}, f"ray.init outside cluster/: {starts}"


def starts_ray(tree: ast.AST) -> bool:
    """Return whether the code calls `ray.init`."""
    return any(isinstance(node, ast.Call) and ast.unparse(node.func) == "ray.init" for node in ast.walk(tree))
