"""Keys of dataset rows: those that a reader uses, those that it rejects, and the rest, which it counts.

Every row format has a closed list of keys. A key outside the list that would change what the model reads or what the
loss falls on is rejected. Any other one is counted, and reported once for the dataset.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from graftwork.datasets.readers import kind_of
from graftwork.errors import DataError

CONVERSATION = frozenset({"id", "messages", "prompt", "completion", "doc_id", "gold", "given_fields"})
PAIR = frozenset({"id", "messages", "prompt", "chosen", "rejected"})
DOCUMENT = frozenset({"id", "text"})
"""Also the keys of a passage."""
QUESTION = frozenset({"id", "question", "prompt", "messages", "doc_id", "answers", "gold", "given_fields"})
"""Of `rag eval`: only the text of the last user turn is read."""
PREFERENCE_LOSS = frozenset({"margin", "ref_chosen_logps", "ref_rejected_logps"})
"""Keys of a pair that change the loss of other trainers."""

RENAMED_ROW_KEYS = {"asked": "given_fields"}
"""Old key of a row -> new key. An old key is rejected where the reader uses the new one."""

_TURN = frozenset({"role", "content"})
_TURN_FIELDS = ("messages", "prompt", "completion", "chosen", "rejected")
_PROMPT = frozenset(
    {
        "tools",
        "functions",
        "documents",
        "system",
        "history",
        "chat_template_kwargs",
        "enable_thinking",
        "reasoning_content",
        "thinking",
        "image",
        "images",
        "video",
        "videos",
        "audio",
        "audios",
    }
)
_PROMPT_OF_TURN = frozenset(
    {
        "tools",
        "tool_calls",
        "function_call",
        "tool_call_id",
        "reasoning_content",
        "reasoning",
        "thinking",
        "refusal",
        "documents",
        "image",
        "images",
        "video",
        "videos",
        "audio",
        "audios",
    }
)
_LOSS = frozenset({"input_ids", "loss_mask", "completion_mask", "assistant_masks"})
_WEIGHT = frozenset({"weight", "sample_weight", "loss_weight"})
_WEIGHT_OF_TURN = frozenset({"weight", "loss", "train"})
_SHOWN = 20
"""Ignored keys that a note names; the rest is a number."""


class KeyCheck:
    """Check the keys of one dataset's rows, and count the rows of each ignored key.

    known: keys that the caller reads. prompt, loss: reject keys that change what the model reads, or what is learned;
    a caller that renders no prompt or computes no loss counts them with the others. more: further keys to reject.
    """

    def __init__(
        self, known: Iterable[str], *, prompt: bool = True, loss: bool = True, more: Iterable[str] = ()
    ) -> None:
        self.known, self.loss = frozenset(known), loss
        self._of_row = (_PROMPT if prompt else frozenset()) | (_LOSS if loss else frozenset()) | frozenset(more)
        self._of_turn = _PROMPT_OF_TURN if prompt else frozenset()
        self.ignored: Counter[str] = Counter()
        """Rows by key; a key of a turn is `messages[].KEY`."""

    def check(self, record: Mapping[str, Any], where: str) -> None:
        """Check one row, named by `where`. Raises DataError for a key that takes effect elsewhere and not here.

        A value that says nothing (null, an empty text, list or object) is as good as no key.
        """
        others: set[str] = set()
        for key in record.keys() - self.known:
            value = record[key]
            if _is_empty(value):
                continue
            if (new := RENAMED_ROW_KEYS.get(key)) in self.known:
                raise DataError(f"{where}: {key}", "unknown key", f"the key is {new}", f"{key} was renamed to {new}")
            if key in self._of_row:
                raise _rejected(f"{where}: {key}", value)
            if self.loss and key in _WEIGHT:
                _require_weight(f"{where}: {key}", value)
            elif self.loss and key == "label" and _is_undesired(record):
                raise DataError(
                    f"{where}: label",
                    f"found {value!r}",
                    "every answer of a training set is learned as a good one; labels of KTO are not supported",
                    "leave rows with a false label out, or write pairs (chosen, rejected) for objective.kind=dpo",
                )
            elif not (key == "label" and value is True):
                others.add(key)
        for field in _TURN_FIELDS:
            if field in self.known and isinstance(record.get(field), list | dict):
                others |= set(self._turns(record[field], field, where))
        self.ignored.update(sorted(others))

    def note(self, dataset: str) -> tuple[str, ...]:
        """`data.train: ignored keys: source (in 120 rows), lang (in 1 row)`; nothing where no key was ignored."""
        if not self.ignored:
            return ()
        found = sorted(self.ignored.items(), key=lambda item: (-item[1], item[0]))
        named = ", ".join(f"{key} (in {count} row{'s' * (count != 1)})" for key, count in found[:_SHOWN])
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        return (f"{dataset}: ignored keys: {named}{more}",)

    def _turns(self, value: Any, field: str, where: str) -> Iterator[str]:
        turns = (
            [(f"{field}[{at}]", turn) for at, turn in enumerate(value)]
            if isinstance(value, list)
            else ([(field, value)])
        )
        for name, turn in turns:
            if not isinstance(turn, dict):
                continue
            for key in turn.keys() - _TURN:
                if _is_empty(turn[key]):
                    continue
                if key in self._of_turn:
                    raise _rejected(f"{where}: {name}.{key}", turn[key])
                if not (self.loss and key in _WEIGHT_OF_TURN):
                    yield f"{field}[].{key}"
                elif turn.get("role") == "assistant" or not _is_number(turn[key], 0):  # no loss on others anyway
                    _require_weight(f"{where}: {name}.{key}", turn[key])


def other_format(record: Mapping[str, Any], where: str) -> DataError | None:
    """The error of a row without `messages` that is in a format of another tool; None for an unknown one."""
    for keys, name, move in _OTHER_FORMATS:
        if all(key in record for key in keys):
            if keys == ("conversations",) and not _is_sharegpt(record["conversations"]):
                move = "rename 'conversations' to 'messages'"
            return DataError(
                f"{where}: {', '.join(keys)}",
                f"the row has {name}",
                "a row has `messages` (a list of turns with role and content), or `prompt` and `completion`",
                move,
            )
    return None


SHAREGPT = "write each turn as {role, content} in `messages`: from=human is role user, from=gpt is role assistant"
_OTHER_FORMATS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("conversations",), "ShareGPT's format", SHAREGPT),
    (
        ("instruction", "output"),
        "Alpaca's format",
        "write `prompt` (instruction, an empty line, input where there is one) and `completion` (output)",
    ),
    (
        ("chosen", "rejected"),
        "the form of a preference",
        "set objective.kind=dpo or reward; to learn the better answers alone, write `prompt` and `completion`",
    ),
    (("question", "answer"), "the keys question and answer", "rename them to 'prompt' and 'completion'"),
    (("text",), "plain text", "set objective.kind=cpt, or write the text as turns in `messages`"),
)


def _rejected(at: str, value: object) -> DataError:
    found = f"{kind_of(value)} of {len(value)}" if isinstance(value, list | dict) else repr(value)
    key = at.rpartition(".")[2].rpartition(" ")[2]
    return DataError(
        at,
        f"found {found if len(found) <= 80 else found[:77] + '...'}",
        f"{key} changes what the model reads or learns, and is not supported here",
        "remove the key where it is of no use, else leave the row out",
    )


def _require_weight(at: str, value: object) -> None:
    if not _is_number(value, 1):
        raise DataError(
            at,
            f"found {value!r}",
            "every assistant turn and row is learned with weight 1; other weights are not supported",
            "leave the row out, or end its conversation before that turn",
        )


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


def _is_number(value: object, number: int) -> bool:
    """Equal as a number, a boolean, or the text of one, which is all that a CSV has."""
    if isinstance(value, str):
        try:
            return float({"true": "1", "false": "0"}.get(value.lower(), value)) == number
        except ValueError:
            return False
    return isinstance(value, int | float) and value == number


def _is_undesired(record: Mapping[str, Any]) -> bool:
    """A false label of KTO. Beside `messages` a number is the label of something else."""
    label = record["label"]
    return label is False or ("messages" not in record and _is_number(label, 0))


def _is_sharegpt(turns: object) -> bool:
    return not (isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0])
