"""Keys of what is learned from plain text: packing, continued pretraining, infilling. And what does not go together."""

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from graftwork.config import Spec

if TYPE_CHECKING:
    from graftwork.training.spec import TrainSpec

Packing = Literal["none", "best_fit"]
"""none: a row a document. best_fit: several whole documents a row of up to `max_length`; none sees another."""


class AnswersSpec(Spec):
    """Held-out answers are generated too, greedily, and counted where they are the row's answer to the letter."""

    by: tuple[str, ...] = ()
    """Fields of the rows that part them into groups, each with a share of its own: `[length, depth]`."""
    max_new_tokens: int = Field(default=32, ge=1)
    """Most tokens generated for an answer."""


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
    def _three(self) -> Self:
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


def check_text(spec: "TrainSpec") -> None:
    """Raises ValueError for keys that can't go together or can't take effect."""
    objective = spec.objective
    packing = getattr(objective, "packing", "none")
    if packing != "none" and spec.adapter.virtual_tokens:
        raise ValueError(
            f"objective.packing={packing} can't go with adapter.kind={spec.adapter.kind}: it would stand before the "
            "first document of a row alone. Set objective.packing=none"
        )
    answers = getattr(objective, "answers", None)
    if answers is not None and spec.data.eval is None:
        raise ValueError("objective.answers is set but data.eval is not given, so it cannot take effect")
    generates = answers is not None or (objective.kind == "fim" and spec.data.eval is not None)
    if generates and spec.strategy.kind in ("zero3", "fsdp2"):
        what = "objective.answers" if answers is not None else "data.eval with objective.kind=fim"
        raise ValueError(
            f"{what} can't go with strategy.kind={spec.strategy.kind}: each worker generates answers by itself, which "
            "needs all weights. Leave it out, or set strategy.kind=zero2"
        )
    if objective.kind not in ("cpt", "fim"):
        return
    for key, given in (("prompt", "prompt" in spec.model_fields_set), ("data.context", spec.data.context is not None)):
        if given:
            raise ValueError(f"{key} can't take effect with objective.kind={objective.kind}: its rows are plain text")
    if objective.kind == "cpt" and "on_overlong" in spec.model_fields_set:
        raise ValueError(
            "on_overlong can't take effect with objective.kind=cpt: a longer document is split, not dropped"
        )
