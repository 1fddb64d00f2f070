"""Records of a dataset, one after another, a batch in memory at a time, and the check of their keys.

A dataset is a file (`.jsonl`, `.csv`, `.parquet`, the first two also `.gz`), a folder of such files in the order of
their names, `recipe://NAME/FILE`, or a Hugging Face dataset `hf://OWNER/NAME[@REVISION][/CONFIG]/SPLIT`.

Every row format has a closed list of keys. A key outside the list that would change what the model reads or what the
loss falls on is rejected. Any other one is counted, and reported once for the dataset.
"""

import csv
import gzip
import hashlib
import importlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

from graftwork.errors import DataError, StorageError
from graftwork.storage.local import build_once
from graftwork.storage.store import cache_root, open_uri

Record = tuple[int, dict[str, Any]]
"""(1-based row number, the row as an object)."""

RECIPES = "graftwork.recipes"
"""Module whose `build(name)` makes the files of `recipe://NAME/FILE`; by name, since recipes import the core."""

PARQUET_BATCH = 1024
"""Rows of a Parquet file that are in memory at once."""


def read_records(uri: str) -> Iterator[Record]:
    """Every record of the dataset. Raises DataError that names the row, StorageError.

    A row number counts lines of a JSONL (blank ones too), rows below the header of a CSV, rows of a Parquet file; over
    the files of a folder it goes on.
    """
    if uri.startswith("hf://"):
        yield from _hub(uri)
        return
    path = local_path(uri)
    if not path.is_dir():
        yield from (_reader(uri) or _jsonl)(uri, path)
        return
    before = 0
    for file in shards(uri, path):
        number = 0
        for number, record in (_reader(file.name) or _jsonl)(f"{uri}: {file.name}", file):
            yield before + number, record
        before += number


def local_path(uri: str) -> Path:
    """The file or folder on this machine; an object on S3 is copied into the cache, once for each of its versions."""
    if uri.startswith("recipe://"):
        return _recipe_file(uri)
    store, key = open_uri(uri)
    if store.is_local:
        return Path(store.path(key))
    stamps = store.stamps()
    below = {} if key in stamps else {"/".join(parts): stamp for parts, stamp in store.tree(key).items()}
    versions = below or {name: stamp for name, stamp in stamps.items() if name == key}
    if not versions:
        store.read_bytes(key)  # raises the error of what is missing or out of reach
    mark = hashlib.sha256(f"{store.path(key)} {sorted(versions.items())}".encode()).hexdigest()[:24]

    def copy(folder: Path) -> None:
        store.download(folder / key, key)

    return build_once(cache_root() / "data" / mark, copy) / key


def shards(uri: str, folder: Path) -> list[Path]:
    """The data files of a folder, by name. Raises DataError where there are none."""
    found = sorted(path for path in folder.iterdir() if path.is_file() and _reader(path.name))
    if not found:
        endings = ", ".join(READERS)
        raise DataError(uri, "the folder has no data files", f"a data file ends in {endings}", "check the path")
    return found


def require_new(
    identity: str,
    number: int,
    seen: dict[str, int],
    uri: str,
    *,
    key: str = "id",
    rule: str = "ids are unique in a file",
) -> None:
    """Note where an id was; raise DataError naming both rows where it came before."""
    if identity in seen:
        raise DataError(
            f"{uri} row {number}: {key}={identity!r}",
            f"row {seen[identity]} has the same id",
            rule,
            "give each row its own id",
        )
    seen[identity] = number


def no_rows(uri: str, rule: str = "a dataset has at least one row") -> DataError:
    """The error of a dataset without any."""
    return DataError(uri, "it has no rows", rule, "check the path")


def reject_lone_surrogates(text: str, where: str) -> None:
    """Raise DataError for half of a surrogate pair, which JSON can spell and UTF-8 can't."""
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise DataError(where, "it holds half of a surrogate pair", "text is Unicode", "write the character as one")


def _jsonl(uri: str, path: Path) -> Iterator[Record]:
    with _open_file(uri, path) as lines:
        for number, line in enumerate(lines, start=1):
            text = _text(uri, number, line)
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{uri} row {number}", f"it is not JSON ({error})", "one JSON object a line") from None
            if not isinstance(record, dict):
                raise DataError(f"{uri} row {number}", f"found {kind_of(record)}", "one JSON object a line")
            yield number, record


def _csv(uri: str, path: Path) -> Iterator[Record]:
    with _open_file(uri, path) as raw:
        texts = (_text(uri, number, line) for number, line in enumerate(raw, start=0))  # row 1 is below the header
        reader = csv.DictReader(texts, strict=True)
        try:
            for number, record in enumerate(reader, start=1):
                if None in record or None in record.values():
                    wanted = len(reader.fieldnames or ())
                    raise DataError(
                        f"{uri} row {number}",
                        f"it has not the {wanted} fields of the header",
                        "a row of a CSV has them all",
                        "quote fields that hold commas",
                    )
                yield number, dict(record)
        except csv.Error as error:
            raise DataError(
                f"{uri} line {reader.line_num}",
                f"it is not CSV ({error})",
                "a CSV is comma-separated, quotes are doubled",
            ) from error


