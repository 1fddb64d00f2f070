"""Infilling: documents cut into prefix, middle and suffix, the middle moved behind both (arXiv 2207.14255)."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from graftwork.base.load import resolve
from graftwork.config import Spec
from graftwork.errors import ConfigError
from graftwork.training.objectives.cpt import (
    Document,
    check_plain_text,
    document_keys,
    end_token,
    fingerprint,
    read_documents,
)
from graftwork.training.objectives.protocol import Packing, Part, Traits, check_generates, nothing_left, too_long
from graftwork.training.objectives.rows import (
    AnsweredRows,
    ReadPart,
    TokenRows,
    check_packing,
    data_of,
    format_row_count,
    pack_rows,
)
from graftwork.training.objectives.sft import sft_trainer

if TYPE_CHECKING:
    from graftwork.prompts.template import Template
    from graftwork.training.objectives.trainer import BuiltTrainer, TrainerContext
    from graftwork.training.spec import TrainSpec


class SentinelSpec(Spec):
    """The three tokens that stand before prefix, suffix and middle."""

    prefix: str | None = None
    """A special token of the tokenizer that nothing else uses; its row is trained. All three, or none."""
    suffix: str | None = None
    middle: str | None = None
    tokens: Literal["auto", "existing", "add"] = "auto"
    """existing: named ones, or those that the base was taught. add: rows behind the tokenizer's last, trained with the
    adapter; `base.extra_tokens` makes room. auto: existing, else add."""

    @property
    def names(self) -> tuple[str, str, str] | None:
        """The named tokens."""
        given = (self.prefix, self.suffix, self.middle)
        return (given[0], given[1], given[2]) if given[0] and given[1] and given[2] else None

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        given = [name for name in (self.prefix, self.suffix, self.middle) if name is not None]
        if given and len(set(given)) < 3:
            raise ValueError("sentinels: name three different tokens (prefix, suffix, middle), or none")
        if given and self.tokens == "add":
            raise ValueError("sentinels: names can't take effect with tokens=add: an added row has no name")
        return self


class FimSpec(Spec):
    """Infilling: a document becomes prefix, suffix and middle (Bavarian et al. 2022, arXiv 2207.14255)."""

    kind: Literal["fim"] = "fim"
    cut: Literal["characters", "line"] = "characters"
    """Where the middle begins and ends. characters: at two random ones, as in the paper. line: it is one whole line."""
    rate: float = Field(default=0.9, gt=0, le=1)
    """Share of the documents that are cut; the others stay whole, so that writing on is not forgotten."""
    spm_share: float = Field(default=0.5, ge=0, le=1)
    """Share of the cut ones laid out suffix-prefix-middle; the others are prefix-suffix-middle."""
    loss_on: Literal["all", "middle"] = "all"
    """all: every token but the sentinels. middle: what is to be filled in, and its end."""
    packing: Packing = "none"
    sentinels: SentinelSpec = SentinelSpec()
    end_token: str | None = None
    """Special token behind the middle; null takes the pretraining's (`<|endoftext|>` or its kin), else eos_token."""
    eval_tokens: int = Field(default=48, ge=1)
    """Most tokens generated for a held-out middle, which is one line."""

    @property
    def traits(self) -> Traits:
        return Traits(packing=self.packing, conversations=False, adds_up=False)

    def check(self, run: TrainSpec) -> None:
        check_packing(run, self.packing)
        if run.data.eval is not None:
            check_generates(run, "data.eval with objective.kind=fim")
        check_plain_text(run, self.kind)

    def read(self, spec: TrainSpec, template: Template, part: Part) -> ReadPart:
        """The documents that fit. Raises DataError, ConfigError (no sentinels, an adapter that can't train them)."""
        source, limit = data_of(spec, part)
        rows = int(resolve(spec.base).config["vocab_size"])
        sentinels = sentinels_of(self.sentinels, template, rows)
        if sentinels.train and not spec.adapter.trains_tokens:
            raise ConfigError(
                f"objective.kind=fim with adapter.kind={spec.adapter.kind}",
                f"the base has not learned its sentinels ({sentinels.names})",
                "their rows are trained with a lora, or with all weights",
                "set adapter.kind=lora",
            )
        layout = Layout(template, sentinels, end_token(template, self.end_token)[1], self.loss_on == "all")
        keys = document_keys()
        documents, found = read_documents(source, limit=limit, keys=keys)
        warnings, contents = keys.note(f"data.{part}"), array("q", [hash(document.text) for document in documents])
        made, dropped = [], 0
        for number, document in enumerate(documents, start=1):
            ids, trained, start = _row(document, layout, self, spec.seed, part)
            if len(ids) > spec.max_length:
                dropped += 1
                if spec.on_overlong == "refuse":
                    raise too_long(spec, part, number, document.id, len(ids))
                continue
            made.append((ids, trained, start, number))
        if not made:
            raise nothing_left(spec, part, dropped)
        numbers = tuple(number for *_, number in made)
        token_rows = TokenRows.from_pairs([(ids, trained) for ids, trained, *_ in made])
        how = "their rows are trained" if sentinels.train else "the base knows them"
        about = (f"{format_row_count(documents, 'document')}; sentinels {sentinels.names}: {how}", *found)
        train_ids = sentinels.ids if sentinels.train else ()
        if part == "eval":
            starts = np.array([start for _, _, start, _ in made], dtype=np.int64)
            held = AnsweredRows(token_rows.ids_T, token_rows.trained_T, token_rows.offsets_N1, starts)
            return ReadPart(held, dropped, fingerprint(documents), about, train_ids, warnings, contents, keys, numbers)
        packed_rows, packing = pack_rows(token_rows, self.packing, spec.max_length)
        return ReadPart(
            packed_rows,
            dropped,
            fingerprint(documents),
            (*about, *packing),
            train_ids,
            warnings,
            contents,
            keys,
            numbers,
        )

    def build(self, setting: TrainerContext) -> BuiltTrainer:
        """Build the trainer on rearranged documents; held-out: loss, exact match, edit similarity."""
        from graftwork.training.objectives.trainer import BuiltTrainer, sample_eval_answers

        training, data, tokenizer = sft_trainer(setting), setting.job.data, setting.tokenizer()

        def evaluate() -> Mapping[str, float]:
            assert isinstance(data.eval, AnsweredRows), "the rows that `read` returns for held-out documents"
            answers = sample_eval_answers(training.trainer, data.eval, tokenizer, data.pad_id, self.eval_tokens)
            return {**training.evaluate(), **answers}

        return BuiltTrainer(training.trainer, evaluate, evaluate_first=True)


