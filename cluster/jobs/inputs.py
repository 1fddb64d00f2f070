"""Local files that a job's spec names: sent to the job's store by content, or refused before anything is written.

    <root>/inputs/<24 of its sha256>/<name>    a file, or a folder file by file

A plain path means this machine; `file://`, `s3://`, `hf://`, `recipe://` and `pypi://` mean the same on every machine.
The spec that is sent names the copy, and the job's identity holds the sha256: the same rows under another path are the
same job, other rows under the same path are another one.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.cluster.jobs.models import Findings, JobInput, refuse, warn
from graftwork.config import Spec, SpecT, validate
from graftwork.errors import ConfigError, StorageError
from graftwork.planning.hardware import GIB
from graftwork.storage.local import files_under
from graftwork.storage.store import Store

INPUTS = "inputs"
"""Folder of a run store."""
MOST_BYTES = 2**30
"""Limit for all local files of a job together. Larger data is copied to S3 once, by the user."""
INPUT_KEYS = frozenset(
    {"train", "eval", "corpus", "questions", "few_shot_file", "answer_schema", "json_schema", "setup", "chat_template"}
)
"""Keys that name a file or folder to read, whatever the stage; `uri` too, where `INPUT_PARENTS` has it."""
INPUT_PARENTS = frozenset({"sources", "text"})
PLACE_KEYS = frozenset({"root", "log", "adapter_roots", "nvme_path", "argv"})
"""Keys that name a place on the machines where the job runs, or arguments of a program."""
WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt")


@dataclass(frozen=True)
class SentSpec:
    """The spec that is sent to the job, its identity, and the files that are copied to the store."""

    spec: Spec
    identity: str
    inputs: tuple[JobInput, ...]


def with_inputs(spec: SpecT, root: str) -> SentSpec:
    """Name the copies in place of the local files that can be sent. The others stay as they are: `path_findings` says
    why. Reads the files, writes nothing. Raises StorageError for a file that can't be read.
    """
    tree, store = spec.model_dump(mode="json", exclude_unset=True), Store(root)
    found: dict[str, JobInput] = {}
    room = MOST_BYTES
    for where, value in texts_in(tree):
        path = _local_path(where, value)
        if path is None or value in found or not _exists(path):
            continue
        try:
            size = room + 1 if _is_weights(path) else _size(path)
            if size <= room:
                found[value], room = _input(path, size), room - size
        except OSError as error:
            raise StorageError(
                f"{where}={value}",
                f"{error.filename} cannot be read ({error.strerror})",
                "a job copies its local files to its store",
                "correct the path or its rights",
            ) from error
    if not found:
        return SentSpec(spec, spec.identity(), ())

    def named(name: Callable[[JobInput], str]) -> Spec:
        def one(where: str, value: str) -> str:
            return name(found[value]) if value in found and _local_path(where, value) else value

        return validate(type(spec), _map_texts(tree, one), where="the job's spec")

    identity = named(lambda one: f"sha256:{one.sha256}{one.path.suffix}").identity()
    return SentSpec(named(lambda one: store.path(*one.key)), identity, tuple(found.values()))


def send(store: Store, one: JobInput) -> None:
    """Copy it to the store, file by file; copies that are there already stay. Raises ConfigError for a changed file."""
    sent: list[tuple[str, ...]] = []
    for file in _files(one.path):
        below = file.relative_to(one.path).parts if one.path.is_dir() else ()
        if not store.exists(*one.key, *below):
            store.upload(file, *one.key, *below)
            sent.append((*one.key, *below))
    if _sha256(one.path) != one.sha256:
        for key in sent:  # what was there before is another job's
            store.delete(*key)
        raise ConfigError(
            str(one.path), "it changed while it was sent", "a job's rows have one content", "submit the job again"
        )


def path_findings(spec: Mapping[str, Any], *, shared: bool, here: bool = False) -> Findings:
    """Local paths that are left in a spec, which the job would look for where it runs.

    `shared`: the machines there may mount the same disk; `here`: they are this machine.
    """
    for where, value in texts_in(spec):
        key = _key(where)
        path = _local_path(where, value) or Path(value)
        if key in PLACE_KEYS or "://" in value:
            continue
        if _local_path(where, value) is None and not (("/" in value or path.suffix) and _exists(path)):
            continue  # no path: neither by its key, nor as the name of a file
        relative = not path.is_absolute()
        if not _exists(path):
            if relative:
                yield refuse(
                    "PATH-ABSENT",
                    where,
                    f"{value} does not exist in this folder",
                    "a plain path is a file of this machine, which is copied to the job's store",
                    "correct the path, or name s3://BUCKET/KEY",
                )
        elif not here and not shared and key in INPUT_KEYS and not _is_weights(path) and _size(path) > MOST_BYTES:
            yield refuse(
                "PATH-TOO-LARGE",
                where,
                f"{value} has {_size(path) / GIB:.2f} GiB",
                "a job copies at most 1 GiB of local files to its store",
                "copy the file to S3 once and name s3://BUCKET/KEY",
            )
        elif not here and not shared:
            yield refuse(
                "PATH-LOCAL",
                where,
                f"{value} is on this machine and is not copied to the store",
                "pods read the store and their image; a job copies at most 1 GiB of rows and no weights",
                "copy it to s3://, or file:///PATH where the image or the claim has it",
            )
        elif relative:
            yield refuse(
                "PATH-RELATIVE",
                where,
                f"{value} is relative to this folder",
                "the driver runs in a folder of its own",
                f"{path.resolve()}, or s3://",
            )
        elif not here:
            yield warn(
                "PATH-LOCAL",
                where,
                f"{value} is on this machine",
                "the cluster sees it only where it mounts the same disk",
                "put it on s3://",
            )


def texts_in(tree: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a spec with the path of its key: `arms[0].retriever.corpus`."""
    if isinstance(tree, str):
        yield where, tree
    elif isinstance(tree, Mapping):
        for key, inner in tree.items():
            yield from texts_in(inner, f"{where}.{key}" if where else str(key))
    elif isinstance(tree, list | tuple):
        for number, inner in enumerate(tree):
            yield from texts_in(inner, f"{where}[{number}]")


