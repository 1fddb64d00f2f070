"""Preferences: two answers to one conversation, the better one named, rendered by `chat.render`."""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from graftwork import chat, data, records
from graftwork.chat import Message, Prompt, Template
from graftwork.config import canonical_json
from graftwork.errors import DataError
from graftwork.row_keys import PAIR, PREFERENCE_LOSS, KeyCheck
from graftwork.training.rows.part import Part, ReadPart, nothing_left, read_prompt, too_long
from graftwork.training.rows.token_rows import IGNORED, TokenRows
from graftwork.training.spec import TrainSpec

if TYPE_CHECKING:
    import torch

Scored = tuple[Sequence[int], Sequence[bool]]
"""Ids of a conversation, and which of them are the answer's."""


@dataclass(frozen=True)
class PairRows:
    """Pairs of equal number and order; the two conversations of a pair begin with the same prompt ids."""

    chosen: TokenRows
    rejected: TokenRows

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def lengths_N(self) -> NDArray[np.int64]:
        """Tokens of both conversations."""
        return self.chosen.lengths_N + self.rejected.lengths_N

    @property
    def scored_N(self) -> NDArray[np.int64]:
        """Tokens of both answers."""
        return self.chosen.scored_N + self.rejected.scored_N

    @property
    def widths_N(self) -> NDArray[np.int64]:
        """Tokens of the longer conversation."""
        return np.maximum(self.chosen.lengths_N, self.rejected.lengths_N)

    def digest(self) -> str:
        """sha256 hex over both sides."""
        return hashlib.sha256((self.chosen.digest() + self.rejected.digest()).encode()).hexdigest()

    def collate(self, indices: Sequence[int], pad_id: int) -> "dict[str, torch.Tensor]":
        """TRL's form: ids, attention and completion mask (2B, T), first all chosen ones, then all rejected ones."""
        import torch

        sides = [side.collate(indices, pad_id) for side in (self.chosen, self.rejected)]
        width = max(side["input_ids"].shape[1] for side in sides)

        def joined(key: str, fill: int) -> torch.Tensor:
            return torch.cat([torch.nn.functional.pad(s[key], (0, width - s[key].shape[1]), value=fill) for s in sides])

        return {
            "input_ids": joined("input_ids", pad_id),
            "attention_mask": joined("attention_mask", 0),
            "completion_mask": (joined("labels", IGNORED) != IGNORED).long(),
        }


def read(spec: TrainSpec, template: Template, part: Part) -> ReadPart:
    """The pairs of which both conversations fit. Raises DataError, StorageError."""
    uri, limit = (spec.data.train, spec.data.train_rows) if part == "train" else (spec.data.eval, spec.data.eval_rows)
    assert uri is not None, "asked for a part that the spec has"
    prompt, shots = read_prompt(spec, part)
    keys, contents = KeyCheck(PAIR, more=PREFERENCE_LOSS), array("q")
    chosen: list[Scored] = []
    rejected: list[Scored] = []
    dropped, raw = 0, hashlib.sha256()
    for number, row_id, messages, answers in _pairs(uri, limit, keys):
        contents.append(hash((messages, answers)))
        raw.update(canonical_json([row_id, [[m.role, m.content] for m in messages], answers]).encode() + b"\n")
        better, worse = (answered(messages, answer, template, prompt) for answer in answers)
        longest = max(len(better[0]), len(worse[0]))
        if longest <= spec.max_length:
            chosen.append(better)
            rejected.append(worse)
            continue
        dropped += 1
        if spec.on_overlong == "refuse":
            raise too_long(spec, part, number, row_id, longest)
    if not chosen:
        raise nothing_left(spec, part, dropped)
    rows = PairRows(TokenRows.from_pairs(chosen), TokenRows.from_pairs(rejected))
    warnings = (*keys.note(f"data.{part}"), *shots)
    return ReadPart(rows, dropped, raw.hexdigest(), warnings=warnings, contents=contents)


def answered(messages: Sequence[Message], answer: str, template: Template, prompt: Prompt) -> Scored:
    """A conversation up to the token that ends the answer, and which of its ids are the answer's."""
    asked = chat.render(messages, template, prompt=prompt, generate=True)
    whole = chat.render([*messages, Message("assistant", answer)], template, prompt=prompt, generate=False)
    start = len(asked.ids)
    assert whole.ids[:start] == asked.ids, "a prompt is a prefix of what it grows into (chat.render)"
    end = start + whole.loss_mask[start:].index(False) if False in whole.loss_mask[start:] else len(whole.ids)
    return whole.ids[:end], (False,) * start + (True,) * (end - start)


def _pairs(
    uri: str, limit: int | None, keys: KeyCheck
) -> Iterator[tuple[int, str, tuple[Message, ...], tuple[str, str]]]:
    """(row number, id, conversation, (chosen, rejected)), each checked."""
    count = 0
    for number, record in records.read_records(uri):
        if count == limit:
            return
        where = f"{uri} row {number}"
        keys.check(record, where)
        answers = data.answer_of(record, "chosen", where), data.answer_of(record, "rejected", where)
        if answers[0] == answers[1]:
            raise DataError(f"{where}: chosen", f"it is the same text as rejected ({_short(answers[0])})",
                            "a preference is between two answers", "take the row out, or mend one of them")  # fmt: skip
        yield number, str(record.get("id", number)), data.prompt_of(record, where), answers
        count += 1
    if not count:
        raise DataError(uri, "it has no rows", "a dataset has at least one row", "check the path")


def _short(text: Any) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
