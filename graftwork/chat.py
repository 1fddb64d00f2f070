"""The one prompt builder: training, serving, retrieval and evaluation all render a conversation here.

A conversation becomes token ids by the base's own chat template (jinja) and tokenizer (`tokenizer.json`). Text that
comes from people or passages can never become a control token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from graftwork.config import Spec

Role = Literal["system", "user", "assistant"]


class PromptSpec(Spec):
    """What stands around the question: a system prompt and worked examples."""

    system: str | None = None
    """System turn; null leaves what the base's template does without one (SmolLM2 adds its own)."""
    shots: int = Field(0, ge=0, le=64)
    """Worked examples shown before the question: the first rows of `shots_from`."""
    shots_from: str | None = None
    """JSONL of training rows: a path, `file://`, `s3://` or `recipe://NAME/train.jsonl`."""
    context_header: str = "Context:"
    """Line above the retrieved passages in the last user turn."""

    @model_validator(mode="after")
    def _takes_effect(self) -> Self:
        if self.shots and self.shots_from is None:
            raise ValueError(f"shots={self.shots} needs shots_from, the rows that they are taken from")
        if self.shots_from is not None and not self.shots:
            raise ValueError("shots_from is set but shots is 0, so it cannot take effect")
        return self


@dataclass(frozen=True, slots=True)
class Message:
    """One turn."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Passage:
    """One retrievable text of a corpus."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """A resolved `PromptSpec` (see `graftwork.data.resolve_prompt`): the worked examples are read."""

    system: str | None = None
    shots: tuple[tuple[Message, Message], ...] = ()
    context_header: str = "Context:"


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as the model sees it. `loss_mask` is as long as `ids`, all False in a prompt."""

    ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    stop_ids: frozenset[int]
    text: str


class Template:
    """Chat template and tokenizer of one base. Thread-safe; cheap to share, about 0.3 s to load."""

    digest: str
    """sha256 of the template text."""
    tokenizer_digest: str
    """sha256 of tokenizer.json."""
    stop_ids: frozenset[int]
    """Tokens that end an answer."""
    pad_id: int
    vocab_size: int
    """Tokenizer ids lie in [0, vocab_size)."""
    has_prefix_property: bool
    """Each prompt is a text prefix of the conversation it grows into. If not, train one turn a row."""

    @classmethod
    def load(cls, folder: Path) -> "Template":
        """From a folder with tokenizer.json and a chat template. Raises BaseModelError."""
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: no special token can come out."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ids."""
        raise NotImplementedError


def render(
    messages: Sequence[Message],
    template: Template,
    *,
    prompt: Prompt = Prompt(),  # noqa: B008 frozen
    context: Sequence[Passage] = (),
    generate: bool,
) -> Rendered:
    """The conversation as ids: a prompt that asks for an answer (`generate`), or a row to train on."""
    raise NotImplementedError


def training_rows(messages: Sequence[Message], template: Template) -> list[tuple[Message, ...]]:
    """The conversation itself, or one row a turn where the template lacks the prefix property."""
    return [tuple(messages)] if template.has_prefix_property else one_turn_rows(messages)


def one_turn_rows(messages: Sequence[Message]) -> list[tuple[Message, ...]]:
    """One row per assistant turn, each ending with it."""
    raise NotImplementedError
