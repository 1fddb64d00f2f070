"""Plain text as documents: records with `text` (JSONL, CSV, Parquet, the hub), a text file, a folder, a glob."""

import glob
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork import data, records
from graftwork.config import canonical_json
from graftwork.errors import DataError
from graftwork.row_keys import DOCUMENT, KeyCheck


@dataclass(frozen=True)
class Document:
    """One text. `id` is the row's, or the path of its file."""

    id: str
    text: str


def document_keys() -> KeyCheck:
    """The check of the keys of rows of plain text: no prompt is rendered, all of the text is learned."""
    return KeyCheck(DOCUMENT, prompt=False)


def read_documents(uri: str, *, limit: int | None = None, keys: KeyCheck | None = None) -> tuple[list[Document], int]:
    """(documents in order, blank files left out). keys (default: `document_keys()`) counts or rejects other keys.

    Raises DataError (a bad row or file named), StorageError.
    """
    path = Path(uri.removeprefix("file://")).expanduser()
    local = "://" not in uri.removeprefix("file://")
    if _holds_records(uri, path):
        return _from_records(uri, limit, keys or document_keys()), 0
    if local and (glob.has_magic(str(path)) or path.is_dir()):
        return _from_files(uri, path, limit)
    text = data.read_text(uri)
    if not text.strip():
        raise DataError(uri, "it is blank", "a document holds text", "check the path")
    return [Document(path.name, text)], 0


def fingerprint(documents: Sequence[Document]) -> str:
    """sha256 hex over ids and texts, in order."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(canonical_json([document.id, document.text]).encode() + b"\n")
    return digest.hexdigest()


def _holds_records(uri: str, path: Path) -> bool:
    """A document a row: by the name's ending, in a folder by that of all its files."""
    if uri.startswith("hf://"):
        return True
    files = [file.name for file in path.iterdir()] if path.is_dir() else [path.name]
    return bool(files) and all(name.lower().endswith(tuple(records.READERS)) for name in files)


def _from_files(uri: str, path: Path, limit: int | None) -> tuple[list[Document], int]:
    """Files below a folder, or those that a glob names; hidden ones and byte code are nobody's text."""
    root = path if path.is_dir() else Path(*_before_magic(path))
    found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    documents, blank = [], 0
    for file in sorted(file for file in found if file.is_file()):
        name = file.relative_to(root)
        if any(part.startswith(".") or part == "__pycache__" for part in name.parts):
            continue
        text = _text_of(file)
        blank += not text.strip()
        documents += [Document(name.as_posix(), text)] if text.strip() else []
        if len(documents) == limit:
            break
    if not documents:
        raise DataError(uri, "no file with text in it", "a folder or a glob names at least one text file",
                        "check the path; ** in a glob goes into folders")  # fmt: skip
    return documents, blank


def _text_of(file: Path) -> str:
    try:
        return data.read_text(str(file))
    except DataError as error:
        raise DataError(error.subject, error.problem, "every file of a folder or glob is UTF-8 text",
                        "name the files by a glob, such as FOLDER/**/*.txt") from error  # fmt: skip


def _before_magic(path: Path) -> list[str]:
    parts = list(path.parts)
    magic = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return parts[:magic] or ["."]


def _from_records(uri: str, limit: int | None, keys: KeyCheck) -> list[Document]:
    documents: list[Document] = []
    seen: dict[str, int] = {}
    for number, record in records.read_records(uri):
        keys.check(record, f"{uri} row {number}")
        document = Document(str(record.get("id", number)), _text(record, f"{uri} row {number}: text"))
        records.require_new(document.id, number, seen, uri)
        documents.append(document)
        if len(documents) == limit:
            break
    if not documents:
        raise records.no_rows(uri)
    return documents


def _text(record: dict[str, Any], where: str) -> str:
    text = record.get("text")
    if isinstance(text, str) and text.strip():
        records.require_whole(text, where)
        return text
    fields = ", ".join(record) or "no fields"
    found = f"the field is missing (found {fields})" if "text" not in record else f"found {text!r}"
    raise DataError(where, found, "a row of plain text holds it in `text`",
                    "conversations (`messages`) are for objective.kind=sft")  # fmt: skip
