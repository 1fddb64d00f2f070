"""Every finding that the source can make, with its rule and its fix: the table of docs/stuck.md.

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


@dataclass(frozen=True, order=True)
class FindingRow:
    """A finding as it is written in the source."""

    code: str
    rule: str
    fix: str


def findings() -> list[FindingRow]:
    """Sorted by code; of equal codes each wording once."""
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    constants = {name: text for tree in trees for name, text in _assigned_texts(tree).items() if name.isupper()}
    return sorted({one for tree in trees for one in _of(tree, constants)})


def table() -> str:
    """In Markdown, a row a code: the fullest wording of each."""
    rows: dict[str, FindingRow] = {}
    for one in findings():
        before = rows.get(one.code)
        if before is None or len(one.rule + one.fix) > len(before.rule + before.fix):
            rows[one.code] = one
    lines = [f"| `{one.code}` | {_cell(one.rule)} | {_cell(one.fix)} |" for one in rows.values()]
    return "\n".join(["| code | rule | fix |", "|---|---|---|", *lines])


def _of(tree: ast.Module, constants: dict[str, str]) -> Iterator[FindingRow]:
    texts = constants | _assigned_texts(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        given = node.args
        code = given[0].value if isinstance(given[0], ast.Constant) and isinstance(given[0].value, str) else None
        if code is None:
            continue
        named = {word.arg: word.value for word in node.keywords}
        if name == "Finding":
            rule, fix = _at(given, 4, named, "rule", texts), _at(given, 5, named, "hint", texts)
            yield FindingRow(code, rule, fix)
        elif name in HELPERS:
            rule, fix = _at(given, 3, named, "rule", texts), _at(given, 4, named, "hint", texts)
            yield FindingRow(HELPERS[name] + code, rule, fix)


def _assigned_texts(tree: ast.Module) -> dict[str, str]:
    """Texts that a name is assigned to: constants of the module and locals."""
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    texts: dict[str, str] = {}
    for node in assigned:
        match node.targets, node.value:
            case [ast.Name(name)], (ast.Constant(str()) | ast.JoinedStr() | ast.BinOp()) as value:
                texts[name] = _text(value, texts)
            case [ast.Tuple(names)], ast.Tuple(values):
                pairs = zip(names, values, strict=False)
                texts |= {
                    n.id: _text(v, {}) for n, v in pairs if isinstance(n, ast.Name) and isinstance(v, ast.Constant)
                }
    return texts


def _at(given: list[ast.expr], place: int, named: dict[str | None, ast.expr], name: str, texts: dict[str, str]) -> str:
    node = given[place] if len(given) > place else named.get(name)
    return "" if node is None else _text(node, texts)


def _text(node: ast.expr, texts: dict[str, str]) -> str:
    """The text of an expression; a variable by its name in capitals, dots for any other value."""
    match node:
        case ast.Constant(value):
            return str(value)
        case ast.JoinedStr(parts):
            return "".join(_text(part, texts) for part in parts)
        case ast.FormattedValue(value):
            return _text(value, texts)
        case ast.BinOp(left, ast.Add(), right):
            return _text(left, texts) + _text(right, texts)
        case ast.IfExp(_, body, orelse):
            return max(_text(body, texts), _text(orelse, texts), key=len)
        case ast.Name(name):
            return texts.get(name, name.upper())
        case ast.Attribute(_, name):
            return name.upper()
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
