"""File tree of the product: docs/files.md, with the first sentence of each module's docstring.

    python -m tests.docs.file_tree            prints the page
    python -m tests.docs.file_tree --write    writes docs/files.md

The clauses of folders come from the tree in docs/architecture.md, which is written by hand.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[2]
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PAGE = ROOT / "docs" / "files.md"
PARTS = ("graftwork", "cluster", "training", "tuning", "serving")
COMMAND = "python -m tests.docs.file_tree --write"
HEAD = f"""# Files

Every module of the product with the first sentence of its docstring. This page is written by
`{COMMAND}`; a test compares it with `git ls-files`.
[architecture.md](architecture.md) shows the folders and the life of a run and of a request.
"""
SENTENCE = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!vs)[.!?](?=\s|$)")


def modules() -> list[PurePosixPath]:
    """Python modules that git tracks, sorted; `__init__.py` files without code or docstring are left out."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *PARTS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    paths = sorted(PurePosixPath(name) for name in set(listed) if name.endswith(".py") and (ROOT / name).is_file())
    return [path for path in paths if path.name != "__init__.py" or (ROOT / path).read_text(encoding="utf-8").strip()]


def clause(path: PurePosixPath) -> str:
    """First sentence of the module's docstring, without its full stop; empty where there is none."""
    text = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or ""
    first = " ".join(text.split("\n\n")[0].split())
    end = SENTENCE.search(first)
    return first[: end.start()] if end else first


def folders() -> dict[str, str]:
    """Folder -> clause, as the tree in docs/architecture.md has them."""
    text = ARCHITECTURE.read_text(encoding="utf-8")
    block = text.split("## Folders\n")[1].split("```")[1].strip("\n")
    found: dict[str, str] = {}
    path: list[str] = []
    for line in block.splitlines():
        name, _, what = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        path = [*path[:depth], name.rstrip("/")]
        found["/".join(path)] = what.strip()
    return found


def render(clauses: Mapping[str, str]) -> str:
    """The whole page; `clauses`: those of the folders."""
    lines = [HEAD]
    by_folder: dict[str, list[PurePosixPath]] = {}
    for path in modules():
        by_folder.setdefault(str(path.parent), []).append(path)
    for folder in sorted(by_folder, key=lambda name: (PARTS.index(name.split("/")[0]), name)):
        what = clauses.get(folder, "")
        lines += [f"## {folder}/", "", *([f"{what[0].upper()}{what[1:]}.", ""] if what else [])]
        lines += ["| file | content |", "|---|---|"]
        lines += [f"| `{path.name}` | {clause(path).replace('|', chr(92) + '|')} |" for path in by_folder[folder]]
        lines.append("")
    return "\n".join(lines).rstrip("\n") + "\n"


def main() -> None:
    """Print the page; write it with `--write`."""
    page = render(folders())
    if "--write" in sys.argv:
        PAGE.write_text(page, encoding="utf-8")
    else:
        print(page, end="")


if __name__ == "__main__":
    main()
