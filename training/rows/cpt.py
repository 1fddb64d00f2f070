"""Raw text for continued pretraining: documents with their end token, split where they are long, packed."""

from array import array
from collections.abc import Sequence

import numpy as np

from graftwork.chat import Template
from graftwork.errors import ConfigError, DataError
from graftwork.row_keys import KeyCheck
from graftwork.training.rows.documents import Document, document_keys, fingerprint, read_documents
from graftwork.training.rows.packed import pack_rows
from graftwork.training.rows.part import Part, ReadPart, format_row_count
from graftwork.training.rows.token_rows import TokenRows
from graftwork.training.spec import TrainSpec
from graftwork.training.text_spec import CptSpec, ReplaySpec

ENDS = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>")  # noqa: RUF001
"""What pretraining puts behind a document, by family; an instruct model's `eos_token` ends a turn instead."""


def read(spec: TrainSpec, template: Template, part: Part) -> ReadPart:
    """All tokens of all documents. Raises DataError, ConfigError (no such end token), StorageError."""
    objective = spec.objective
    assert isinstance(objective, CptSpec)
    uri, limit = (spec.data.train, spec.data.train_rows) if part == "train" else (spec.data.eval, spec.data.eval_rows)
    assert uri is not None, "asked for a part that the spec has"
    end_name, end = end_token(template, objective.end_token)
    keys = document_keys()
    documents, blank = read_documents(uri, limit=limit, keys=keys)
    warnings, contents = keys.note(f"data.{part}"), array("q", [hash(document.text) for document in documents])
    ids = [document_ids(document, template, end) for document in documents]
    notes = [f"{format_row_count(documents, 'document')}, {sum(map(len, ids))} tokens, each ended by {end_name}"]
    notes += [f"{format_row_count(range(blank), 'blank file')} left out"] if blank else []
    if objective.replay is not None and part == "train":
        replayed = document_keys()
        again = _replayed(objective.replay, template, end, sum(map(len, ids)), spec.seed, replayed)
        warnings += replayed.note("objective.replay.data")
        documents, ids = documents + [document for document, _ in again], ids + [tokens for _, tokens in again]
        notes.append(f"replay: {format_row_count(again, 'document')}, {sum(len(tokens) for _, tokens in again)} tokens")
    pieces = [piece for tokens in ids for piece in split(tokens, spec.max_length)]
    if len(pieces) > len(ids):
        cuts = format_row_count(pieces[len(ids) :], "cut")
        notes.append(f"{cuts} in documents of more than {spec.max_length} tokens; none is lost")
    rows, packing = pack_rows(TokenRows.from_pairs(pieces), objective.packing, spec.max_length)
    return ReadPart(rows, 0, fingerprint(documents), (*notes, *packing), (), warnings, contents)


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
        raise ConfigError(f"objective.end_token={asked}", "the base has no such special token",
                          f"its special tokens: {', '.join(template.specials)}", "name one of them")  # fmt: skip
    names = [asked] if asked else [name for name in (*ENDS, *template.eos_names) if name in template.specials]
    if not names:
        raise ConfigError("objective.end_token", "the base's tokenizer names no token that ends a document",
                          f"its special tokens: {', '.join(template.specials)}", "set objective.end_token")  # fmt: skip
    return names[0], template.specials[names[0]]


def _replayed(
    replay: ReplaySpec, template: Template, end: int, new_tokens: int, seed: int, keys: KeyCheck
) -> list[tuple[Document, list[int]]]:
    """Documents drawn until their tokens are the asked share of all."""
    documents, _ = read_documents(replay.data, keys=keys)
    wanted = new_tokens * replay.fraction / (1 - replay.fraction)
    drawn: list[tuple[Document, list[int]]] = []
    for index in np.random.default_rng([seed, 1]).permutation(len(documents)):
        if wanted <= 0:
            return drawn
        document = documents[index]
        drawn.append((Document(f"replay/{document.id}", document.text), document_ids(document, template, end)))
        wanted -= len(drawn[-1][1])
    if wanted <= 0:
        return drawn
    have = sum(len(ids) for _, ids in drawn)
    most = 1000 * have // (have + new_tokens) / 1000
    raise DataError(f"objective.replay.fraction={replay.fraction:g}", f"{replay.data} has {have} tokens, too few "
                    f"beside {new_tokens} new ones", "no text is replayed twice",
                    f"set objective.replay.fraction={most} or give more text")  # fmt: skip
