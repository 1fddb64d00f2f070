"""Rows of the datasets as token ids and loss masks: rendered once in the driver, shared by workers and trials."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from graftwork import base_model, chat, data, retrieval
from graftwork.errors import DataError
from graftwork.training.spec import TrainSpec


@dataclass(frozen=True)
class TokenRows:
    """Rows laid end to end. N rows, T tokens over all; row i is `[offsets_N1[i], offsets_N1[i + 1])`."""

    ids_T: NDArray[np.int32]
    trained_T: NDArray[np.bool_]
    """True where the token is a target of the loss."""
    offsets_N1: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets_N1) - 1

    @property
    def lengths_N(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        return np.diff(self.offsets_N1)

    def row(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Ids and mask of one row."""
        start, end = self.offsets_N1[index], self.offsets_N1[index + 1]
        return self.ids_T[start:end], self.trained_T[start:end]

    def digest(self) -> str:
        """sha256 hex over ids, masks and row borders."""
        parts = (self.ids_T, self.trained_T, self.offsets_N1)
        return hashlib.sha256(b"".join(hashlib.sha256(part.tobytes()).digest() for part in parts)).hexdigest()

    @classmethod
    def of(cls, rows: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> "TokenRows":
        """From (ids, mask) pairs."""
        return cls(
            np.array([token for ids, _ in rows for token in ids], dtype=np.int32),
            np.array([trained for _, mask in rows for trained in mask], dtype=np.bool_),
            np.cumsum([0, *(len(ids) for ids, _ in rows)], dtype=np.int64),
        )


@dataclass(frozen=True)
class PreparedData:
    """All that the loop needs of the datasets, and what was left out."""

    train: TokenRows
    eval: TokenRows | None
    dropped: int
    """Training rows longer than `max_length`."""
    dropped_eval: int
    pad_id: int
    fingerprint: str
    """Digest of the raw training rows, as the adapter's manifest records it."""
    one_turn: bool
    """The template lacks the prefix property, so each assistant turn became a row of its own."""
    left_out: int = 0
    """Passages of training rows that did not fit `data.context.context_tokens`."""

    def digest(self) -> str:
        """sha256 hex over what the model sees: data, template, prompt and retrieved context at once."""
        seen = self.train.digest() + (self.eval.digest() if self.eval else "")
        return hashlib.sha256(seen.encode()).hexdigest()


def prepare(spec: TrainSpec) -> PreparedData:
    """Read, render and check the rows of a spec. Runs in the driver, before any worker starts.

    Raises DataError (a bad row, an empty set, a row too long under `too_long: refuse`, nothing left to train on),
    BaseModelError, StorageError.
    """
    template = base_model.template(base_model.resolve(spec.base))
    raw = data.read_rows(spec.data.train, limit=spec.data.train_rows, need="train")
    train, dropped, left_out = _tokenise(spec, template, raw, "train")
    held_out, dropped_eval = None, 0
    if spec.data.eval is not None:
        rows = data.read_rows(spec.data.eval, limit=spec.data.eval_rows, need="train")
        held_out, dropped_eval, _ = _tokenise(spec, template, rows, "eval")
    return PreparedData(
        train=train,
        eval=held_out,
        dropped=dropped,
        dropped_eval=dropped_eval,
        pad_id=template.pad_id,
        fingerprint=data.fingerprint(raw),
        one_turn=not template.has_prefix_property,
        left_out=left_out,
    )


def _tokenise(
    spec: TrainSpec, template: chat.Template, rows: Sequence[data.Row], part: Literal["train", "eval"]
) -> tuple[TokenRows, int, int]:
    """Rendered rows that fit, how many did not, and how many passages had no room."""
    prompt = data.resolve_prompt(spec.prompt)
    contexts: list[tuple[chat.Passage, ...]] = [()] * len(rows)
    room, left_out = None, 0
    if spec.data.context is not None:
        contexts = retrieval.training_contexts(rows, spec.data.context, spec.seed if part == "train" else spec.seed + 1)
        room = spec.data.context.context_tokens
    fitting: list[tuple[Sequence[int], Sequence[bool]]] = []
    dropped = 0
    for number, (row, context) in enumerate(zip(rows, contexts, strict=True), start=1):
        context, without = chat.fitting(context, template, prompt, room)
        left_out += len(without)
        for messages in chat.training_rows(row.messages, template):
            rendered = chat.render(messages, template, prompt=prompt, context=context, generate=False)
            if len(rendered.ids) <= spec.max_length:
                fitting.append((rendered.ids, rendered.loss_mask))
                continue
            dropped += 1
            if spec.too_long == "refuse":
                raise _too_long(spec, part, number, row.id, len(rendered.ids))
    if not fitting:
        raise DataError(
            f"data.{part}={getattr(spec.data, part)}",
            f"all {dropped} rows are longer than max_length={spec.max_length} tokens",
            "at least one row must fit",
            "raise max_length or shorten the rows",
        )
    return TokenRows.of(fitting), dropped, left_out


def _too_long(spec: TrainSpec, part: str, number: int, row_id: str, tokens: int) -> DataError:
    return DataError(
        f"data.{part}={getattr(spec.data, part)}, row {number} (id {row_id})",
        f"{tokens} tokens",
        f"too_long=refuse allows at most max_length={spec.max_length}",
        f"set max_length={tokens}, shorten the row, or set too_long=drop",
    )
