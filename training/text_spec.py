"""Keys of what is learned from plain text: packing, continued pretraining, infilling. And what does not go together."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from graftwork.config import Spec

if TYPE_CHECKING:
    from graftwork.training.spec import TrainSpec

Packing = Literal["none", "best_fit"]
"""none: a row a document. best_fit: several whole documents a row of up to `max_length`; none sees another."""


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


def check_text(spec: "TrainSpec") -> None:
    """Raises ValueError for keys that can't go together or can't take effect."""
    objective = spec.objective
    packing = getattr(objective, "packing", "none")
    if packing != "none" and spec.adapter.kind == "prefix":
        raise ValueError(
            f"objective.packing={packing} can't go with adapter.kind=prefix: the prefix would stand before the first "
            "document of a row alone. Set objective.packing=none"
        )
    if objective.kind not in ("cpt", "fim"):
        return
    for key, given in (("prompt", "prompt" in spec.model_fields_set), ("data.context", spec.data.context is not None)):
        if given:
            raise ValueError(f"{key} can't take effect with objective.kind={objective.kind}: its rows are plain text")
    if objective.kind == "cpt" and "too_long" in spec.model_fields_set:
        raise ValueError("too_long can't take effect with objective.kind=cpt: a longer document is split, not dropped")
