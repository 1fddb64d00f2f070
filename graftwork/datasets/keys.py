"""Checks of the keys of rows: read, rejected by row and key, or counted and reported once for the dataset.

Every row format has a closed list of keys. A key outside the list that would change what the model reads or what the
loss falls on is rejected. Any other one is counted.
"""

import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from typing import Any

from graftwork.errors import DataError

DOCUMENT = frozenset({"id", "text"})
"""Keys of a passage of a corpus."""
QUESTION = frozenset({"id", "question", "prompt", "messages", "doc_id", "answers", "gold", "given_fields"})
"""Of `rag eval`: only the text of the last user turn is read."""
PREFERENCE_LOSS = frozenset({"margin", "ref_chosen_logps", "ref_rejected_logps"})
"""Keys of a pair that change the loss of other trainers."""
RENAMED_ROW_KEYS = {"asked": "given_fields"}
"""Old key of a row -> new key. An old key is rejected where the reader uses the new one."""

_MEDIA = frozenset({"image", "images", "video", "videos", "audio", "audios", "objects"})
_PROMPT = _MEDIA | frozenset(
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
    }
)
_PROMPT_OF_TURN = _MEDIA | frozenset(
    {"tools", "tool_calls", "function_call", "tool_call_id", "refusal", "documents", "reasoning_details"}
)
_LOSS = frozenset({"input_ids", "labels", "loss_mask", "completion_mask", "assistant_masks", "segments"})
_LOSS_OF_TURN = frozenset({"train_detail", "training_detail"})
_WEIGHT = frozenset({"weight", "sample_weight", "loss_weight", "loss_scale"})
TURN_WEIGHTS = frozenset({"weight", "loss", "loss_scale", "train", "training"})
"""Keys of a turn that weight its loss: OpenAI's, ms-swift's and Axolotl's names."""
_TRAIN = frozenset({"train", "training"})
_CONTROL = re.compile(r"<[|｜][^<>\s]{1,40}[|｜]>|</?s>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>|\[/?INST\]")  # noqa: RUF001
"""Control tokens of Llama, Qwen, DeepSeek, Mistral, Gemma and others; of a base those that its tokenizer has count."""
_SHOWN = 20
"""Ignored keys that a note names; the rest is a number."""


