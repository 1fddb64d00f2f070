"""Contract of an objective: the methods of its spec class, the facts that loop and plan read, shared checks and errors.

An objective is one file with such a class, and one entry in the union of `objectives/spec.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from graftwork.errors import DataError

if TYPE_CHECKING:
    import torch

    from graftwork.base.source import BaseSpec
    from graftwork.prompts.template import Template
    from graftwork.quantization import QuantSpec
    from graftwork.training.objectives.rows import ReadPart
    from graftwork.training.objectives.trainer import BuiltTrainer, TrainerContext
    from graftwork.training.spec import TrainSpec

Part = Literal["train", "eval"]
"""A dataset of a run."""
Packing = Literal["none", "best_fit"]
"""none: a row a document. best_fit: several whole documents a row of up to `max_length`; none sees another."""


@dataclass(frozen=True)
class SecondModel:
    """A frozen model that a worker loads next to the trained one; null is the run's own base or quantisation."""

    base: BaseSpec | None
    quant: QuantSpec | None


@dataclass(frozen=True)
class Traits:
    """Facts of an objective. A pass is one forward pass of one worker."""

    sequences: int = 1
    """Sequences that a pass computes for each row."""
    head: Literal["logits", "fused", "fused_trained", "reward"] = "logits"
    """Output head on a CPU. logits: whole logits of the trained positions. fused: tiles of logits at every position.
    fused_trained: tiles at the trained positions. reward: one number a sequence."""
    packing: Packing = "none"
    samples_answers: bool = False
    """Answers are sampled from the trained model during training, with a KV cache."""
    steps_per_batch: int = 1
    """Optimizer steps that learn from the same rows."""
    scored_per_step: int = 0
    """Forward passes without gradients over as many rows as a step has, in each step."""
    scored_before: int = 0
    """Forward passes without gradients over all rows, once before the first step: likelihoods of a reference."""
    second_model: SecondModel | None = None
    conversations: bool = True
    """A row is a conversation; the finished model's answers to held-out rows can be generated and scored."""
    reward_head: bool = False
    """The model has a reward head in place of its language head."""
    adds_up: bool = True
    """Nothing but the adapter's weights is trained, so that the sum with another adapter is the whole result."""


class Rows(Protocol):
    """Interface of a set of rows, where a row is a conversation, a pack, a pair or a prompt. Picklable."""

    def __len__(self) -> int: ...

    @property
    def lengths_N(self) -> NDArray[np.int64]:
        """Tokens that the model computes for each row: what steps are balanced by."""

    @property
    def scored_N(self) -> NDArray[np.int64]:
        """Positions of each row whose logits are computed."""

    @property
    def widths_N(self) -> NDArray[np.int64]:
        """Tokens of each row's longest sequence, which the others of a batch are padded to."""

    def digest(self) -> str:
        """sha256 hex over what the model sees."""

    def collate(self, indices: Sequence[int], pad_id: int) -> dict[str, torch.Tensor]:
        """A batch of these rows, in the form that the kind's trainer takes. In a worker."""


@dataclass(frozen=True)
class WrappedRows:
    """Rows that add something to others, as which they are batched."""

    rows: Rows

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths_N(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        return self.rows.lengths_N

    @property
    def scored_N(self) -> NDArray[np.int64]:
        """Trained tokens of each row."""
        return self.rows.scored_N

    @property
    def widths_N(self) -> NDArray[np.int64]:
        """Tokens of each row's longest sequence."""
        return self.rows.widths_N

    def digest(self) -> str:
        """sha256 hex over the rows."""
        return self.rows.digest()

    def collate(self, indices: Sequence[int], pad_id: int) -> dict[str, torch.Tensor]:
        """A batch of the rows."""
        return self.rows.collate(indices, pad_id)


class Objective(Protocol):
    """Methods of an objective's spec class. Importing its file loads neither torch nor TRL: the methods do."""

    @property
    def kind(self) -> str:
        """Name of the objective in a spec."""

    @property
    def traits(self) -> Traits:
        """Facts that the loop and the plan read."""

    def check(self, run: TrainSpec) -> None:
        """Raise ValueError for keys of the run that cannot be combined with this objective, or have no effect."""

    def read(self, spec: TrainSpec, template: Template, part: Part) -> ReadPart:
        """Render one dataset of the run. Runs in the driver. Raises DataError, StorageError."""

    def build(self, setting: TrainerContext) -> BuiltTrainer:
        """Build a trainer that takes the plan's steps in order. Runs in a worker."""


def check_generates(run: TrainSpec, key: str) -> None:
    """Raise ValueError where a worker that generates answers lacks weights. key: the key that requires answers."""
    if run.strategy.kind in ("zero3", "fsdp2"):
        raise ValueError(
            f"{key} can't go with strategy.kind={run.strategy.kind}: each worker generates answers by itself, which "
            "needs all weights. Leave it out, or set strategy.kind=zero2"
        )


def check_no_zero3(run: TrainSpec, kind: str) -> None:
    """Raise ValueError for ZeRO-3 with an objective that needs a second model, a head or a reference."""
    if run.strategy.kind == "zero3":
        raise ValueError(
            f"strategy.kind=zero3 can't go with objective.kind={kind}: a second model, a head or a reference is needed "
            "while the weights are in pieces. Set strategy.kind=fsdp2 or zero2"
        )


def check_pairs(run: TrainSpec, kind: str) -> None:
    """Raise ValueError for keys that cannot be combined with pairs of answers, or have no effect on them."""
    check_no_zero3(run, kind)
    if run.data.context is not None:
        raise ValueError(
            f"data.context can't take effect with objective.kind={kind}: put the passages into the rows' prompts"
        )
    if run.adapter.input_dropout:
        raise ValueError(
            f"adapter.dropout={run.adapter.input_dropout:g} can't take effect with objective.kind={kind}: answers are "
            "compared by the same weights, so TRL switches dropout off"
        )


def too_long(spec: TrainSpec, part: Part, number: int, row_id: str, tokens: int) -> DataError:
    """The error of a row that `on_overlong: refuse` does not let in."""
    return DataError(
        f"data.{part}={getattr(spec.data, part)}, row {number} (id {row_id})",
        f"{tokens} tokens",
        f"on_overlong=refuse allows at most max_length={spec.max_length}",
        f"set max_length={tokens}, shorten the row, or set on_overlong=drop",
    )


def nothing_left(spec: TrainSpec, part: Part, dropped: int) -> DataError:
    """The error of a set whose rows are all too long."""
    return DataError(
        f"data.{part}={getattr(spec.data, part)}",
        f"all {dropped} rows are longer than max_length={spec.max_length} tokens",
        "at least one row must fit",
        "raise max_length or shorten the rows",
    )


def passages_left_out(spec: TrainSpec, count: int) -> tuple[str, ...]:
    """The note on retrieved passages that had no room."""
    assert spec.data.context is not None, "passages are of a context"
    return (f"{count} passages left out (no room in data.context.context_tokens={spec.data.context.context_tokens})",)
