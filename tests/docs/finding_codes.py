"""Every finding that the source can make, with its rule and its mend: the table of docs/stuck.md.

    python -m tests.docs.finding_codes --write     puts it between the marks of docs/stuck.md

Read from the syntax tree: calls of `Finding(code, level, where, problem, rule, hint)`, and of `refuse` and `warn`
(cluster/kuberay/object_view.py), which leave the level and the code's first letter to their name.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "stuck.md"
BEGIN, END = "<!-- findings: python -m tests.docs.finding_codes --write -->", "<!-- /findings -->"
FOLDERS = ("cluster", "graftwork/stages", "serving", "training", "tuning")
HELPERS = {"refuse": "E-", "warn": "W-"}
UNKNOWN = "..."
AS_RULED = "change the key that it names as the rule says"


@dataclass(frozen=True, order=True)
class Told:
    """A finding as it is written in the source."""

    code: str
    rule: str
    mend: str


def told() -> list[Told]:
    """Sorted by code; of equal codes each wording once."""
    found = {one for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")) for one in _of(path)}
    return sorted(found)


def table() -> str:
    """In Markdown, a row a code: the fullest wording of each."""
    rows: dict[str, Told] = {}
    for one in told():
        before = rows.get(one.code)
        if before is None or len(one.rule + one.mend) > len(before.rule + before.mend):
            rows[one.code] = one
    lines = [f"| `{one.code}` | {_cell(one.rule)} | {_cell(one.mend) or AS_RULED} |" for one in rows.values()]
    return "\n".join(["| code | rule | mend |", "|---|---|---|", *lines])


def _of(path: Path) -> Iterator[Told]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        given = node.args
        code = given[0].value if isinstance(given[0], ast.Constant) and isinstance(given[0].value, str) else None
        if code is None:
            continue
        named = {word.arg: word.value for word in node.keywords}
        if name == "Finding":
            rule, mend = _at(given, 4, named, "rule"), _at(given, 5, named, "hint")
            yield Told(code, rule, mend)
        elif name in HELPERS:
            rule, mend = _at(given, 3, named, "rule"), _at(given, 4, named, "hint")
            yield Told(HELPERS[name] + code, rule, mend)


def _at(given: list[ast.expr], place: int, named: dict[str | None, ast.expr], name: str) -> str:
    node = given[place] if len(given) > place else named.get(name)
    return "" if node is None else _text(node)


def _text(node: ast.expr) -> str:
    """What is written down of a text; dots for what is only known later."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) if isinstance(part, ast.Constant) else UNKNOWN for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return UNKNOWN


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    whole = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    if "--write" in sys.argv:
        PAGE.write_text(whole, encoding="utf-8")
    else:
        print(table())


if __name__ == "__main__":
    main()
