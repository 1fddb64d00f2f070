"""What is measured of a run before and after. No part of the run's identity: a finished run can add it later."""

from typing import Annotated, Literal

from pydantic import Field

from graftwork.config import Spec

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
