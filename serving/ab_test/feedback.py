"""Feedback of an experiment as rows for `objective.kind: kto`: rated answers of its log, good or bad.

The log is read twice: once for the scores, once for the answers that have one. Texts of one segment are in memory.
"""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from graftwork.config import canonical_json
from graftwork.errors import ConfigError, DataError
from graftwork.prompts.render import Message
from graftwork.serving.ab_test.log import LogRow
from graftwork.serving.ab_test.log_reader import ExperimentLog
from graftwork.serving.ab_test.spec import ExperimentSpec
from graftwork.serving.messages import Question

SHORTEST_VERSION = 4
"""Digits that name an adapter version at the least."""


@dataclass(frozen=True)
class FeedbackFilter:
    """Rated answers that become rows."""

    metric: str
    middle: float
    """Scores above it are good, below it bad; a score equal to it is neither."""
    lower_is_better: bool = False
    arms: Collection[str] = ()
    """Empty: all."""
    versions: Collection[str] = ()
    """Adapter versions, each by its first digits; empty: all, the base's own answers too."""
    is_primary: bool = True
    """`metric` is the experiment's primary one, whose range is known."""

    @classmethod
    def of_spec(
        cls, spec: ExperimentSpec, metric: str | None, arms: Collection[str], versions: Collection[str]
    ) -> "FeedbackFilter":
        """Build the filter of a metric, by default the primary one. Raises ConfigError for names that are none."""
        names = [arm.name for arm in spec.arms]
        for arm in arms:
            if arm not in names:
                hint = f"--arm {names[0]}"
                raise ConfigError(
                    f"--arm {arm}", "the experiment has no such arm", f"its arms: {', '.join(names)}", hint
                )
        for version in versions:
            if len(version) < SHORTEST_VERSION:
                rule = f"a version is named by its first {SHORTEST_VERSION} digits or more"
                raise ConfigError(f"--version {version}", f"{len(version)} digits", rule, "graftwork adapters ls")
        primary = spec.primary
        ranged = metric in (None, primary.name)
        middle = (primary.low + primary.high) / 2 if ranged else 0.5
        lower = metric in (None, primary.name) and primary.better == "lower"
        return cls(metric or primary.name, middle, lower, tuple(arms), tuple(versions), ranged)

    def label(self, score: float) -> bool | None:
        """Return True for a good answer, False for a bad one, None for neither."""
        if not self.is_primary and not 0 <= score <= 1:
            raise ConfigError(
                f"--metric {self.metric}",
                f"found a score of {score:g}",
                "scores of another metric than the primary one are within 0..1, with the middle 0.5",
                "make it the primary metric of the experiment, with its low and high",
            )
        if score == self.middle:
            return None
        return (score > self.middle) != self.lower_is_better

    def problem(self, row: LogRow) -> str:
        """Return why a rated answer is no row, in a few words; empty where it is one."""
        if self.arms and row.arm not in self.arms:
            return "of another arm"
        if self.versions and not any((row.adapter_version or "").startswith(one) for one in self.versions):
            return "of another version"
        if row.error is not None or not (row.output or "").strip():
            return "failed or empty" if row.error is not None or row.output is not None else "without a text in the log"
        if row.finish_reason == "length":
            return "cut at max_tokens"
        return "" if row.prompt else "without a prompt in the log"


@dataclass
class FeedbackRows:
    """Rows in the order of the log, and what was left out; complete once the rows are read."""

    keep: FeedbackFilter
    good: int = 0
    bad: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    def rows(self, read: Callable[[], ExperimentLog]) -> Iterator[dict[str, Any]]:
        """Yield `{"id", "prompt", "completion", "label"}` of each rated answer that a caller saw.

        read: opens the log. Raises DataError where no row is left.
        """
        scores = {row.request_id: row.scores[self.keep.metric] for row in read().rows() if self._is_score(row)}
        for row in read().rows():
            if row.kind != "answer" or row.role == "shadow" or row.request_id not in scores:
                continue
            label = self.keep.label(scores.pop(row.request_id))
            problem = "rated in the middle" if label is None else self.keep.problem(row)
            if problem:
                self.left_out[problem] += 1
                continue
            assert row.prompt is not None, "`problem` names an answer without one"
            turns = json.loads(row.prompt)
            if isinstance(turns, str):
                self.left_out["of a text without turns (/v1/completions)"] += 1
                continue
            self.good, self.bad = self.good + bool(label), self.bad + (not label)
            yield {"id": row.request_id, "prompt": turns, "completion": row.output, "label": label}
        if not self.good + self.bad:
            raise self._none_error()

    def describe_left_out(self) -> str:
        """Return the rated answers that are no rows, counted; empty where there are none."""
        return ", ".join(f"{count} {reason}" for reason, count in self.left_out.most_common())

    def _is_score(self, row: LogRow) -> bool:
        return row.kind == "score" and row.detail == self.keep.metric and self.keep.metric in row.scores

    def _none_error(self) -> DataError:
        hint = "check --metric, --arm and --version"
        if self.left_out["without a prompt in the log"]:
            hint = "set log_prompts: true in the experiment's file before it starts; prompts of the past are not kept"
        elif self.left_out["without a text in the log"]:
            hint = "set log_outputs: true in the experiment's file before it starts"
        found = self.describe_left_out() or f"no answer has a score of {self.keep.metric}"
        return DataError("experiment log", found, "a row is a rated answer with its prompt", hint)


def prompt_text(asked: Question) -> str:
    """Return the conversation as the log keeps it: JSON, a list of turns in OpenAI's form, or text as it was sent."""
    return canonical_json(asked if isinstance(asked, str) else [_openai_turn(turn) for turn in asked])


def _openai_turn(turn: Message) -> dict[str, Any]:
    calls = [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": canonical_json(call.arguments)},
        }
        for call in turn.tool_calls
    ]
    optional = {
        "tool_calls": calls,
        "tool_call_id": turn.tool_call_id,
        "name": turn.name,
        "reasoning_content": turn.reasoning,
    }
    return {"role": turn.role, "content": turn.content, **{key: value for key, value in optional.items() if value}}
