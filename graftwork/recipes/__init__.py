"""Ready-made tasks on real data: each recipe turns a file of a Python package, or of Python, into rows and passages.

`recipe://NAME/FILE` names their files: train.jsonl, valid.jsonl, eval.jsonl, corpus.jsonl (where facts can be looked
up), schema.json (of the answer) and card.json (source, licence, counts, digests).
"""

import functools
import hashlib
import importlib
import json
import platform
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from graftwork.base.package_source import PackageFile, fetch
from graftwork.errors import DataError
from graftwork.storage.local import Progress, build_once
from graftwork.storage.store import cache_root, json_bytes

RECIPES = {
    "airport-card": "graftwork.recipes.airport_card",
    "airport-city": "graftwork.recipes.airport_city",
    "airport-pairs": "graftwork.recipes.airport_pairs",
    "airport-tools": "graftwork.recipes.airport_tools",
    "bbq-gender": "graftwork.recipes.bbq_gender",
    "city-country": "graftwork.recipes.city_country",
    "country-facts": "graftwork.recipes.country_facts",
    "element-prose": "graftwork.recipes.element_prose",
    "needle": "graftwork.recipes.needle",
    "python-code": "graftwork.recipes.python_code",
    "python-docs": "graftwork.recipes.python_docs",
    "ua-parse": "graftwork.recipes.ua_parse",
}


@dataclass(frozen=True)
class PythonSource:
    """Source of text: files of Python's standard library by globs, without private modules (`_name.py`)."""

    patterns: tuple[str, ...]
    most_bytes: int = 1 << 20
    """Larger files are left out."""

    def __str__(self) -> str:
        return f"python://{platform.python_version()}/{','.join(self.patterns)}"

    @property
    def sha256(self) -> str:
        """Digest of the contents: another patch release is another source."""
        return hashlib.sha256(self.read()).hexdigest()

    def read(self) -> bytes:
        """JSON: path -> text, by path."""
        return _read_library(self.patterns, self.most_bytes)


@functools.cache
def _read_library(patterns: tuple[str, ...], most_bytes: int) -> bytes:
    root = Path(sysconfig.get_path("stdlib"))
    found = {path for pattern in patterns for path in root.glob(pattern)}
    files = sorted(path for path in found if not path.name.startswith("_") and path.stat().st_size <= most_bytes)
    return json.dumps({path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in files}).encode()


@dataclass(frozen=True)
class Built:
    """Result of a recipe: files by name, and facts of its card next to the counts."""

    files: Mapping[str, bytes]
    about: Mapping[str, Any]


class DatasetRecipe(Protocol):
    """A module of this folder. `make` is pure: equal source, equal bytes."""

    SOURCE: PackageFile | PythonSource
    LICENCE: str

    def make(self, source: bytes) -> Built: ...


def build(name: str, on_progress: Progress | None = None) -> Path:
    """Folder of a recipe's files, built once in the cache. Raises DataError (no such recipe), BaseModelError."""
    if name not in RECIPES:
        raise DataError(
            f"recipe {name!r}",
            "there is none of this name",
            f"recipes are {', '.join(sorted(RECIPES))}",
            "write recipe://NAME/FILE",
        )
    recipe: DatasetRecipe = importlib.import_module(RECIPES[name])
    folder = cache_root() / "recipes" / f"{name}-{_identity(recipe)}"
    source = recipe.SOURCE

    def write(empty: Path) -> None:
        content = source.read() if isinstance(source, PythonSource) else fetch(source, on_progress).read_bytes()
        _write(recipe, name, content, empty)

    return build_once(folder, write)


def _identity(recipe: DatasetRecipe) -> str:
    """Short digest of source and code: a changed recipe gets a new folder."""
    code = [Path(str(path)).read_bytes() for path in (recipe.__file__, __file__)]  # type: ignore[attr-defined]
    parts = [recipe.SOURCE.sha256 or "", *(hashlib.sha256(text).hexdigest() for text in code)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]


def split_of(name: str) -> str:
    """The part that a named document belongs to: one in eight is for validation, one in eight held out."""
    return {0: "eval", 1: "valid"}.get(hashlib.sha256(name.encode()).digest()[0] % 8, "train")


def _write(recipe: DatasetRecipe, name: str, source: bytes, folder: Path) -> None:
    built = recipe.make(source)
    card = {
        "recipe": name,
        "source": str(recipe.SOURCE),
        "source_sha256": recipe.SOURCE.sha256,
        "licence": recipe.LICENCE,
        "rows": {file: text.count(b"\n") for file, text in built.files.items() if file.endswith(".jsonl")},
        "sha256": {file: hashlib.sha256(text).hexdigest() for file, text in built.files.items()},
        **built.about,
    }
    for file, text in built.files.items():
        (folder / file).write_bytes(text)
    (folder / "card.json").write_bytes(json_bytes(card))


def jsonl(records: list[dict[str, Any]]) -> bytes:
    """One compact JSON object a line."""
    return "".join(compact(record) + "\n" for record in records).encode()


def compact(value: dict[str, Any]) -> str:
    """JSON without spaces, keys in the order given, as answers are written."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def row(row_id: str, question: str, gold: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A row of one question and its answer."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": compact(gold)}]
    return {"id": row_id, "messages": turns, **more, "gold": gold}


def object_schema(title: str, fields: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Strict JSON schema: exactly these fields, all of them."""
    return json_bytes(
        {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": title,
            "type": "object",
            "properties": fields,
            "required": list(fields),
            "additionalProperties": False,
        }
    )
