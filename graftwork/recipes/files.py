"""What every recipe writes, and how."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.package_files import PackageFile


@dataclass(frozen=True)
class Recipe:
    """A task: its source, and the function that writes its files into an empty folder."""

    source: PackageFile
    licence: str
    form: int
    """Raised whenever the written bytes change."""
    write: Callable[[Path], None]


def answer_text(fields: Mapping[str, Any]) -> str:
    """The strict compact JSON that is asked for: keys in order, no spaces, text as it is."""
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))


def row(
    id_: str, question: str, gold: Mapping[str, Any], asked: Iterable[str], doc_id: str | None = None
) -> dict[str, Any]:
    """One row: question and answer, the answer as an object, the fields that the question gives away."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer_text(gold)}]
    found: dict[str, Any] = {"id": id_, "messages": messages, "gold": dict(gold), "asked": list(asked)}
    return found if doc_id is None else {**found, "doc_id": doc_id}


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON line each."""
    with path.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in rows)


def write_card(folder: Path, recipe: Recipe, what: str) -> None:
    """card.json, last: where the data comes from, its licence, and a digest and count for each file."""
    files = {
        path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "lines": path.read_bytes().count(b"\n")}
        for path in sorted(folder.iterdir())
    }
    source = {"package": recipe.source.package, "version": recipe.source.version, "file": recipe.source.file,
              "sha256": recipe.source.sha256, "licence": recipe.licence}  # fmt: skip
    card = {"what": what, "source": source, "form": recipe.form, "files": files}
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


def digest(text: str) -> str:
    """sha256 hex of a text."""
    return hashlib.sha256(text.encode()).hexdigest()