def _parquet(uri: str, path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with _open_file(uri, path) as handle:
            for batch in pq.ParquetFile(handle).iter_batches(PARQUET_BATCH):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(uri, f"it is not Parquet ({error})"[:400], "", "write the file again") from error


READERS: dict[str, Callable[[str, Path], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl,
    ".csv": _csv,
    ".csv.gz": _csv,
    ".parquet": _parquet,
}
"""By the ending of a file's name; another ending is read as JSONL."""


def _hub(uri: str) -> Iterator[Record]:
    """Rows of a dataset of the Hugging Face hub, or of a folder in its form (`hf:///PATH/SPLIT`), as they arrive."""
    where, config, split, revision = _hub_parts(uri)
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(where, config, split=split, revision=revision, streaming=True)
        yield from enumerate((dict(row) for row in rows), start=1)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, RuntimeError) as error:
        raise DataError(
            uri,
            f"it cannot be read ({' '.join(str(error).split())[:300]})",
            "a dataset of the hub is hf://OWNER/NAME[@REVISION][/CONFIG]/SPLIT, and the hub must be in reach",
            "check the names; HF_TOKEN opens private ones; without the hub take a folder of Parquet files",
        ) from error


def _hub_parts(uri: str) -> tuple[str, str | None, str, str | None]:
    """(id or folder, config, split, revision)."""
    rest = uri.removeprefix("hf://")
    if rest.startswith("/"):
        folder, _, split = rest.rpartition("/")
        return folder, None, split, None
    parts = rest.split("/")
    if len(parts) not in (3, 4) or not all(parts):
        raise DataError(
            uri,
            f"found {len(parts)} parts",
            "hf://OWNER/NAME[@REVISION][/CONFIG]/SPLIT names a dataset",
            "end it with the split, such as /train",
        )
    name, _, revision = parts[1].partition("@")
    return f"{parts[0]}/{name}", parts[2] if len(parts) == 4 else None, parts[-1], revision or None


def _recipe_file(uri: str) -> Path:
    build: Callable[[str], Path] = importlib.import_module(RECIPES).build
    name, _, file = uri.removeprefix("recipe://").partition("/")
    folder = build(name)
    if not file or "/" in file or not (folder / file).is_file():
        files = ", ".join(sorted(path.name for path in folder.iterdir()))
        raise DataError(uri, f"recipe {name} has no file {file!r}", f"its files are {files}", "name one of them")
    return folder / file


def _open_file(uri: str, path: Path) -> IO[bytes]:
    try:
        return cast("IO[bytes]", gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")
    except OSError as error:
        found = "it does not exist" if isinstance(error, FileNotFoundError) else f"it cannot be read ({error.strerror})"
        raise StorageError(f"read {uri}", found, "", "check the path") from error


def _text(uri: str, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if number <= 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{uri} row {number}", f"it is not UTF-8 ({error.reason})", "data files are UTF-8") from error


def _reader(name: str) -> Callable[[str, Path], Iterator[Record]] | None:
    return next((reader for ending, reader in READERS.items() if name.lower().endswith(ending)), None)


def kind_of(value: object) -> str:
    """JSON's name of a value's type."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


# Keys of rows.


CONVERSATION = frozenset({"id", "messages", "prompt", "completion", "doc_id", "gold", "given_fields"})
PAIR = frozenset({"id", "messages", "prompt", "chosen", "rejected"})
LABELLED = frozenset({"id", "messages", "prompt", "completion", "label"})
"""Of KTO: an answer and its label, true or false."""
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
_MEDIA = frozenset({"image", "images", "video", "videos", "audio", "audios"})
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
                raise _rejection(f"{where}: {key}", value)
            if self.loss and key in _WEIGHT:
                _require_weight(f"{where}: {key}", value)
            elif (
                self.loss and key == "label" and (value is False or ("messages" not in record and _is_number(value, 0)))
            ):
                # a false label of KTO; next to `messages` a number is the label of something else
                raise DataError(
                    f"{where}: label",
                    f"found {value!r}",
                    "every answer of a training set is learned as a good one; labels are read by objective.kind=kto",
                    "set objective.kind=kto, or leave rows with a false label out",
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
        turns = {f"{field}[{at}]": turn for at, turn in enumerate(value)} if isinstance(value, list) else {field: value}
        for name, turn in turns.items():
            if not isinstance(turn, dict):
                continue
            for key in turn.keys() - _TURN:
                if _is_empty(turn[key]):
                    continue
                if key in self._of_turn:
                    raise _rejection(f"{where}: {name}.{key}", turn[key])
                if not (self.loss and key in _WEIGHT_OF_TURN):
                    yield f"{field}[].{key}"
                elif turn.get("role") == "assistant" or not _is_number(turn[key], 0):  # no loss on others anyway
                    _require_weight(f"{where}: {name}.{key}", turn[key])


def other_format(record: Mapping[str, Any], where: str) -> DataError | None:
    """The error of a row without `messages` that is in a format of another tool; None for an unknown one."""
    for keys, name, move in _OTHER_FORMATS:
        if all(key in record for key in keys):
            turns = record["conversations"] if keys == ("conversations",) else None
            if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0]:
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


def _rejection(at: str, value: object) -> DataError:
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
