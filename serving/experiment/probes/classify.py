"""The rule: what the probes of one failed answer found -> why it failed. Pure, and all there is to it.

| value | context | the probes say | cause |
|---|---|---|---|
| right | any | form or style is wrong | form |
| wrong | gold passage was in it | right with the gold passage alone, or known without any context | distraction |
| wrong | gold passage was in it | wrong with the gold passage alone as well | use of context |
| wrong | none, or without gold | the same question was right before the adapter | forgetting |
| wrong | none | right with the gold passage | information |
| wrong | without gold | right with the gold passage | retrieval |
| wrong | without gold | wrong even with the gold passage, known without context | distraction |
| wrong | none, or without gold | wrong even with the gold passage | use of context |

A wrong value in a wrong form has two causes, the value's and form. What cannot be probed (no gold passage known) is
`unknown`, never guessed.
"""

from dataclasses import dataclass
from typing import Literal, get_args

Cause = Literal["retrieval", "information", "form", "use_of_context", "distraction", "forgetting", "unknown"]
CAUSES: tuple[Cause, ...] = get_args(Cause)


@dataclass(frozen=True)
class ProbeEvidence:
    """Of one failed answer. None: not probed, or the probe failed."""

    form_right: bool | None
    """None: no scorer tells it from the value."""
    value_right: bool
    """Every fact asked for is in the answer, whatever its form."""
    retrieves: bool
    """The arm has a retriever."""
    gold_retrieved: bool | None = None
    """The gold passage was among those in the prompt."""
    oracle_right: bool | None = None
    """The value is right when the gold passage is the only context."""
    grammar_right: bool | None = None
    """Wholly right once repaired, or under the answer's grammar (with the gold passage where the value was wrong)."""
    closed_book: bool | None = None
    """Without context the gold answer is likelier than every distractor."""
    right_before: bool | None = None
    """The base without the adapter had the value right."""


def classify(found: ProbeEvidence) -> tuple[Cause, ...]:
    """The value's cause, if it is wrong, and `form`, if it is what else is wrong."""
    value = () if found.value_right else (_why_wrong(found),)
    return (*value, "form") if found.value_right or found.form_right is False else value


def _why_wrong(found: ProbeEvidence) -> Cause:
    if found.retrieves and found.gold_retrieved:
        return "distraction" if found.oracle_right or found.closed_book else "use_of_context"
    if found.right_before:
        return "forgetting"
    if found.oracle_right:
        return "retrieval" if found.retrieves else "information"
    if found.retrieves and found.closed_book:
        return "distraction"
    return "unknown" if found.oracle_right is None else "use_of_context"
