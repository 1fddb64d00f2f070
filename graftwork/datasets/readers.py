"""Records of a dataset, one after another, a batch in memory at a time.

A dataset is a file (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`, all but the last also `.gz` and `.zst`), a folder of
such files in the order of their names, a folder of `datasets.save_to_disk`, `recipe://NAME/FILE`, or a Hugging Face
dataset `hf://OWNER/NAME[@REVISION][/CONFIG]/SPLIT`, of the hub or of a local folder (`hf:///PATH/SPLIT`).
"""

import csv
import gzip
import hashlib
import importlib
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from graftwork.datasets.keys import kind_of
from graftwork.errors import DataError, StorageError
from graftwork.storage.local import build_once
from graftwork.storage.store import cache_root, open_uri

if TYPE_CHECKING:
    import pyarrow as pa

Record = tuple[int, dict[str, Any]]
"""(1-based row number, the row as an object)."""

RECIPES = "graftwork.recipes"
"""Module whose `build(name)` makes the files of `recipe://NAME/FILE`; by name, since recipes import the core."""

LONGEST_FIELD = 2**31 - 1
"""Characters of a field of a CSV; Python's own limit, 131,072, is less than some documents have."""
PARQUET_BATCH = 1024
"""Rows of a Parquet file that are in memory at once."""


def read_records(uri: str) -> Iterator[Record]:
    """Every record of the dataset. Raises DataError that names the row, StorageError.

    A row number counts lines of a JSONL (blank ones too), elements of a JSON array, rows below the header of a CSV,
    rows of a Parquet file; over the files of a folder it goes on.
    """
    try:
        yield from _records(uri)
    except OSError as error:
        hint = "check the disk, the network and the permissions"
        raise StorageError(f"read {uri}", f"it failed ({error})", "", hint) from error


def _records(uri: str) -> Iterator[Record]:
    if uri.startswith("hf://"):
        yield from _hub(uri)
        return
    path = local_path(uri)
    if not path.is_dir():
        yield from _file(uri, path)
        return
    if is_saved(path):
        yield from _saved(uri, path, None)
        return
    before = 0
    for file in shards(uri, path):
        number = 0
        for number, record in _file(f"{uri}: {file.name}", file):
            yield before + number, record
        before += number


def _file(uri: str, path: Path) -> Iterator[Record]:
    try:
        yield from (_reader(uri) or _jsonl)(uri, path)
    except (OSError, EOFError, zlib.error) as error:
        if getattr(error, "errno", None) is not None or path.suffix not in (".gz", ".zst"):
            raise  # of the disk, not of the content
        raise DataError(uri, f"it cannot be read ({error})", "", "copy or compress the file again") from error


def is_saved(folder: Path) -> bool:
    """Return whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote the folder."""
    names = (("dataset_dict.json",), ("state.json", "dataset_info.json"))
    return any(all((folder / name).is_file() for name in files) for files in names)


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
    """The data files of a folder, by name. Raises DataError where there are none, or files of several splits."""
    found = _data_files(path for path in folder.iterdir() if path.is_file())
    if not found:
        below = _data_files(path for path in folder.rglob("*") if path.is_file() and not _is_hidden(path, folder))
        hint = f"name {below[0].parent}{_hub_hint(folder, below)}" if below else "check the path"
        raise DataError(uri, "the folder has no data files", f"a data file ends in {ENDINGS}", hint)
    if splits := _splits(found):
        files = "; ".join(f"{split}: {join_some(names)}" for split, names in splits.items())
        raise DataError(
            uri,
            f"its files are of several splits ({', '.join(splits)})",
            "a folder is one dataset",
            f"name one file, or a folder of the files of one split ({files}){_hub_hint(folder, found)}",
        )
    return found


