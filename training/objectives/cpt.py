"""Continued pretraining on raw text: documents with their end token, split where they are long, packed."""

from __future__ import annotations

import glob
import hashlib
import itertools
import math
import re
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from graftwork.config import Spec, canonical_json
from graftwork.datasets import rows as data
from graftwork.datasets.examples import iter_examples, purpose_keys
from graftwork.datasets.keys import KeyCheck
from graftwork.datasets.readers import READERS, is_saved, join_some
from graftwork.datasets.sources import RowSource
from graftwork.errors import ConfigError, DataError
from graftwork.training.objectives.protocol import Packing, Part, Traits
from graftwork.training.objectives.rows import ReadPart, TokenRows, check_packing, data_of, format_row_count, pack_rows
from graftwork.training.objectives.sft import sft_trainer

if TYPE_CHECKING:
    from graftwork.prompts.template import Template
    from graftwork.training.objectives.trainer import BuiltTrainer, TrainerContext
    from graftwork.training.spec import TrainSpec


ENDS = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>")  # noqa: RUF001
"""End tokens of a document in pretraining, by family; an instruct model's `eos_token` ends a turn instead."""


class ReplaySpec(Spec):
    """Other text among the new, so that less of the old is forgotten."""

    data: str
    """As `data.train`; documents are drawn from it by the seed."""
    fraction: float = Field(gt=0, lt=1)
    """Share of all tokens, new and replayed."""


class CptSpec(Spec):
    """Continued pretraining on raw text: rows with `text`, a text file, a folder or a glob of text files."""

    kind: Literal["cpt"] = "cpt"
    packing: Packing = "best_fit"
    """Documents in rows of up to `max_length`; longer ones are split, and nothing is lost."""
    replay: ReplaySpec | None = None
    end_token: str | None = None
    """Special token behind each document; null takes the pretraining's (`<|endoftext|>` or its kin), else eos_token."""

    @property
    def traits(self) -> Traits:
        return Traits(packing=self.packing, conversations=False)

    def check(self, run: TrainSpec) -> None:
        check_packing(run, self.packing)
        check_plain_text(run, self.kind)
        if "on_overlong" in run.model_fields_set:
            raise ValueError(
                "on_overlong can't take effect with objective.kind=cpt: a longer document is split, not dropped"
            )

    def read(self, spec: TrainSpec, template: Template, part: Part) -> ReadPart:
        """All tokens of all documents. Raises DataError, ConfigError (no such end token), StorageError."""
        source, limit = data_of(spec, part)
        end_name, end = end_token(template, self.end_token)
        keys = document_keys()
        documents, found = read_documents(source, limit=limit, keys=keys)
        warnings, contents = keys.note(f"data.{part}"), array("q", [hash(document.text) for document in documents])
        ids = [document_ids(document, template, end) for document in documents]
        notes = [f"{format_row_count(documents, 'document')}, {sum(map(len, ids))} tokens, each ended by {end_name}"]
        notes += found
        if self.replay is not None and part == "train":
            replayed = document_keys()
            again = _draw_replay(self.replay, template, end, sum(map(len, ids)), spec.seed, replayed)
            warnings += replayed.note("objective.replay.data")
            documents, ids = documents + [document for document, _ in again], ids + [tokens for _, tokens in again]
            notes.append(
                f"replay: {format_row_count(again, 'document')}, {sum(len(tokens) for _, tokens in again)} tokens"
            )
        pieces = [piece for tokens in ids for piece in split(tokens, spec.max_length)]
        if len(pieces) > len(ids):
            cuts = format_row_count(pieces[len(ids) :], "cut")
            notes.append(f"{cuts} in documents of more than {spec.max_length} tokens; none is lost")
        rows, packing = pack_rows(TokenRows.from_pairs(pieces), self.packing, spec.max_length)
        numbers = tuple(number for number, tokens in enumerate(ids, 1) for _ in split(tokens, spec.max_length))
        about = (*notes, *packing)
        return ReadPart(rows, 0, fingerprint(documents), about, (), warnings, contents, keys, numbers)

    def build(self, setting: TrainerContext) -> BuiltTrainer:
        """Next-token loss over all tokens but the first of each document, and the perplexity of held-out text."""
        from graftwork.training.objectives.trainer import BuiltTrainer

        training = sft_trainer(setting)

        def evaluate() -> Mapping[str, float]:
            figures = training.evaluate()
            return {**figures, "perplexity": math.exp(figures["loss"])}

        return BuiltTrainer(training.trainer, evaluate, evaluate_first=True)


