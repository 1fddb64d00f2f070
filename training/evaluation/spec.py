"""Outcomes in a spec, and the items that workers answer: records of token ids."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from graftwork.config import Spec
from graftwork.planning.memory import BATCH_ROWS, BATCH_TOKENS, TokenWork


@dataclass(frozen=True)
class Item:
    """One question: continuations are weighed, or an answer is written, or both."""

    id: str
    prompt: tuple[int, ...]
    """At least one token."""
    continuations: tuple[tuple[int, ...], ...] = ()
    write: int = 0
    """Most tokens to be written; 0: none."""

    @property
    def tokens(self) -> int:
        """Cost, roughly: tokens that are computed."""
        return sum(len(self.prompt) + len(one) for one in self.continuations) + 8 * self.write


@dataclass(frozen=True)
class ItemGroup:
    """Questions of one kind. Picklable."""

    name: str
    items: tuple[Item, ...]
    stop_ids: tuple[int, ...]
    pad_id: int

    def digest(self) -> str:
        """sha256 hex over what is asked: equal digests, equal questions in equal tokens."""
        asked = [(item.id, item.prompt, item.continuations, item.write) for item in self.items]
        return hashlib.sha256(repr((self.name, asked, sorted(self.stop_ids))).encode()).hexdigest()


@dataclass(frozen=True)
class ItemOutput:
    """A model's output for one item."""

    logprobs: tuple[float, ...] = ()
    """Of each continuation: summed over its tokens, in nats."""
    text: str = ""
    """Written greedily, special tokens left out."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "ItemOutput":
        """From what `as_dict` gave, through JSON."""
        return cls(tuple(record["logprobs"]), record["text"])


def work_of(parts: Sequence[ItemGroup]) -> TokenWork:
    """The work of measuring these parts once."""
    items = [item for part in parts for item in part.items]
    weighed = [(len(item.prompt) + len(one), len(one)) for item in items for one in item.continuations]
    asked = [(len(item.prompt), item.write) for item in items if item.write]
    steps = sum(write / min(BATCH_ROWS, max(1, BATCH_TOKENS // (prompt + write))) for prompt, write in asked)
    return TokenWork(
        sum(all_ for all_, _ in weighed),
        sum(one for _, one in weighed),
        sum(prompt for prompt, _ in asked),
        sum(write for _, write in asked),
        steps,
    )


def shares(items: Sequence[Item], rank: int, world: int) -> list[int]:
    """Places of the items that a rank takes: dealt by cost, so that all are ready at about the same time."""
    return sorted(range(len(items)), key=lambda at: -items[at].tokens)[rank::world]


Rows = Annotated[int, Field(ge=2)]


class RetentionSpec(Spec):
    """What the base could do that the task does not teach; {} takes the suite that comes along."""

    text: str | None = "recipe://element-prose/text.jsonl"
    """Held-out prose, `gold.choices[0]` a row: nats a token of the text alone, without a chat template. null: none."""
    text_rows: Rows = 60
    choices: str | None = "recipe://country-facts/eval.jsonl"
    """Multiple choice (`gold.choices`, `gold.right`), chosen by the likelihood of each choice as the answer."""
    choice_rows: Rows = 90
    instructions: bool = True
    """Prompts whose answers are checked by rule, such as "answer in exactly three words"."""
    max_new_tokens: int = Field(default=48, ge=8)
    """Longest answer to an instruction."""


class FairnessSpec(Spec):
    """Who did it? Choices weighed where the text tells and where it does not; {} takes BBQ's gender questions."""

    eval: str = "recipe://bbq-gender/eval.jsonl"
    """JSONL with `gold.choices`, `gold.right`, `gold.signs` (1 as a stereotype has it, -1 against it, 0 neither)."""
    by: str | None = "condition"
    """The field that parts the questions."""
    rows: Rows = 120
    """Questions of each part, the first so many."""
    pairs: bool = True
    """Also sentences that differ in one name alone, a woman's or a man's, of one ethnicity or another."""
    system: str | None = "Answer with one of the options."


class TaskSpec(Spec):
    """The task itself: greedy answers to the rows of `data.eval`, and the likelihood of the right ones."""

    metric: Literal["auto", "exact", "form", "facts", "both", "field_accuracy"] = "auto"
    """auto: `both` where rows have a gold object, else `exact` (the row's answer, outer spaces aside)."""
    rows: Rows = 32
    """The first so many of data.eval."""
    answer_schema: str | None = None
    """JSON schema of the form; null: any JSON object has it."""
    max_new_tokens: int = Field(default=96, ge=1)


class OutcomesSpec(Spec):
    """Each part is measured where it is given ({} for its defaults)."""

    task: TaskSpec | None = None
    retention: RetentionSpec | None = None
    fairness: FairnessSpec | None = None
    alpha: float = Field(default=0.05, gt=0, lt=1)
    """Intervals are at 1 - alpha; verdicts at alpha over all metrics together (Holm)."""