def _data_files(files: Iterable[Path]) -> list[Path]:
    return sorted(path for path in files if _reader(path.name) and not path.name.startswith((".", "dataset_info")))


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def join_some(names: Sequence[str], most: int = 3) -> str:
    """The first names of a list for a message."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


_SPLIT = re.compile(
    r"(?P<before>.*[^a-z]|)(?P<split>train|training|test|testing|validation|valid|val|dev|eval|evaluation)"
    r"(?P<after>|[^a-z].*)"
)
"""Name of a file, in lower case and without its ending, with the words that `datasets` takes for a split."""

_NUMBER = re.compile(r"|[^a-z]?v?\d.*")
"""What follows the word of a split that is no subject: nothing, a number or a version."""


def _splits(files: Sequence[Path]) -> dict[str, list[str]]:
    """{word of the split: names of its files} where a folder has files of several, else {}.

    A split's word ends the name (`my-train`), or a number or version follows it (`train-00000-of-00002`, `dev-v2.0`).
    Elsewhere it may be a subject (`train-tickets`, `test-cases`), unless two names differ in it and in digits alone
    (`train_sft-00000-of-00003` and `test_sft-00000-of-00001`).
    """
    alike: dict[str, dict[str, list[str]]] = {}
    for path in files:
        stem = re.sub(r"\.[a-z]+(\.gz|\.zst)?$", "", path.name.lower())
        if match := _SPLIT.fullmatch(stem):
            rest = "" if _NUMBER.fullmatch(match["after"]) else re.sub(r"\d", "", f"{match['before']} {match['after']}")
            alike.setdefault(rest, {}).setdefault(match["split"], []).append(path.name)
    return next((splits for splits in alike.values() if len(splits) > 1), {})


def _hub_hint(folder: Path, files: Sequence[Path]) -> str:
    """`, or a split as hf://...` where `datasets` finds the training files: by names in lower case, of one form."""
    names, endings = [path.name for path in files], {path.suffix for path in files}
    matches = [_SPLIT.fullmatch(name.partition(".")[0]) for name in names]
    found = [match["split"] for match in matches if match and _NUMBER.fullmatch(match["after"])]
    if "train" not in found or len(found) < len(files) or len(endings) > 1:
        return ""
    return f", or a split as hf://{folder.absolute()}/train"


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


def _jsonl(uri: str, path: Path) -> Iterator[Record]:
    with _open_file(uri, path) as lines:
        for number, line in enumerate(lines, start=1):
            text = _text(uri, number, line)
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                where, problem = f"{uri} row {number}", f"it is not JSON ({error})"
                raise DataError(where, problem, "one JSON object a line", _other_form(uri, text)) from None
            if not isinstance(record, dict):
                raise DataError(
                    f"{uri} row {number}", f"found {kind_of(record)}", "one JSON object a line", _other_form(uri, text)
                )
            yield number, record


def _other_form(uri: str, line: str = "") -> str:
    """Hint for a file that is read as JSONL and is in another form."""
    if line.lstrip().startswith("["):
        return "name a file that is one array .json"
    return "" if _reader(uri) else f"the form follows from the name, which ends in {ENDINGS}; others are read as JSONL"


def _json(uri: str, path: Path) -> Iterator[Record]:
    """An array of objects, read whole; else an object a line."""
    with _open_file(uri, path) as handle:
        first = handle.read(1024)
        begins = first.removeprefix(b"\xef\xbb\xbf").lstrip()
        if not begins.startswith(b"["):
            if begins.partition(b"\n")[0].strip() == b"{":
                problem, rule = "it is an object of several lines", "a .json file is an array of objects, or one a line"
                raise DataError(uri, problem, rule, "write the rows as one array")
            yield from _jsonl(uri, path)
            return
        text = _text(uri, 1, first + handle.read())
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(uri, f"it is not JSON ({error})", "a .json file is an array of objects") from None
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise DataError(f"{uri} row {number}", f"found {kind_of(record)}", "a .json file is an array of objects")
        yield number, record


def _csv(uri: str, path: Path) -> Iterator[Record]:
    with _open_file(uri, path) as raw:
        texts = (_text(uri, number, line) for number, line in enumerate(raw, start=0))  # row 1 is below the header
        csv.field_size_limit(LONGEST_FIELD)
        reader = None
        try:
            header = next(texts, "")
            asked = _excel_separator(header, uri)
            header = next(texts, "") if asked else header
            if not header:
                return  # an empty shard
            delimiter = asked or _delimiter(header, uri)
            reader = csv.DictReader(itertools.chain([header], texts), delimiter=delimiter, strict=True)
            reader.fieldnames = _column_names(reader.fieldnames or (), uri)
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
                f"{uri} line {reader.reader.line_num if reader else 1}",
                f"it is not CSV ({error})",
                "fields are separated as in the header, quotes are doubled, lines end as on Unix or Windows",
            ) from error


def _excel_separator(line: str, uri: str) -> str:
    """The separator of a first line `sep=;`, which Excel reads and writes, else nothing. Raises DataError."""
    match = re.fullmatch(r'sep=(.+)|"sep=(.+)"', line.rstrip("\r\n"), re.IGNORECASE)
    asked = (match[1] or match[2]) if match else ""
    if len(asked) > 1 or asked == '"':
        raise DataError(
            uri, f"its first line is sep={asked}", "a separator is one character", "write one, such as sep=;"
        )
    return asked


def _column_names(header: Sequence[str], uri: str) -> list[str]:
    """Names of the columns; one without a name is `column NUMBER`. Raises DataError for none, and for equal ones."""
    if not any(header):
        raise DataError(uri, "its first line is blank", "the first line of a CSV names the columns", "remove the line")
    names = [name or f"column {number}" for number, name in enumerate(header, start=1)]
    if twice := next((name for place, name in enumerate(names) if name in names[:place]), None):
        raise DataError(uri, f"two columns are named {twice!r}", "the columns of a CSV have names of their own")
    return names


def _delimiter(header: str, uri: str) -> str:
    """The comma where it parts the header, else of semicolon, tab and bar the best at it; a `.tsv` has tabs."""
    if re.search(r"\.tsv(\.gz|\.zst)?$", uri.lower()):
        return "\t"
    # csv.Sniffer takes a space or a letter for the separator of some headers (CPython 3.12)
    fields = {one: len(next(csv.reader([header], delimiter=one), ())) for one in ",;\t|"}
    return "," if fields[","] > 1 else max(fields, key=fields.__getitem__)


def _parquet(uri: str, path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with _open_file(uri, path) as handle:
            for batch in pq.ParquetFile(handle).iter_batches(PARQUET_BATCH):
                try:
                    records = batch.to_pylist(maps_as_pydicts="strict")
                except KeyError as error:
                    raise _key_twice(uri, number, batch) from error
                for record in records:
                    number += 1
                    yield number, _without_fillers(record)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(uri, f"it is not Parquet ({error})"[:400], "", "write the file again") from error


def _key_twice(uri: str, before: int, batch: "pa.RecordBatch") -> DataError:
    """The error of a batch that has a map with a key twice, behind `before` rows."""
    for name, column in zip(batch.column_names, batch.columns, strict=True):
        for number, value in enumerate(column, start=before + 1):
            try:
                value.as_py(maps_as_pydicts="strict")
            except KeyError as error:
                key = re.sub(r".*duplicate key was (.*)\)\W*$", r"\1", str(error))
                where, hint = f"{uri} row {number}: {name}", "write each key of the map once"
                return DataError(where, f"a map has the key {key} twice", "a map is read as a JSON object", hint)
    return DataError(uri, "a map has a key twice", "a map is read as a JSON object", "write each key of the map once")


_TEXT_FORMS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv}
READERS: dict[str, Callable[[str, Path], Iterator[Record]]] = {
    **{form + packed: read for form, read in _TEXT_FORMS.items() for packed in ("", ".gz", ".zst")},
    ".parquet": _parquet,
}
"""By the ending of a file's name; another ending is read as JSONL."""
ENDINGS = f"{', '.join(_TEXT_FORMS)} (each also .gz or .zst), .parquet"
"""`READERS` in errors."""


