"""Who teaches: a base or a published adapter, compared with the student and pinned before anything starts."""

import hashlib
from dataclasses import dataclass
from datetime import date

from graftwork import artifact, base_model, base_source
from graftwork.base_model import BaseSpec, QuantSpec
from graftwork.chat import Template
from graftwork.config import canonical_json
from graftwork.errors import ArtifactError, BaseModelError
from graftwork.storage import Store
from graftwork.training.objective_spec import TeacherSpec
from graftwork.training.spec import TrainSpec


@dataclass(frozen=True)
class Teacher:
    """A teacher that no later publication changes."""

    base: BaseSpec
    base_digest: str
    quant: QuantSpec
    adapter: str | None
    """`task@version`."""
    template_date: date | None = None
    """The day that its chat template writes as today's, where it writes one."""

    def digest(self) -> str:
        """sha256 hex over what decides its distributions."""
        what = [self.base_digest, self.quant.model_dump(mode="json", exclude={"resident"}), self.adapter]
        what += [self.template_date.isoformat()] if self.template_date else []
        return hashlib.sha256(canonical_json(what).encode()).hexdigest()


def pinned(spec: TrainSpec, asked: TeacherSpec) -> Teacher:
    """The teacher by digest and version. Raises ArtifactError, BaseModelError: missing, or no teacher."""
    base = asked.base or spec.base
    resolved = base_model.resolve(base)
    adapter, changes = None, {"uri": base_source.absolute(base.uri)}
    if asked.adapter is not None:
        manifest = artifact.resolve(Store(spec.root), asked.adapter)
        artifact.require_base(manifest, resolved.digest)
        if manifest.method.get("objective") == "reward":
            raise ArtifactError(f"objective.teacher.adapter={asked.adapter}", "it is a reward model",
                                "a teacher writes tokens", "name another adapter")  # fmt: skip
        adapter = manifest.ref
        if manifest.template_date is not None:
            changes["template_date"] = manifest.template_date.isoformat()
    placed = base.with_(changes)
    day = base_model.template(base_model.resolve(placed)).date
    return Teacher(placed, resolved.digest, asked.quant or spec.quant, adapter, day)


def require_vocabulary(spec: TrainSpec, teacher: Teacher, template: Template) -> None:
    """Raise BaseModelError unless student and teacher have one vocabulary."""
    theirs, own = base_model.resolve(teacher.base), base_model.resolve(spec.base)
    sizes = [int(one.config.get("vocab_size", 0)) for one in (theirs, own)]
    if base_model.template(theirs).tokenizer_digest == template.tokenizer_digest and sizes[0] == sizes[1]:
        return
    raise BaseModelError(
        f"objective.teacher.base={teacher.base.uri}",
        f"its vocabulary ({sizes[0]} tokens) is not that of base={spec.base.uri} ({sizes[1]} tokens)",
        "distributions are compared token by token, so teacher and student have one tokenizer",
        "take a teacher of the student's family, or let it write answers and learn those (objective.generate)",
    )
