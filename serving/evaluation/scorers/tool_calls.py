"""Scorer `tool_calls`: the calls of an answer against the row's right calls, by name, arguments and order."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from graftwork.config import Spec, canonical_json
from graftwork.datasets.rows import DatasetRow
from graftwork.errors import ConfigError, DataError
from graftwork.metrics import Metric
from graftwork.prompts.render import Tool, ToolCall
from graftwork.prompts.tool_calls import MalformedCall, parse_tool_calls
from graftwork.scoring import AnswerSchema
from graftwork.serving.evaluation.scorers.protocol import ModelReply, ScoreFunction, Scorer

METRICS = tuple(
    Metric(name, "share of answers", "higher", "binary", meaning)
    for name, meaning in (
        (
            "call_valid",
            "The answer calls tools, each by the name of a tool of the row, with arguments that its JSON schema "
            "accepts; where no call is right, it makes none.",
        ),
        ("call_names", "The tools called are the right ones, each as often as it should be, in any order."),
        ("call_arguments", "The calls are the right ones, with equal arguments, in any order."),
        ("call_order", "The calls are the right ones, with equal arguments, in the right order."),
    )
)


class ToolCallsSpec(Spec):
    """call_valid, call_names, call_arguments, call_order: the calls of an answer against the right ones.

    The right calls are gold's `tool_calls` (objects with `name` and `arguments`; an empty list: none is right), else
    those of the row's last assistant turn. The row carries `tools`.
    """

    kind: Literal["tool_calls"]
    needs_gold: ClassVar[bool] = True

    @property
    def metric_names(self) -> tuple[str, ...]:
        return tuple(metric.name for metric in METRICS)

    def build(self, schema: AnswerSchema | None) -> Scorer:
        """Return the scores of a row's calls."""
        return ScoreFunction(METRICS, _score, _right_calls)


def _score(reply: ModelReply) -> dict[str, float]:
    if reply.row is None:
        return {metric.name: 0.0 for metric in METRICS}
    right = [_key(call) for call in _right_calls(reply.row)]
    tools = reply.row.tools
    try:
        calls = parse_tool_calls(reply.text, tools)
    except MalformedCall:
        return {metric.name: 0.0 for metric in METRICS}
    found = [_key(call) for call in calls]
    values = (
        bool(calls) == bool(right) and all(_is_accepted(call, tools) for call in calls),
        Counter(call.name for call in calls) == Counter(name for name, _ in right),
        Counter(found) == Counter(right),
        found == right,
    )
    return {metric.name: float(value) for metric, value in zip(METRICS, values, strict=True)}


def _key(call: ToolCall) -> tuple[str, str]:
    return call.name, canonical_json(dict(call.arguments))


def _is_accepted(call: ToolCall, tools: Sequence[Tool]) -> bool:
    """The call is of one of the tools, and its JSON schema accepts the arguments."""
    named = next((tool for tool in tools if tool["function"]["name"] == call.name), None)
    try:
        return named is not None and _schema_of(named, "").holds(call.arguments)
    except RecursionError:  # a schema that refers to itself
        return False


def _schema_of(tool: Tool, row_id: str) -> AnswerSchema:
    """The schema of a function's arguments. Raises DataError where it is none."""
    name, tree = tool["function"]["name"], tool["function"].get("parameters") or {}
    try:
        return AnswerSchema(tree)
    except ConfigError as error:
        raise DataError(
            f"row {row_id!r}: tools: parameters of {name!r}",
            error.problem,
            "the arguments of a function have a JSON schema",
            "types are object, array, string, number, integer, boolean and null",
        ) from error


def _right_calls(row: DatasetRow) -> list[ToolCall]:
    """Raises DataError for a row without tools or without right calls."""
    if not row.tools:
        raise DataError(f"row {row.id!r}: tools", "missing or empty", "tool_calls scores calls of the row's tools")
    for tool in row.tools:
        _schema_of(tool, row.id)
    if row.gold is None or "tool_calls" not in row.gold:
        if row.messages[-1].tool_calls:
            return list(row.messages[-1].tool_calls)
        raise DataError(
            f"row {row.id!r}: gold.tool_calls",
            "missing",
            "the right calls are gold's tool_calls, or those of the row's last assistant turn",
            "add gold.tool_calls; an empty list says that no call is right",
        )
    given = row.gold["tool_calls"]
    return [_gold_call(row.id, call) for call in given] if isinstance(given, list) else [_gold_call(row.id, given)]


def _gold_call(row_id: str, value: Any) -> ToolCall:
    function = value.get("function", value) if isinstance(value, Mapping) else {}
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise DataError(
            f"row {row_id!r}: gold.tool_calls",
            f"found {value!r}",
            "a call is an object with a name and arguments, which are an object",
            "fix the row",
        )
    return ToolCall(name, arguments)