def _hub(uri: str) -> Iterator[Record]:
    """Rows of a dataset of the Hugging Face hub, or of a folder in its form (`hf:///PATH/SPLIT`), as they arrive."""
    where, config, split, revision = _hub_parts(uri)
    if is_saved(Path(where)):
        yield from _saved(uri, Path(where), split)
        return
    import datasets
    import httpx

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(where, config, split=split, revision=revision, streaming=True)
        yield from enumerate(map(_without_fillers, rows), start=1)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, RuntimeError, httpx.HTTPError) as error:
        found = " ".join(str(error).split())[:300]
        rule = "a dataset of the hub is hf://OWNER/NAME[@REVISION][/CONFIG]/SPLIT, and the hub must be in reach"
        hint = next((hint for words, hint in _HUB_HINTS if re.search(words, found)), _HUB_HINTS[-1][1])
        if where.startswith("/"):
            rule = "hf:///PATH/SPLIT is a split of a folder"
            hint = _BAD_SPLIT[1] if re.search(_BAD_SPLIT[0], found) else "check the folder and its files"
        raise DataError(uri, f"it cannot be read ({found})", rule, hint) from error


_BAD_SPLIT = ("Bad split|split .* not|Unknown split", "end the URI with one of the splits")
_HUB_HINTS = (
    (
        "gated dataset",
        "ask for access on the page of the dataset, and set HF_TOKEN to a token of an account that has it",
    ),
    ("Revision .* doesn't exist", "name a branch, tag or commit of the dataset behind the @"),
    _BAD_SPLIT,
    ("BuilderConfig|Config name", "name a configuration before the split: hf://OWNER/NAME/CONFIG/SPLIT"),
    (
        "[Oo]ffline",
        "unset HF_HUB_OFFLINE to read from the hub; without the hub take a folder of its files: hf:///PATH/SPLIT",
    ),
    ("doesn't exist", "check the id; a private dataset needs HF_TOKEN, a token of an account that may read it"),
    ("", "check the network, its proxy and HF_ENDPOINT; without the hub take a folder of its files: hf:///PATH/SPLIT"),
)
"""What to do, by words of the error of `datasets` 5.2; the last is for a hub that is out of reach."""