def check_plain_text(run: TrainSpec, kind: str) -> None:
    """Raise ValueError for keys of conversations where the rows are plain text."""
    for key, given in (("prompt", "prompt" in run.model_fields_set), ("data.context", run.data.context is not None)):
        if given:
            raise ValueError(f"{key} can't take effect with objective.kind={kind}: its rows are plain text")


@dataclass(frozen=True)
class Document:
    """One text. `id` is the row's, or the path of its file."""

    id: str
    text: str


def document_keys() -> KeyCheck:
    """The check of the keys of rows of plain text: no prompt is rendered, all of the text is learned."""
    return purpose_keys("documents")


def read_documents(
    source: str | RowSource, *, limit: int | None = None, keys: KeyCheck | None = None
) -> tuple[list[Document], list[str]]:
    """(documents in order, notes on blank files and on data files read as text).

    keys (default: `document_keys()`) counts or rejects other keys. Raises DataError that names the row or file,
    and StorageError.
    """
    source = RowSource.of(source)
    paths = {part.path: Path(part.path.removeprefix("file://")).expanduser() for part in source.parts}
    if all(_holds_records(uri, path) for uri, path in paths.items()):
        found = iter_examples(source, "documents", limit=limit, keys=keys or document_keys())
        return [Document(one.id, one.text or "") for one in found], []
    uri, path = next(iter(paths.items()))
    if len(paths) > 1 or source.columns or source.template or source.share:
        raise DataError(
            f"data.train={source}",
            "found text files with several sources, data.columns, data.template or a share in data.eval",
            "these keys are for rows (JSONL, JSON, CSV, Parquet)",
            "name one folder of text files, or write the texts as rows with `text`",
        )
    if _names_files(uri, path):
        return _read_files(uri, path, limit)
    text = data.read_text(uri)
    if not text.strip():
        raise DataError(uri, "it is blank", "a document holds text", "check the path")
    return [Document(path.name, text)], []


def fingerprint(documents: Sequence[Document]) -> str:
    """sha256 hex over ids and texts, in order."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(canonical_json([document.id, document.text]).encode() + b"\n")
    return digest.hexdigest()


CODE = re.compile(
    r"\.("
    r"bash|c|cc|clj|cpp|cs|cu|dart|el|erl|ex|exs|f90|go|h|hpp|hs|ipynb|java|jl|js|"
    r"jsx|kt|lean|lua|m|ml|mjs|php|pl|proto|ps1|py|pyi|r|rb|rs|scala|sh|sql|swift|tf|"
    r"ts|tsx|v|vue|zig"
    r")$",
    re.IGNORECASE,
)
"""Endings of source code."""
ABOUT = ("readme", "license", "dataset_info")
"""Beginnings of the names of files that describe a folder, in lower case."""


def _names_files(uri: str, path: Path) -> bool:
    """A folder or a glob on this machine."""
    return "://" not in uri.removeprefix("file://") and (_is_glob(path) or path.is_dir())


def _is_glob(path: Path) -> bool:
    return glob.has_magic(str(path)) and not path.exists()


def _holds_records(uri: str, path: Path) -> bool:
    """A document a row: by the name's ending, in a folder by the files in it and below it but those about it.

    Data files alone are rows. Next to text they are text where none is compressed or Parquet and the files of source
    code are more. Raises DataError for another mix, and for a glob of data files.
    """
    if uri.startswith("hf://") or not _names_files(uri, path):
        return uri.startswith("hf://") or _is_data(path)
    if is_saved(path):
        return True
    files = [file for file in _files(path) if not file.name.lower().startswith(ABOUT)]
    rows, texts = [file for file in files if _is_data(file)], [file for file in files if not _is_data(file)]
    if not rows or (texts and _is_code(rows, texts)):
        return False
    root = _root(path)
    if not texts and not _is_glob(path):
        return True
    found = f"found {rows[0].relative_to(root)}" + (f" next to {texts[0].relative_to(root)}" if texts else "")
    if not texts:
        raise DataError(uri, found, "a glob names text files", f"name one file of rows, or a folder of them: {root}")
    apart = len(rows) > 1 and all(file.parent == rows[0].parent for file in rows)
    apart = apart and not any(file.parent == rows[0].parent for file in texts)
    of_rows = rows[0] if len(rows) == 1 else rows[0].parent if apart else "a folder of the data files alone"
    rule, pattern = "a folder or a glob names rows, or text files", _pattern(root, texts)
    raise DataError(uri, found, rule, f"name {of_rows} for the rows, or {pattern} for the texts")


def _is_data(path: Path) -> bool:
    return path.name.lower().endswith(tuple(READERS))


def _is_code(rows: Sequence[Path], texts: Sequence[Path]) -> bool:
    packed = any(file.suffix.lower() in (".gz", ".zst", ".parquet") for file in rows)
    return not packed and sum(bool(CODE.search(file.name)) for file in texts) > len(rows)


def _pattern(root: Path, texts: Sequence[Path]) -> str:
    """A glob of the texts with the ending that most of them have."""
    suffixes = Counter(file.suffix for file in texts if file.suffix)
    name = f"*{suffixes.most_common(1)[0][0]}" if suffixes else glob.escape(texts[0].name)
    return f"{glob.escape(str(root))}/**/{name}"


def _root(path: Path) -> Path:
    """The folder itself, or the part of a glob before its first pattern."""
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts)) if _is_glob(path) else path


def _files(path: Path) -> list[Path]:
    """Files below a folder, or those that a glob names; hidden ones and byte code are nobody's text."""
    found, root = map(Path, glob.glob(str(path), recursive=True)) if _is_glob(path) else path.rglob("*"), _root(path)
    return sorted(file for file in found if file.is_file() and not _is_left_out(file.relative_to(root)))


