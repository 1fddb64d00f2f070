"""Infilling: documents cut into prefix, middle and suffix, the middle moved behind both (arXiv 2207.14255)."""

import hashlib
from array import array
from dataclasses import dataclass

import numpy as np

from graftwork import base_model
from graftwork.chat import Template
from graftwork.errors import ConfigError
from graftwork.training.rows.answered import AnsweredRows
from graftwork.training.rows.cpt import end_token
from graftwork.training.rows.documents import Document, document_keys, fingerprint, read_documents
from graftwork.training.rows.packed import pack_rows
from graftwork.training.rows.part import Part, ReadPart, format_row_count, nothing_left, too_long
from graftwork.training.rows.sentinels import Sentinels, sentinels_of
from graftwork.training.rows.token_rows import TokenRows
from graftwork.training.spec import TrainSpec
from graftwork.training.text_spec import FimSpec


@dataclass(frozen=True)
class Layout:
    """How a cut document is laid out in tokens."""

    template: Template
    sentinels: Sentinels
    end: int
    loss_on_all: bool

    def encode_whole(self, text: str) -> tuple[list[int], list[bool], int]:
        """(ids, trained, where the answer begins) of a document that is left whole."""
        ids = [*self.template.opening_ids, *self.template.encode(text), self.end]
        return ids, [False] + [True] * (len(ids) - 1), 1

    def infill(self, cut: tuple[str, str, str], *, spm: bool) -> tuple[list[int], list[bool], int]:
        """PSM: prefix, suffix, middle. SPM: suffix, then prefix and middle in one. Sentinels are read, never written.

        Each part is tokenised by itself, as it is when the middle is not known yet.
        """
        prefix, middle, suffix = (self.template.continuation_ids(part) for part in cut)
        pre, suf, mid = self.sentinels.ids
        before = [pre, suf, *suffix, mid, *prefix] if spm else [pre, *prefix, suf, *suffix, mid]
        before = [*self.template.opening_ids, *before]
        trained = [self.loss_on_all and token not in self.sentinels.ids for token in before]
        trained[0] = False
        return [*before, *middle, self.end], [*trained, *[True] * (len(middle) + 1)], len(before)


def read(spec: TrainSpec, template: Template, part: Part) -> ReadPart:
    """The documents that fit. Raises DataError, ConfigError (no sentinels, an adapter that can't train them)."""
    objective = spec.objective
    assert isinstance(objective, FimSpec)
    uri, limit = (spec.data.train, spec.data.train_rows) if part == "train" else (spec.data.eval, spec.data.eval_rows)
    assert uri is not None, "asked for a part that the spec has"
    rows = int(base_model.resolve(spec.base).config["vocab_size"])
    sentinels = sentinels_of(objective.sentinels, template, rows)
    if sentinels.train:
        _require_trainable(spec, sentinels)
    layout = Layout(template, sentinels, end_token(template, objective.end_token)[1], objective.loss_on == "all")
    keys = document_keys()
    documents, _ = read_documents(uri, limit=limit, keys=keys)
    warnings, contents = keys.note(f"data.{part}"), array("q", [hash(document.text) for document in documents])
    made, dropped = [], 0
    for number, document in enumerate(documents, start=1):
        ids, trained, start = _row(document, layout, objective, spec.seed, part)
        if len(ids) > spec.max_length:
            dropped += 1
            if spec.on_overlong == "refuse":
                raise too_long(spec, part, number, document.id, len(ids))
            continue
        made.append((ids, trained, start))
    if not made:
        raise nothing_left(spec, part, dropped)
    token_rows = TokenRows.from_pairs([(ids, trained) for ids, trained, _ in made])
    how = "their rows are trained" if sentinels.train else "the base knows them"
    about = f"{format_row_count(documents, 'document')}; sentinels {sentinels.names}: {how}"
    train_ids = sentinels.ids if sentinels.train else ()
    if part == "eval":
        starts = np.array([start for _, _, start in made], dtype=np.int64)
        held = AnsweredRows(token_rows.ids_T, token_rows.trained_T, token_rows.offsets_N1, starts)
        return ReadPart(held, dropped, fingerprint(documents), (about,), train_ids, warnings, contents)
    found, packing = pack_rows(token_rows, objective.packing, spec.max_length)
    return ReadPart(found, dropped, fingerprint(documents), (about, *packing), train_ids, warnings, contents)


def cut_anywhere(text: str, rng: np.random.Generator) -> tuple[str, str, str]:
    """(prefix, middle, suffix): two places drawn among all characters."""
    low, high = sorted(rng.integers(0, len(text) + 1, size=2).tolist())
    return text[:low], text[low:high], text[high:]


def cut_line(text: str, rng: np.random.Generator) -> tuple[str, str, str]:
    """The middle is one whole line, not blank and not the first, without indent and line end; else cut anywhere."""
    lines = text.splitlines(keepends=True)
    choice = [number for number, line in enumerate(lines) if number and line.strip()]
    if not choice:
        return cut_anywhere(text, rng)
    number = int(rng.choice(choice))
    line = lines[number]
    start = sum(map(len, lines[:number])) + len(line) - len(line.lstrip())
    end = start + len(line.strip())
    return text[:start], text[start:end], text[end:]


def _row(
    document: Document, layout: Layout, objective: FimSpec, seed: int, part: Part
) -> tuple[list[int], list[bool], int]:
    """Drawn by seed and id, so that a row is cut alike whatever rows stand beside it. Held-out rows lose one line."""
    drawn = hashlib.sha256(f"{seed} {document.id}".encode()).digest()
    rng = np.random.default_rng(np.frombuffer(drawn, dtype=np.uint32))
    if part == "eval":
        return layout.infill(cut_line(document.text, rng), spm=objective.spm_share == 1)
    if rng.random() >= objective.rate:
        return layout.encode_whole(document.text)
    cut = cut_line if objective.cut == "line" else cut_anywhere
    return layout.infill(cut(document.text, rng), spm=bool(rng.random() < objective.spm_share))


def _require_trainable(spec: TrainSpec, sentinels: Sentinels) -> None:
    if spec.adapter.kind not in ("lora", "full"):
        raise ConfigError(f"objective.kind=fim with adapter.kind={spec.adapter.kind}",
                          f"the base has not learned its sentinels ({sentinels.names})",
                          "their rows are trained with a lora, or with all weights",
                          "set adapter.kind=lora")  # fmt: skip
