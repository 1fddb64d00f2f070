"""What the engine asks of a grammar; who compiles it, and from what, is not the engine's business."""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy
import numpy.typing

from graftwork.errors import DataError

MaskWords = numpy.typing.NDArray[numpy.int32]
"""[ceil(V / 32)], bit n of word w for token 32 * w + n."""


@dataclass(frozen=True)
class GrammarText:
    """A grammar as people write it: a JSON schema (as JSON) or a regular expression that the whole answer matches."""

    kind: Literal["json_schema", "regex"]
    text: str


class GrammarError(DataError):
    """A grammar that cannot be enforced: not valid, no answer can have it, or a part of it is not known."""


class Matcher(Protocol):
    """The state of one answer in its grammar. The engine's thread alone uses it; nothing of it raises."""

    @property
    def problem(self) -> str | None:
        """Why the grammar cannot go on (it became too complex); the answer then ends with an error."""

    @property
    def finished(self) -> bool:
        """The answer is whole, and no token may follow."""

    def fill(self, words_W: MaskWords) -> None:
        """Sets the bits of the tokens that may come next; stop ids are among them where the answer is whole."""

    def take(self, token_id: int) -> None:
        """The answer goes on with this token."""


class Grammar(Protocol):
    """A compiled grammar, shared by all requests that ask for the same one."""

    @property
    def text(self) -> GrammarText:
        """What it was compiled from."""

    def matcher(self) -> Matcher:
        """A new answer's state; cheap."""