def _saved(uri: str, folder: Path, split: str | None) -> Iterator[Record]:
    """Rows of a folder of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`, memory-mapped."""
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            uri, f"it cannot be read ({' '.join(str(error).split())[:300]})", "", "save it again"
        ) from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise DataError(
                uri,
                f"no split {split!r}" if split else "it has several splits",
                f"splits of the folder: {', '.join(map(str, found))}",
                f"name one as hf://{folder.absolute()}/{next(iter(found))}",
            )
        found = found[split]
    yield from enumerate(map(_without_fillers, found), start=1)


_TURNS = frozenset({"input", "completion", "chosen", "rejected", "preferred_output", "non_preferred_output"})
"""Keys whose value may be one turn, or an object of turns and tools."""


def _without_fillers(record: Mapping[str, Any]) -> dict[str, Any]:
    """A row of Arrow without the nulls that fill the objects in its lists up to the same keys, as TRL advises.

    The arguments of a call would have the names of all functions, and turns the keys of all turns.
    """

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(inner) for key, inner in value.items() if inner is not None}
        return [strip(inner) for inner in value] if isinstance(value, list) else value

    def strip_lists(value: Any) -> Any:
        """An object of a column may have nulls of its own; those in its lists are fillers."""
        if isinstance(value, dict):
            return {key: strip(inner) if isinstance(inner, list) else inner for key, inner in value.items()}
        return strip(value)

    return {key: strip(value) if key in _TURNS else strip_lists(value) for key, value in record.items()}


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
        if path.suffix == ".gz":
            return cast("IO[bytes]", gzip.open(path, "rb"))
        return _open_zst(path) if path.suffix == ".zst" else path.open("rb")
    except OSError as error:
        found = "it does not exist" if isinstance(error, FileNotFoundError) else f"it cannot be read ({error.strerror})"
        raise StorageError(f"read {uri}", found, "", "check the path") from error


def _open_zst(path: Path) -> IO[bytes]:
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))


def _text(uri: str, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if number <= 1 else "utf-8")
    except UnicodeDecodeError as error:
        where, problem = f"{uri} row {number}", f"it is not UTF-8 ({error.reason})"
        hint = _other_form(uri) or "save the file as UTF-8"
        raise DataError(where, problem, "data files are UTF-8", hint) from error


def _reader(name: str) -> Callable[[str, Path], Iterator[Record]] | None:
    return next((reader for ending, reader in READERS.items() if name.lower().endswith(ending)), None)
