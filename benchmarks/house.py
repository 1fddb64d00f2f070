"""Measurements of the code's structure: sizes, names, call paths. `python -m benchmarks.house [--write]`.

Every figure is computed from the checkout by `ast`, except the two call paths, which `benchmarks/call_paths.py` traces
in processes of their own. `--write` stores the result as benchmarks/results/house.json.
"""

import ast
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.record import Clock, figure, write

ROOT = Path(__file__).parents[1]
FOLDERS = ("graftwork", "cluster", "training", "serving", "tuning")
SHORT = 60
"""A module with fewer lines belongs to its neighbour."""
PACKAGE_FILES = ("__init__.py", "__main__.py")
TERMS = (
    *("heartbeat", "preemption", "resume", "early stopping", "forkserver", "retry", "resources", "lr schedule"),
    *("prefix", "fencing", "virtual tokens", "detokenize", "autotune", "scheduler", "kv cache", "sampling"),
    *("logits processors", "model runner", "lora layers", "adapter slots", "adapter cache", "rate limits"),
    *("checkpoint", "router", "supervisor", "packaging", "preflight", "pods", "bm25", "sequential", "warm start"),
    "prestop",
)
"""Terms that an engineer searches for, spelled as in a file name."""
OPENINGS = ("What", "Whether", "Who", "How", "Which")
"""Words that no module docstring begins with."""


def main() -> int:
    """Print the table; store it with `--write`."""
    from benchmarks.call_paths import trace_chat, trace_train

    clock = Clock()
    result = measure(trace_chat(), trace_train())
    for name, value in result.items():
        print(f"{name:58} {value}")
    if "--write" in sys.argv:
        counts = {name: figure([value], "count") for name, value in result.items() if isinstance(value, int)}
        write("house", None, counts, result, {"method": "counted in the code of this checkout"}, clock)
    return 0


def measure(chat: Mapping[str, Any], train: Mapping[str, Any]) -> dict[str, Any]:
    """Return each measurement by its name. `chat` and `train`: functions and files of the two call paths."""
    texts = {path: path.read_text(encoding="utf-8") for path in modules()}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    coded = {path for path, tree in trees.items() if has_code(tree)}
    lines = {path: line_count(texts[path]) for path in coded}
    found = [term for term in TERMS if any(is_named(path, term) for path in coded)]
    everything = [*texts.values(), *(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))]
    return {
        "modules": len(coded),
        "lines, all modules": sum(lines.values()),
        "lines of a module, median": round(median(lines.values())),
        "lines of a module, largest": max(lines.values()),
        f"modules under {SHORT} lines": len(short(lines)),
        "modules with one importer, in the same folder": len(single_importers(trees)),
        "class names defined in two or more modules": len(defined_twice(trees)),
        f"search terms found by file name, of {len(TERMS)}": len(found),
        "search terms not found": ", ".join(term for term in TERMS if term not in found) or "none",
        "functions on the path of a chat request": chat["functions"],
        "files on the path of a chat request": chat["files"],
        "functions from spec to published adapter": train["functions"],
        "files from spec to published adapter": train["files"],
        "lines with dict[str, Any]": sum(
            "dict[str, Any]" in line for text in texts.values() for line in text.splitlines()
        ),
        "fmt: skip": sum(text.count("# fmt: " + "skip") for text in everything),
        "private names of other libraries outside graftwork/compat": len(private_names(trees)),
        f"module docstrings that begin with {', '.join(OPENINGS)}": len(wrong_openings(trees)),
        "files edited to add a variant (diffs of docs/extending.md)": edited_files(),
    }


def modules() -> Iterator[Path]:
    """Yield the product's Python files that git tracks and that are not empty."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if name.split("/")[0] in FOLDERS and path.is_file() and path.stat().st_size:
            yield path


def has_code(tree: ast.Module) -> bool:
    """Return whether a module has more than a docstring."""
    return any(not isinstance(node, ast.Expr) for node in tree.body)


def line_count(text: str) -> int:
    """Return the number of lines of a file."""
    return text.count("\n")


def short(lines: Mapping[Path, int]) -> list[Path]:
    """Return the modules under SHORT lines, those of a package itself left out."""
    return [path for path, count in lines.items() if count < SHORT and path.name not in PACKAGE_FILES]


def wrong_openings(trees: Mapping[Path, ast.Module]) -> list[Path]:
    """Return the modules whose docstring begins with one of OPENINGS."""
    first = {path: re.match(r"\w*", ast.get_docstring(tree) or "") for path, tree in trees.items()}
    return [path for path, word in first.items() if word is not None and word[0] in OPENINGS]


def dotted(path: Path) -> str:
    """Return the name that code imports a file by."""
    name = str(path.relative_to(ROOT)).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return name if name.split(".")[0] == "graftwork" else f"graftwork.{name}"


def single_importers(trees: Mapping[Path, ast.Module]) -> list[Path]:
    """Return the modules that exactly one other module imports, which is in the same folder."""
    by_name = {dotted(path): path for path in trees}
    importers: dict[Path, set[Path]] = defaultdict(set)
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    target = by_name.get(f"{node.module}.{alias.name}") or by_name.get(node.module)
                    if target is not None and target != path:
                        importers[target].add(path)
    return [path for path, by in importers.items() if len(by) == 1 and next(iter(by)).parent == path.parent]


def defined_twice(trees: Mapping[Path, ast.Module]) -> dict[str, list[Path]]:
    """Return the class names that two or more modules define, with these modules."""
    owners: dict[str, list[Path]] = defaultdict(list)
    for path, tree in trees.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                owners[node.name].append(path)
    return {name: paths for name, paths in owners.items() if len(paths) > 1}


def is_named(path: Path, term: str) -> bool:
    """Return whether the words of a term follow each other in a file's name, or are its folder's name."""
    wanted = term.replace(" ", "_")
    return wanted in path.stem or wanted.rstrip("s") in path.stem or wanted == path.parent.name


def private_names(trees: Mapping[Path, ast.Module]) -> list[str]:
    """Return `file:line` of each import of another library's private name outside graftwork/compat."""
    found = []
    for path, tree in trees.items():
        if "compat" not in path.parts:
            found += [f"{path.relative_to(ROOT)}:{line}" for line in private_imports(tree)]
    return found


def private_imports(tree: ast.Module) -> Iterator[int]:
    """Yield the line of each import statement that names another library's private module or object."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names]
        root = names[0].split(".")[0]
        if root in sys.stdlib_module_names or root in ("graftwork", ""):
            continue
        if any(re.match(r"_(?!_)", part) for name in names for part in name.split(".")):
            yield node.lineno


def edited_files() -> str:
    """Return the number of files that each diff of docs/extending.md edits, by the heading above it."""
    page = ROOT / "docs" / "extending.md"
    if not page.exists():
        return "no docs/extending.md"
    counts = edited_by_heading(page.read_text(encoding="utf-8").splitlines())
    return ", ".join(f"{name}: {count}" for name, count in counts.items() if count)


def edited_by_heading(lines: Iterable[str]) -> Counter[str]:
    """Return the number of `+++ b/` lines below each heading of the second level."""
    counts: Counter[str] = Counter()
    heading = ""
    for line in lines:
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        counts[heading] += line.startswith("+++ b/")
    return counts


if __name__ == "__main__":
    sys.exit(main())
