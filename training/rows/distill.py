"""Conversations on which a student is held against its teacher; the teacher found, compared and pinned."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from graftwork import artifact, base_model, base_source
from graftwork.base_model import BaseSpec, QuantSpec
from graftwork.chat import Template
from graftwork.config import canonical_json
from graftwork.errors import ArtifactError, BaseModelError
from graftwork.storage import Store
from graftwork.training.objective_spec import DistillSpec, SftSpec, TeacherSpec
from graftwork.training.rows import sft
from graftwork.training.rows.part import Part, ReadPart
from graftwork.training.rows.token_rows import Rows
from graftwork.training.spec import TrainSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Teacher:
    """A teacher that no later publication changes."""

    base: BaseSpec
    base_digest: str
    quant: QuantSpec
    adapter: str | None
    """`task@version`."""

    def digest(self) -> str:
        """sha256 hex over what decides its distributions."""
        what = [self.base_digest, self.quant.model_dump(mode="json", exclude={"resident"}), self.adapter]
        return hashlib.sha256(canonical_json(what).encode()).hexdigest()


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

    def digest(self) -> str:
        """sha256 hex over rows and teacher."""
        return hashlib.sha256((self.rows.digest() + self.teacher.digest()).encode()).hexdigest()

    def collate(self, indices: Sequence[int], pad_id: int) -> "dict[str, torch.Tensor]":
        """As SFT's rows."""
        return self.rows.collate(indices, pad_id)


def read(spec: TrainSpec, template: Template, part: Part) -> ReadPart:
    """The rows that fit. Raises DataError, StorageError; ArtifactError and BaseModelError of the teacher."""
    assert isinstance(spec.objective, DistillSpec), "registered for this kind"
    teacher = pinned(spec, spec.objective.teacher, template)
    found = sft.read(spec.model_copy(update={"objective": SftSpec()}), template, part)
    return ReadPart(TaughtRows(found.rows, teacher), found.dropped, found.fingerprint, found.notes)


def pinned(spec: TrainSpec, asked: TeacherSpec, template: Template) -> Teacher:
    """The teacher by digest and version. Raises ArtifactError, BaseModelError: missing, or of another vocabulary."""
    base = asked.base or spec.base
    resolved = base_model.resolve(base)
    own = base_model.resolve(spec.base)
    others = base_model.template(resolved)
    sizes = [int(one.config.get("vocab_size", 0)) for one in (resolved, own)]
    if others.tokenizer_digest != template.tokenizer_digest or sizes[0] != sizes[1]:
        raise BaseModelError(
            f"objective.teacher.base={base.uri}",
            f"its vocabulary ({sizes[0]} tokens) is not that of base={spec.base.uri} ({sizes[1]} tokens)",
            "distributions are compared token by token, so teacher and student have one tokenizer",
            "take a teacher of the student's family, or let it write answers and learn those (objective.generate)",
        )
    adapter = None
    if asked.adapter is not None:
        manifest = artifact.resolve(Store(spec.root), asked.adapter)
        artifact.require_base(manifest, resolved.digest)
        if manifest.method.get("objective") == "reward":
            raise ArtifactError(f"objective.teacher.adapter={asked.adapter}", "it is a reward model",
                                "a teacher writes tokens", "name another adapter")  # fmt: skip
        adapter = manifest.ref
    placed = base.with_({"uri": base_source.absolute(base.uri)})
    return Teacher(placed, resolved.digest, asked.quant or spec.quant, adapter)