def _is_left_out(name: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in name.parts)


def _read_files(uri: str, path: Path, limit: int | None) -> tuple[list[Document], list[str]]:
    """The files of a folder or glob that hold text, with notes about the others."""
    root, documents, blank, data_files = _root(path), [], 0, []
    for file in _files(path):
        name = file.relative_to(root).as_posix()
        try:
            text = data.read_text(str(file))
        except DataError as error:
            rule = "every file of a folder or glob is UTF-8 text"
            hint = "name the files by a glob, such as FOLDER/**/*.txt"
            raise DataError(error.subject, error.problem, rule, hint) from error
        blank += not text.strip()
        documents += [Document(name, text)] if text.strip() else []
        data_files += [name] if text.strip() and _is_data(file) else []
        if len(documents) == limit:
            break
    if not documents:
        raise DataError(
            uri,
            "no file with text in it",
            "a folder or a glob names at least one text file",
            "check the path; ** in a glob goes into folders",
        )
    notes = [f"{format_row_count(range(blank), 'blank file')} left out"] if blank else []
    if data_files:
        notes.append(f"{format_row_count(data_files, 'data file')} read as text: {join_some(data_files)}")
    return documents, notes


def document_ids(document: Document, template: Template, end: int) -> list[int]:
    """A document as pretraining sees it."""
    return [*template.opening_ids, *template.encode(document.text), end]


def split(ids: Sequence[int], longest: int) -> list[tuple[Sequence[int], Sequence[bool]]]:
    """Pieces of up to `longest` tokens. A piece begins with the last token of the one before it, as its past.

    So each token but the document's first is a target of the loss exactly once.
    """
    starts = range(0, max(len(ids) - 1, 1), longest - 1)
    pieces = [ids[start : start + longest] for start in starts]
    return [(piece, [False] + [True] * (len(piece) - 1)) for piece in pieces]


def end_token(template: Template, asked: str | None) -> tuple[str, int]:
    """Name and id of the token behind a document. Raises ConfigError."""
    if asked is not None and asked not in template.specials:
        raise ConfigError(
            f"objective.end_token={asked}",
            "the base has no such special token",
            f"its special tokens: {', '.join(template.specials)}",
            "name one of them",
        )
    names = [asked] if asked else [name for name in (*ENDS, *template.eos_names) if name in template.specials]
    if not names:
        raise ConfigError(
            "objective.end_token",
            "the base's tokenizer names no token that ends a document",
            f"its special tokens: {', '.join(template.specials)}",
            "set objective.end_token",
        )
    return names[0], template.specials[names[0]]


def _draw_replay(
    replay: ReplaySpec, template: Template, end: int, new_tokens: int, seed: int, keys: KeyCheck
) -> list[tuple[Document, list[int]]]:
    """Documents drawn until their tokens are the asked share of all."""
    documents, _ = read_documents(replay.data, keys=keys)
    wanted = new_tokens * replay.fraction / (1 - replay.fraction)
    drawn: list[tuple[Document, list[int]]] = []
    for index in np.random.default_rng([seed, 1]).permutation(len(documents)):
        if wanted <= 0:
            break
        document = documents[index]
        drawn.append((Document(f"replay/{document.id}", document.text), document_ids(document, template, end)))
        wanted -= len(drawn[-1][1])
    if wanted <= 0:
        return drawn
    have = sum(len(ids) for _, ids in drawn)
    most = 1000 * have // (have + new_tokens) / 1000
    raise DataError(
        f"objective.replay.fraction={replay.fraction:g}",
        f"{replay.data} has {have} tokens, too few for {new_tokens} new ones",
        "no text is replayed twice",
        f"set objective.replay.fraction={most} or give more text",
    )
