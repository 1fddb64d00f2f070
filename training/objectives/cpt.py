"""Continued pretraining on raw text: documents with their end token, split where they are long, packed."""

from __future__ import annotations

import glob
import hashlib
import itertools
import math
import re
from array import array
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
from graftwork.datasets.readers import READERS
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
        documents, blank = read_documents(source, limit=limit, keys=keys)
        warnings, contents = keys.note(f"data.{part}"), array("q", [hash(document.text) for document in documents])
        ids = [document_ids(document, template, end) for document in documents]
        notes = [f"{format_row_count(documents, 'document')}, {sum(map(len, ids))} tokens, each ended by {end_name}"]
        notes += [f"{format_row_count(range(blank), 'blank file')} left out"] if blank else []
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
) -> tuple[list[Document], int]:
    """(documents in order, blank files left out). keys (default: `document_keys()`) counts or rejects other keys.

    Raises DataError (a bad row or file named), StorageError.
    """
    source = RowSource.of(source)
    paths = {part.path: Path(part.path.removeprefix("file://")).expanduser() for part in source.parts}
    if all(_holds_records(uri, path) for uri, path in paths.items()):
        found = iter_examples(source, "documents", limit=limit, keys=keys or document_keys())
        return [Document(one.id, one.text or "") for one in found], 0
    uri, path = next(iter(paths.items()))
    if len(paths) > 1 or source.columns or source.template or source.share:
        raise DataError(
            f"data.train={source}",
            "found text files with several sources, data.columns, data.template or a share in data.eval",
            "these keys are for rows (JSONL, JSON, CSV, Parquet)",
            "name one folder of text files, or write the texts as rows with `text`",
        )
    local = "://" not in uri.removeprefix("file://")
    if local and (glob.has_magic(str(path)) or path.is_dir()):
        return _read_files(uri, path, limit)
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
    """A document a row: by the name's ending, in a folder by that of all its files.

    Raises DataError for rows next to text. JSON and CSV may be text: of a folder of code.
    """
    if uri.startswith("hf://"):
        return True
    files = sorted(one.name for one in path.iterdir() if one.name[0] != ".") if path.is_dir() else [path.name]
    others = [name for name in files if not name.lower().endswith(tuple(READERS))]
    if others and (rows := next((name for name in files if _ROWS.search(name.lower())), None)):
        found, rule = f"found {rows} next to {others[0]}", "a folder holds rows, or text files"
        raise DataError(uri, found, rule, f"name {path / rows}, or text files by a glob such as {path}/**/*.txt")
    return bool(files) and not others


_ROWS = re.compile(r"\.(jsonl(\.gz|\.zst)?|parquet)$")
"""Names of files that are never text."""


def _read_files(uri: str, path: Path, limit: int | None) -> tuple[list[Document], int]:
    """Files below a folder, or those that a glob names; hidden ones and byte code are nobody's text."""
    fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    root = path if path.is_dir() else Path(*fixed)
    found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    documents, blank = [], 0
    for file in sorted(file for file in found if file.is_file()):
        name = file.relative_to(root)
        if any(part.startswith(".") or part == "__pycache__" for part in name.parts):
            continue
        try:
            text = data.read_text(str(file))
        except DataError as error:
            rule = "every file of a folder or glob is UTF-8 text"
            hint = "name the files by a glob, such as FOLDER/**/*.txt"
            raise DataError(error.subject, error.problem, rule, hint) from error
        blank += not text.strip()
        documents += [Document(name.as_posix(), text)] if text.strip() else []
        if len(documents) == limit:
            break
    if not documents:
        raise DataError(
            uri,
            "no file with text in it",
            "a folder or a glob names at least one text file",
            "check the path; ** in a glob goes into folders",
        )
    return documents, blank


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