class KeyCheck:
    """Check the keys of one dataset's rows, and count the rows of each key that is used and of each that is ignored.

    known: keys that the caller reads itself. prompt, loss: reject keys that change what the model reads, or what is
    learned; a caller that renders no prompt or computes no loss counts them with the others. more: further keys to
    reject.
    """

    def __init__(
        self, known: Iterable[str] = (), *, prompt: bool = True, loss: bool = True, more: Iterable[str] = ()
    ) -> None:
        self.known, self.prompt, self.loss = frozenset(known), prompt, loss
        self._more = frozenset(more)
        self.used: Counter[str] = Counter()
        self.ignored: Counter[str] = Counter()
        """Rows by key; a key of a turn is `messages[].KEY`."""
        self.formats: dict[str, str] = {}
        """Format of each file, by its URI."""
        self.ids: dict[str, int] = {}
        """Row number by id, in order."""
        self.taken: dict[str, tuple[int, int]] = {}
        """Of a weighted mixture: (rows taken, rows there) by URI."""
        self.speakers = 0
        """Rows with a turn of another role than tool that has a `name`, which few chat templates write."""
        self.openings = 0
        """Rows with an answer before the first question, which is not learned."""
        self.spelled: Counter[str] = Counter()
        """Rows by name of a control token, as bases have them, that their text spells."""
        self._used: set[str] = set()
        self._speaker = self._opening = False
        self._others: set[str] = set()
        self._spelled: set[str] = set()

    def fresh(self) -> "KeyCheck":
        """The same check with nothing counted."""
        return KeyCheck(self.known, prompt=self.prompt, loss=self.loss, more=self._more)

    def check(self, record: Mapping[str, Any], where: str) -> None:
        """Check and count one row without turns, named by `where`. Raises as `begin` does."""
        self.begin(record, where)
        self.finish()

    def begin(self, record: Mapping[str, Any], where: str, known: frozenset[str] = frozenset()) -> None:
        """Check the keys of a row, named by `where`. Raises DataError for a key that takes effect elsewhere only.

        A value that says nothing (null, an empty text, list or object) is as good as no key. known: keys of the
        row's format.
        """
        self._used, self._others, self._spelled = set(), set(), set()
        self._speaker = self._opening = False
        known |= self.known
        rejected = (_PROMPT if self.prompt else frozenset()) | (_LOSS if self.loss else frozenset()) | self._more
        for key, value in record.items():
            at = f"{where}: {key}"
            if is_empty(value):
                continue
            if key in known:
                self._used.add(key)
                self._note_control(value)
                continue
            if (new := RENAMED_ROW_KEYS.get(key)) in known:
                raise DataError(at, "unknown key", f"the key is {new}", f"{key} was renamed to {new}")
            if key in rejected:
                raise rejection(at, value)
            if self.loss and key in _WEIGHT:
                _require_weight(at, value)
                self._used.add(key)
            elif self.loss and key in ("label", "kto_tag"):
                self._check_label(key, value, "messages" in record or not self.prompt, at)
            else:
                self._others.add(key)

    def turn(self, turn: Mapping[str, Any], at: str, field: str, known: frozenset[str], *, learned: bool) -> bool:
        """Check the keys of a turn and return its loss weight: False where the turn is not to be learned.

        at: the turn with its row, `rows.jsonl row 2: messages[1]`. field: `messages`. learned: an assistant's turn that
        the loss falls on.
        """
        trained = True
        for key, value in turn.items():
            name = f"{field}[].{key}"
            if is_empty(value) and not isinstance(value, bool):
                continue
            if key in TURN_WEIGHTS and self.loss:
                trained &= _turn_weight(f"{at}.{key}", key, value, learned)
                self._used.add(name)
            elif key in known:
                self._used.add(name)
                self._note_control(value)
            elif (self.prompt and key in _PROMPT_OF_TURN) or (self.loss and key in _LOSS_OF_TURN):
                raise rejection(f"{at}.{key}", value)
            else:
                self._others.add(name)
        return trained

    def ignore(self, *keys: str) -> None:
        """Count keys of the row among the ignored ones: they were read and had no effect."""
        self._used -= set(keys)
        self._others |= set(keys)

    def speaker(self) -> None:
        """Note that a turn of the row has the name of its speaker."""
        self._speaker = True

    def opening(self) -> None:
        """Note that the row has an answer before the first question."""
        self._opening = True

    def finish(self) -> None:
        """Count the keys of the row that was begun."""
        self.speakers += self._speaker
        self.openings += self._opening
        self.spelled.update(self._spelled)
        self.used.update(self._used)
        self.ignored.update(sorted(self._others))

    def note(self, dataset: str) -> tuple[str, ...]:
        """`data.train: ignored keys: source (in 120 rows), lang (in 1 row)`, and answers that are not learned."""
        found = _in_rows(self.openings)
        notes = (f"{dataset}: answers before the first question ({found}) are not learned",) if self.openings else ()
        if not self.ignored:
            return notes
        counts = sorted(self.ignored.items(), key=lambda item: (-item[1], item[0]))
        named = ", ".join(f"{key} ({_in_rows(count)})" for key, count in counts[:_SHOWN])
        more = f" and {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else ""
        return (*notes, f"{dataset}: ignored keys: {named}{more}")

    def template_notes(self, dataset: str, *, names: bool, specials: Container[str]) -> tuple[str, ...]:
        """Warnings of speakers' names that the chat template leaves out, and of control tokens that the text spells.

        names: the template writes them. specials: control tokens of the base.
        """
        notes = []
        if self.speakers and not names:
            found = f"name of turns ({_in_rows(self.speakers)}) is left out"
            notes.append(f"{dataset}: {found}: the chat template does not write it")
        if spelled := [f"{name} ({_in_rows(self.spelled[name])})" for name in sorted(self.spelled) if name in specials]:
            why = "characters in the text, no control tokens; turns are written as messages"
            notes.append(f"{dataset}: {', '.join(spelled[:_SHOWN])}: {why}")
        return tuple(notes)

    def mixture_note(self, dataset: str) -> tuple[str, ...]:
        """`data.train: 12 of 48 rows of a.jsonl, 4 of 4 rows of b.jsonl`; nothing where every row is taken."""
        shares = (f"{taken} of {there} rows of {path}" for path, (taken, there) in self.taken.items())
        return (f"{dataset}: {', '.join(shares)}, by their weights",) if self.taken else ()

    def _note_control(self, value: object) -> None:
        if isinstance(value, str) and ("<" in value or "[" in value):
            self._spelled.update(_CONTROL.findall(value))
        elif isinstance(value, list):  # content parts, and turns of Alpaca's history
            for part in value:
                self._note_control(part.get("text") if isinstance(part, dict) else part)

    def _check_label(self, key: str, value: object, other: bool, at: str) -> None:
        """Refuse a false label of KTO. other: a number is the label of something else."""
        if value is False or (not other and is_number(value, 0)):
            raise DataError(
                at,
                f"found {value!r}",
                "every answer of a training set is learned as a good one, except with objective.kind=kto",
                "set objective.kind=kto, leave rows with a false label out, or write pairs (chosen, rejected)",
            )
        (self._used if value is True else self._others).add(key)


