"""python-code: modules of Python's standard library as code, a file a document, and their functions.

Source: the running Python (PSF licence). `train`, `valid` and `eval` hold whole modules; `functions-...` the functions
and methods of the same modules, for infilling.
"""

import ast
import json
import textwrap
from collections.abc import Iterator
from typing import Any

from graftwork.recipes import Built, PythonSource, jsonl, split_of

SOURCE = PythonSource(("*.py", "json/*.py", "collections/*.py", "email/*.py"), most_bytes=40_000)
LICENCE = "PSF-2.0"

LINES = range(4, 30)
"""Of a function, its head included."""
CHARACTERS = range(120, 1200)


def make(source: bytes) -> Built:
    """Modules parted by path, and their functions: none that stands in a held-out module is in train as well."""
    modules: dict[str, str] = json.loads(source)
    files: dict[str, bytes] = {}
    seen: set[str] = set()
    for part in ("eval", "valid", "train"):
        chosen = {path: text for path, text in modules.items() if split_of(path) == part and text.strip()}
        files[f"{part}.jsonl"] = jsonl([{"id": path, "text": text} for path, text in chosen.items()])
        files[f"functions-{part}.jsonl"] = jsonl(list(_functions(chosen, seen)))
    return Built(files, {"split": "by the module's path", "functions": f"{LINES.start} to {LINES.stop - 1} lines"})


def _functions(modules: dict[str, str], seen: set[str]) -> Iterator[dict[str, Any]]:
    for path, text in modules.items():
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef) or node.end_lineno is None:
                continue
            code = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])) + "\n"
            if code in seen or code.count("\n") not in LINES or len(code) not in CHARACTERS:
                continue
            seen.add(code)
            yield {"id": f"{path}:{node.lineno}:{node.name}", "text": code}