def _map_texts(tree: Any, change: Callable[[str, str], str], where: str = "") -> Any:
    if isinstance(tree, str):
        return change(where, tree)
    if isinstance(tree, Mapping):
        return {key: _map_texts(one, change, f"{where}.{key}" if where else str(key)) for key, one in tree.items()}
    if isinstance(tree, list | tuple):
        return [_map_texts(one, change, f"{where}[{number}]") for number, one in enumerate(tree)]
    return tree


def _key(where: str) -> str:
    """The name of the key that a value belongs to, `space.data.train.values[0]` of a sweep being one of `train`."""
    parts = [re.sub(r"\[\d+\]", "", part) for part in where.split(".")]
    if parts[0] == "space" and parts[-1] == "values":
        parts = parts[:-1]
    if parts[-1] == "uri" and len(parts) > 1 and parts[-2] in INPUT_PARENTS:
        return "train"  # read as rows are
    if parts[-2:] == ["train", "path"]:
        return "train"  # one of several sources
    return parts[-1]


def _local_path(where: str, value: str) -> Path | None:
    """The path of a key that names a file to read; None for other keys, URIs and texts that are no path."""
    inline = value.lstrip().startswith(("{", "[")) or "\n" in value
    named = _key(where) == "chat_template" and value == "hermes"  # a template of this package
    if _key(where) not in INPUT_KEYS or "://" in value or inline or named or "\0" in value or not value:
        return None
    return Path(value).expanduser()


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def _is_weights(path: Path) -> bool:
    """Return whether the path is a base or an adapter: those are published to a store, not copied with each job."""
    names = [path.name] if path.is_file() else [one.name for one in path.iterdir()]
    return any(name.endswith(WEIGHTS) or name == "config.json" for name in names)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in _files(path))


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [path.joinpath(*below) for below in files_under(path)]


def _input(path: Path, size: int) -> JobInput:
    sha256 = _sha256(path)
    name = re.sub(r"[^A-Za-z0-9._-]", "_", path.absolute().name).lstrip(".") or "data"
    return JobInput(path.absolute(), (INPUTS, sha256[:24], name), sha256, size)


def _sha256(path: Path) -> str:
    """Return the sha256 of a file's content; of a folder, over each file's path and content."""
    if path.is_file():
        return _digest(path)
    parts = [[file.relative_to(path).as_posix(), _digest(file)] for file in _files(path)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