def _in_rows(count: int) -> str:
    return f"in {count} row{'s' * (count != 1)}"


def rejection(at: str, value: object) -> DataError:
    """The error of a key that would change the text or the loss and is not supported."""
    found = f"{kind_of(value)} of {len(value)}" if isinstance(value, list | dict) else repr(value)
    key = at.rpartition(".")[2].rpartition(" ")[2]
    hint = "remove the key where it is of no use, else leave the row out"
    if key in ("reasoning_content", "thinking"):
        hint = f"move it into the assistant's turn: {{role: assistant, {key}: ..., content: ...}}"
    if key == "enable_thinking":
        hint = "write chat_template_kwargs: {enable_thinking: ...}"
    return DataError(
        at,
        f"found {found if len(found) <= 80 else found[:77] + '...'}",
        f"{key} changes what the model reads or learns, and is not supported here",
        hint,
    )


def kind_of(value: object) -> str:
    """JSON's name of a value's type."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null", bytes: "bytes"}
    return names.get(type(value), "a number")


def reject_lone_surrogates(text: str, where: str) -> None:
    """Raise DataError for half of a surrogate pair, which JSON can spell and UTF-8 can't."""
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise DataError(where, "it holds half of a surrogate pair", "text is Unicode", "write the character as one")


def is_empty(value: object) -> bool:
    """True for null, and for an empty text, list or object."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def is_number(value: object, number: int) -> bool:
    """Equal as a number, a boolean, or the text of one, which is all that a CSV has."""
    if isinstance(value, str):
        try:
            return float({"true": "1", "false": "0"}.get(value.lower(), value)) == number
        except ValueError:
            return False
    return isinstance(value, int | float) and value == number


def _turn_weight(at: str, key: str, value: object, learned: bool) -> bool:
    if is_number(value, 0):
        return False
    if not is_number(value, 1):
        raise DataError(
            at,
            f"found {value!r}",
            "a turn is learned (1) or not (0); other weights are not supported",
            "write 0 or 1, or leave the row out",
        )
    if key in _TRAIN and not learned:
        raise DataError(
            at,
            f"found {value!r}",
            "the loss falls on the assistant's turns alone",
            f"remove {key} from turns of other roles",
        )
    return True


def _require_weight(at: str, value: object) -> None:
    if not is_number(value, 1):
        raise DataError(
            at,
            f"found {value!r}",
            "every row is learned with weight 1; other weights are not supported",
            "leave the row out, or give turns the weight 0 or 1",
        )