FAMILIES = (
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, SantaCoder
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # CodeLlama
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder  # noqa: RUF001
)
"""(prefix, suffix, middle) of tokenizers whose bases learned to infill."""


@dataclass(frozen=True)
class Sentinels:
    """Ids of the three tokens. `train`: the base has not learned them, so their rows are trained with the adapter."""

    prefix: int
    suffix: int
    middle: int
    train: bool
    names: str
    """For people."""

    @property
    def ids(self) -> tuple[int, int, int]:
        """In the order prefix, suffix, middle."""
        return self.prefix, self.suffix, self.middle


def sentinels_of(spec: SentinelSpec, template: Template, rows: int) -> Sentinels:
    """The tokens that the spec means, on a base whose embedding has `rows` rows. Raises ConfigError."""
    if spec.names is not None:
        return _named_sentinels(spec.names, template)
    own = next((family for family in FAMILIES if all(name in template.specials for name in family)), None)
    if own is not None and spec.tokens != "add":
        return _known_sentinels(own, template, train=False)
    spare = rows - template.vocab_size
    if spec.tokens != "existing" and spare >= 3:
        first = template.vocab_size
        return Sentinels(first, first + 1, first + 2, train=True, names=f"rows {first} to {first + 2}")
    reserved = ", ".join(name for name, number in template.specials.items() if number not in template.stop_ids)
    raise ConfigError(
        f"objective.sentinels.tokens={spec.tokens}",
        f"the tokenizer has no infilling tokens and the embedding {spare} rows beyond it",
        "sentinels are the tokenizer's own, three reserved tokens that are named, or three rows beyond the tokenizer",
        f"set base.extra_tokens=3, or name sentinels.prefix, suffix and middle: three that nothing uses of {reserved}",
    )


def _named_sentinels(names: tuple[str, str, str], template: Template) -> Sentinels:
    unknown = [name for name in names if name not in template.specials]
    if unknown:
        raise ConfigError(
            f"objective.sentinels: {unknown[0]!r}",
            "the tokenizer has no such special token",
            f"its special tokens: {', '.join(template.specials)}",
            "name three of them",
        )
    taken = [name for name in names if template.specials[name] in template.stop_ids]
    if taken:
        raise ConfigError(
            f"objective.sentinels: {taken[0]!r}",
            "it ends an answer",
            "a sentinel means nothing else yet",
            "name a reserved token",
        )
    return _known_sentinels(names, template, train=names not in FAMILIES)


def _known_sentinels(names: tuple[str, str, str], template: Template, *, train: bool) -> Sentinels:
    prefix, suffix, middle = (template.specials[name] for name in names)
    return Sentinels(prefix, suffix, middle, train, " ".join(names))


@dataclass(frozen=True)
class Layout:
    """Token layout of a cut document."""

    template: Template
    sentinels: Sentinels
    end: int
    loss_on_all: bool

    def encode_document(self, text: str) -> tuple[list[int], list[bool], int]:
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
    """Drawn by seed and id, so that a row is cut alike whatever other rows there are. Held-out rows lose one line."""
    drawn = hashlib.sha256(f"{seed} {document.id}".encode()).digest()
    rng = np.random.default_rng(np.frombuffer(drawn, dtype=np.uint32))
    if part == "eval":
        return layout.infill(cut_line(document.text, rng), spm=objective.spm_share == 1)
    if rng.random() >= objective.rate:
        return layout.encode_document(document.text)
    cut = cut_line if objective.cut == "line" else cut_anywhere
    return layout.infill(cut(document.text, rng), spm=bool(rng.random() < objective.spm_share))
