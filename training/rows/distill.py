"""Conversations to distil on: with the teacher whose distributions are learned, or with the answers that it wrote."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from graftwork.chat import Template
from graftwork.training.objective_spec import DistillSpec, SftSpec
from graftwork.training.rows import sft
from graftwork.training.rows.part import Part, ReadPart
from graftwork.training.rows.token_rows import Rows
from graftwork.training.spec import TrainSpec
from graftwork.training.teaching.teacher import Teacher, pinned, require_vocabulary
from graftwork.training.teaching.written import load_or_generate

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TaughtRows:
    """Rows of SFT's form, and who teaches on them."""

    rows: Rows
    teacher: Teacher

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
        """A row is one sequence."""
        return self.rows.widths_N

    def digest(self) -> str:
        """sha256 hex over rows and teacher."""
        return hashlib.sha256((self.rows.digest() + self.teacher.digest()).encode()).hexdigest()

    def collate(self, indices: Sequence[int], pad_id: int) -> "dict[str, torch.Tensor]":
        """As SFT's rows."""
        return self.rows.collate(indices, pad_id)


def read(spec: TrainSpec, template: Template, part: Part) -> ReadPart:
    """The rows that fit. Raises DataError, StorageError; ArtifactError and BaseModelError of the teacher.

    Of training rows the teacher writes the answers first, where the spec says so; held-out rows keep their own.
    """
    objective = spec.objective
    assert isinstance(objective, DistillSpec), "registered for this kind"
    as_sft = spec.model_copy(update={"objective": SftSpec()})
    if objective.generate is not None:
        if part == "eval":
            return sft.read(as_sft, template, part)
        texts = load_or_generate(spec, objective.generate)
        found = sft.read(as_sft.with_({"data.train": texts.uri, "data.train_rows": None}), template, part)
        notes, warnings = (*texts.notes, *found.notes), (*texts.warnings, *found.warnings)
        return replace(found, notes=notes, warnings=warnings, contents=texts.contents)
    assert objective.teacher is not None, "one of the two is given"
    teacher = pinned(spec, objective.teacher)
    require_vocabulary(spec, teacher, template)
    found = sft.read(as_sft, template, part)
    return replace(found, rows=TaughtRows(found.rows, teacher))
